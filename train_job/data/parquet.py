"""Reads Parquet files of many documents. In: a range of rows. Out: their texts, one at a time.

Memory holds a batch of rows, for any size of file.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gptcore.errors import CorpusError, did_you_mean
from train_job.data.conversations import CONVERSATION, FIELDS, conversation_text
from train_job.data.records import once


def open_parquet(path: str | Path, column: str, label: str) -> Any:
    """Opens the file with pyarrow and checks that the column is text. Raises CorpusError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CorpusError(f"reading {label} needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{label} is not a complete Parquet file: {error}") from None
    names = file.schema_arrow.names
    if column == CONVERSATION:
        if not {*FIELDS} & {*names}:
            raise CorpusError(f"{label} has no column 'messages'; it has {', '.join(names)}")
        return file
    if column not in names:
        raise CorpusError(f"{label} has no column {column!r}; it has {', '.join(names)}.{did_you_mean(column, names)}")
    once(names, column, label)
    types, kind = pyarrow.types, file.schema_arrow.field(column).type
    held = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    raw = (types.is_binary, types.is_large_binary, types.is_binary_view)  # from writers that have no text type
    if not any(fits(held) for fits in (*texts, *raw)):
        raise CorpusError(f"{label}: column {column!r} holds {kind}, expected text")
    return file


def parquet_texts(table: Any, label: str) -> Any:
    """The only column of a table or batch as large strings. Raises CorpusError for text that is not UTF-8."""
    import pyarrow

    column = table.column(0)
    try:
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        texts = column.cast(pyarrow.large_binary()).cast(pyarrow.large_string())  # a cast from bytes checks them
    except pyarrow.ArrowInvalid as error:
        name = table.schema.names[0]
        raise CorpusError(f"{label}: column {name!r} has a row that is not UTF-8: {error}") from None
    return texts


def scan_parquet(path: Path, column: str, label: str, most: int) -> tuple[list[int], list[int]]:
    """Reads the text column once: the row borders of parts, which are whole row groups, and their UTF-8 bytes."""
    file = open_parquet(path, column, label)
    borders, sizes = [0], [0]
    for group in range(file.num_row_groups):
        lengths = row_bytes(file, column, [group], label)
        if sizes[-1] and sizes[-1] + sum(lengths) > most:
            borders.append(borders[-1])
            sizes.append(0)
        sizes[-1] += sum(lengths)
        borders[-1] += len(lengths)
    return [0, *borders], sizes


def row_bytes(file: Any, column: str, groups: list[int], label: str) -> list[int]:
    """UTF-8 bytes of each row's text; 0 for null."""
    from pyarrow import compute

    if column == CONVERSATION:
        first = sum(file.metadata.row_group(group).num_rows for group in range(groups[0]))
        batches = file.iter_batches(batch_size=1024, row_groups=groups, columns=_fields(file))
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return [len(text.encode()) for text in _conversations(rows, label, first)]
    texts = parquet_texts(file.read_row_groups(groups, columns=[column]), label)
    return compute.fill_null(compute.binary_length(texts), 0).to_pylist()


def read_parquet(path: str, start: int, end: int, column: str, label: str) -> Iterator[str]:
    """The texts of rows [start, end)."""
    file = open_parquet(path, column, label)
    columns = _fields(file) if column == CONVERSATION else [column]
    first = 0  # first row of the current group
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < end and first + rows > start:
            batches = file.iter_batches(batch_size=1024, row_groups=[group], columns=columns)
            if column == CONVERSATION:
                texts = _conversations(chain.from_iterable(batch.to_pylist() for batch in batches), label, first)
            else:
                texts = (text.as_py() or "" for batch in batches for text in parquet_texts(batch, label))
            yield from islice(texts, max(start - first, 0), end - first)
        first += rows


def _fields(file: Any) -> list[str]:
    """The columns of a Parquet file that conversations are made of."""
    return [name for name in FIELDS if name in file.schema_arrow.names]


def _conversations(rows: Iterable[Any], label: str, first: int) -> Iterator[str]:
    """The conversations of rows from number `first` on. Raises CorpusError naming the row."""
    for number, row in enumerate(rows, start=first):
        try:
            yield conversation_text(row)
        except ValueError as error:
            raise CorpusError(f"{label}, row {number}: {error}") from None
