"""Reads files of many documents: JSON, JSON lines, CSV. In: a range of a file. Out: its texts, one at a time.

Each format has a `scan_…`, which reads the whole file once and finds where it can be split, and a `read_…`, which
yields the texts of a part. Memory holds one record, for any size of file.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptcore.errors import CorpusError, did_you_mean
from train_job.data.conversations import CONVERSATION, conversation_text

BLOCK_BYTES = 2**20
LONGEST_RECORD = 2**28
"""Characters in one value of JSON or one field of CSV. Anything longer means a malformed file."""
DELIMITERS = {"csv": ",;\t|", "tsv": "\t,;|"}
"""Possible delimiters, the likeliest first."""


class BadRecord(ValueError):
    """A problem in a record, and its byte position."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def part_borders(starts: Iterable[int], most: int) -> list[int]:
    """Borders of parts of at most `most` bytes that end between records; the last of `starts` is the file's end."""
    borders: list[int] = []
    previous = 0
    for start in starts:
        if not borders:
            borders.append(start)
        elif start - borders[-1] > most and previous > borders[-1]:
            borders.append(previous)
        previous = start
    return [*borders, previous] if previous > borders[-1] else borders


def line_number(path: str, position: int) -> int:
    """The number, from 1, of the line that contains byte `position`."""
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(min(2**20, position - file.tell())), b"")
        return 1 + sum(chunk.count(b"\n") for chunk in chunks)


# --- JSON -----------------------------------------------------------------------------------------------------------


def field_of(record: Any, column: str) -> str:
    """The text in the field `column` of a JSON object; null is empty. Raises ValueError.

    If `column` is CONVERSATION, the object is one, and its text is JSON.
    """
    if column == CONVERSATION:
        return conversation_text(record)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a field {column!r}, found {type(record).__name__}")
    if column not in record:
        raise ValueError(f"no field {column!r}; there are {', '.join(record) or 'none'}.{did_you_mean(column, record)}")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"field {column!r} is {type(text).__name__}, expected text")
    text.encode()  # raises ValueError for half of a surrogate pair
    return text


def read_jsonl(path: str, start: int, end: int, column: str, label: str) -> Iterator[str]:
    """The texts of the lines that begin in bytes [start, end). Raises CorpusError naming the line."""
    position = start
    with open(path, "rb") as file:
        file.seek(position)
        for line in file:
            if position >= end:
                return
            try:
                yield _line_text(line, column)
            except ValueError as error:
                raise CorpusError(f"{label}, line {line_number(path, position)}: {error}") from None
            position += len(line)


def _line_text(line: bytes, column: str) -> str:
    """The text of a JSON line; "" for an empty line. Raises ValueError."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        array = (
            "; to read an array of objects, give the file a name that ends in .json" if line.startswith(b"[") else ""
        )
        raise ValueError(f"not JSON ({error}){array}") from None
    return field_of(record, column)


GAP = re.compile(r"[\s,\[\]]*")
END = object()
"""The value that `json_values` yields last."""


def json_values(path: str, start: int, end: int | None = None) -> Iterator[tuple[int, str, Any]]:
    """The values of a JSON file from byte `start`, up to the first that begins at byte `end` or later, then END.

    Each comes with its start byte and the characters before it: white space, commas, an array's brackets.
    Raises BadRecord for what is not JSON.
    """
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        file.seek(start)
        text, at, position, more = "", 0, start, True  # text[at:] is to be read; text[at] is byte `position`

        def refilled() -> bool:
            nonlocal text, at, more
            if more:
                data = file.read(
                    max(BLOCK_BYTES, len(text) - at)
                )  # at least doubled, since a long value is parsed again
                more, text, at = bool(data), text[at:] + utf8.decode(data, final=not data), 0
                return True
            return False

        while True:
            behind = GAP.match(text, at).end()  # type: ignore[union-attr]  # it also matches an empty string
            if behind == len(text) and refilled():
                continue
            gap = text[at:behind]
            position, at = position + len(gap.encode()), behind
            if at == len(text) or (end is not None and position >= end):
                yield position, gap, END
                return
            try:
                while (found := _decoded(decoder, text, at, more)) is None:
                    if len(text) - at > LONGEST_RECORD:
                        raise BadRecord(f"a value has more than {LONGEST_RECORD:,} characters", position)
                    refilled()
            except json.JSONDecodeError as error:
                wrong = position + len(text[at : error.pos].encode())
                raise BadRecord(f"not JSON ({error.msg})", wrong) from None
            except BadRecord:
                raise
            except ValueError as error:  # a number with too many digits
                raise BadRecord(f"not JSON that can be read ({error})", position) from None
            except RecursionError:
                raise BadRecord("not JSON that can be read (nested too deeply)", position) from None
            value, behind = found
            yield position, gap, value
            position, at = position + len(text[at:behind].encode()), behind


def _decoded(decoder: json.JSONDecoder, text: str, at: int, more: bool) -> tuple[Any, int] | None:
    """The value at text[at:] and its end; None if it may continue in data not read yet."""
    try:
        value, behind = decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        if more and (error.msg.startswith("Unterminated") or error.pos > len(text) - 16):
            return None
        raise
    return None if more and behind == len(text) else (value, behind)  # a number may continue


def scan_json(path: Path, start: int, column: str, label: str, most: int) -> list[int]:
    """Borders of the parts of a JSON file: an array of objects, or objects one after the other.

    Raises CorpusError naming the first element that is not one.
    """
    number = 0

    def starts() -> Iterator[int]:
        nonlocal number
        array, wanted = False, ""  # expected before the next value
        for position, gap, value in json_values(str(path), start):
            between = "".join(gap.split())
            if number == 0 and between.startswith("["):
                array, between = True, between[1:]
            if value is END and between == ("]" if array else ""):
                yield position
                return
            if value is END and between in ("", ","):
                raise BadRecord("the file ends before its array does", position)
            number += 1
            if between != wanted:
                raise BadRecord(_misplaced(between, wanted, column), position)
            try:
                field_of(value, column)
            except ValueError as error:
                raise BadRecord(str(error), position) from None
            yield position
            wanted = "," if array else ""

    try:
        return part_borders(starts(), most)
    except BadRecord as error:
        line = line_number(str(path), error.position)
        raise CorpusError(f"{label}, line {line}, element {max(number, 1)}: {error}") from None


def _misplaced(found: str, wanted: str, column: str) -> str:
    if found.startswith(f"{wanted}["):
        field = "messages" if column == CONVERSATION else column
        return f"expected an object with a field {field!r}, found list"
    return f"not JSON ({found[:9]!r} where {repr(wanted) if wanted else 'nothing'} is expected before the next value)"


def read_json(path: str, start: int, end: int, column: str, label: str) -> Iterator[str]:
    """The texts of the values that begin in bytes [start, end). Raises CorpusError if the file has changed."""
    try:
        for _, _, value in json_values(path, start, end):
            if value is not END:
                yield field_of(value, column)
    except ValueError as error:
        raise CorpusError(f"{label}: {error}") from None


# --- CSV and TSV ----------------------------------------------------------------------------------------------------


def csv_rows(path: str, start: int, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows from byte `start`, each with its start byte, then the file's end with an empty row.

    Raises BadRecord.
    """
    csv.field_size_limit(LONGEST_RECORD)  # 128 KiB otherwise
    position = first = start
    with open(path, "rb") as file:
        file.seek(start)

        def lines() -> Iterator[str]:  # the reader takes only the lines of its row
            nonlocal position
            for line in file:
                position += len(line)
                yield line.decode()

        try:
            for row in csv.reader(lines(), delimiter=delimiter, strict=True):
                if row:
                    yield first, row
                first = position
        except csv.Error as error:
            raise BadRecord(_csv_problem(str(error)), first) from None
    yield position, []


def _csv_problem(error: str) -> str:
    """Rewords the csv module's error in terms of the file."""
    if "new-line character" in error:
        return "a lone carriage return, where lines end in a line feed; convert it: tr '\\r' '\\n' < OLD > NEW"
    if "expected after" in error or "unexpected end" in error:
        return "a field begins with a quotation mark that is not closed; quote the field and double quotes inside"
    return error


def csv_layout(path: str, start: int, kind: str, column: str, label: str) -> tuple[str, list[str]]:
    """The delimiter and the names in the first row. Raises CorpusError if `column` is not among them."""
    layouts = []
    for delimiter in DELIMITERS[kind]:
        try:
            names = next(csv_rows(path, start, delimiter))[1]
        except BadRecord as error:
            raise CorpusError(f"{label}, line {line_number(path, error.position)}: {error}") from None
        if column in names or not names:
            return delimiter, once(names, column, label)
        layouts.append(names)
    names = max(layouts, key=len)
    raise CorpusError(f"{label} has no column {column!r}; it has {', '.join(names)}.{did_you_mean(column, names)}")


def once(names: list[str], column: str, label: str) -> list[str]:
    """The names. Raises CorpusError if `column` occurs more than once."""
    if names.count(column) > 1:
        raise CorpusError(f"{label} has {names.count(column)} columns {column!r}, expected one; rename the others")
    return names


def scan_csv(path: Path, start: int, kind: str, column: str, label: str, most: int) -> list[int]:
    """Borders of the parts of a CSV file, whose first row has the column names. Raises CorpusError naming a line."""
    delimiter, names = csv_layout(str(path), start, kind, column, label)

    def starts() -> Iterator[int]:
        rows = csv_rows(str(path), start, delimiter)
        next(rows)
        for position, row in rows:
            if row and len(row) != len(names):
                raise BadRecord(f"the row has {len(row)} fields, the first row {len(names)}", position)
            yield position

    try:
        return part_borders(starts(), most) if names else [start]
    except BadRecord as error:
        raise CorpusError(f"{label}, line {line_number(str(path), error.position)}: {error}") from None


def read_csv(path: str, start: int, end: int, kind: str, column: str, label: str) -> Iterator[str]:
    """The texts of the rows that begin in bytes [start, end)."""
    delimiter, names = csv_layout(path, text_start(path), kind, column, label)
    for position, row in csv_rows(path, start, delimiter):
        if position >= end or not row:
            return
        yield row[names.index(column)]


def record_starts(path: str, start: int, kind: str, column: str, label: str) -> Iterator[int]:
    """Start bytes of the values or rows from byte `start` on, and the file's end."""
    if kind == "json":
        return (position for position, *_ in json_values(path, start))
    delimiter, _ = csv_layout(path, text_start(path), kind, column, label)
    return (position for position, _ in csv_rows(path, start, delimiter))


def text_start(path: str) -> int:
    """The first byte after a byte order mark, if there is one."""
    with open(path, "rb") as file:
        return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
