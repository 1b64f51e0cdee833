"""Reads the tokenizers of open models: whatever byte-level or sentencepiece-style BPE a tokenizer.json describes.

In: a folder as the hub has it. Out: a `PublishedEncoding`, which the library `tokenizers` runs, so that it encodes as
`transformers` does. It holds the files' bytes, and a package made from it gets the same files. What cannot be kept
exactly raises TokenizerError, which names the file, what was found and what is supported.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers

from gptcore.documents import MOST_BYTES, read_json, require_regular
from gptcore.errors import TokenizerError, excerpt
from gptcore.special import Part, special_pattern
from gptcore.spelling import spelling_of, steps

TOKENIZER_BYTES = 1 << 26
"""Size limit of a tokenizer file: 64 MiB. Qwen's has 11 MB, Llama 3's 17 MB, Gemma 3's 33 MB."""
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
NAMED, ADDED = "special_tokens_map.json", "added_tokens.json"
DECIDING = (TOKENIZER, CONFIG, NAMED, ADDED)
"""The files on which ids depend."""
FILES = (*DECIDING, "chat_template.jinja", "chat_template.json")
"""The files of a published tokenizer that a package keeps, byte for byte."""
MODEL_FILES = ("generation_config.json", "config.json")
"""The model's files that also name its special ids, the deciding one first."""

PRE_TOKENIZERS = ("ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts")
"""Those that keep all of the text."""
LINE_SPLITTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Patterns of Qwen 2 and 3, and of Llama 3. As GPT-2's, they separate a line's end from a next line that begins with a
visible character."""
ACROSS_LINES = re.compile(r"(\n|<0x0A>)[^\n]")
"""In a token, a line's end before something else."""
Files = tuple[tuple[str, bytes], ...]
ModelIds = tuple[tuple[str, tuple[int, ...]], ...]


class PublishedEncoding:
    """The tokenizer of `files`, by name and content; `model_ids` are the special ids that the model's files name.

    Raises ValueError, or what the library raises, for one that cannot be kept exactly. Pickles as its files.
    """

    def __init__(self, files: Files, model_ids: ModelIds) -> None:
        self.files, self._model_ids = files, model_ids
        content, config = _parsed(files, TOKENIZER), _parsed(files, CONFIG)
        if "added_tokens_decoder" not in config:  # as in `transformers` 5.23, the older files count only then
            older = {i: {"content": token} for i, token in enumerate(_parsed(files, ADDED))}
            config = config | _parsed(files, NAMED) | {"added_tokens_decoder": older}
        self.n_vocab = _check_supported(content, config)
        """The largest id + 1; some ids below may have no token."""
        self.spelling = spelling_of(content.get("decoder"))
        self.splits_lines = _splits_lines(content)
        """Whether a text may be cut behind a line break between visible characters, without a change to its ids."""
        self._backend = _backend(content, config, dict(files)[TOKENIZER])
        self._separated = lru_cache(2)(lambda free: _separated(_backend(content, config, dict(files)[TOKENIZER]), free))
        self._bytes = cache(lambda number: self.spelling.middle(self.token(number)))
        added = self._backend.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)
        """Ids of special tokens, which no text gives and which have no text in a stream."""
        self.stops = self._stops(config)
        """The ids that end a text; the first one ends training documents."""
        self.special |= {*self.stops}
        self._check_special_are_text(content["model"].get("unk_token"))
        self.special_names = {k: name for k, v in config.items() if k.endswith("_token") and (name := _content(v))}
        """Special tokens by their names in the tokenizer's files, such as `eos_token`."""
        self.bos = self._bos()
        """The ids that `transformers` puts before a text by default; what it puts behind is left out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return encoding_of, (self.files, self._model_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of what the ids and texts depend on. Padding, templates and the files' layout do not count."""
        content = _parsed(self.files, TOKENIZER)
        parts: dict[str, Any] = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder", "model")}
        parts["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
        parts["added_tokens"] = sorted(content.get("added_tokens") or [], key=lambda token: token["id"])
        parts |= {"eot": self.stops[0], "bos": self.bos, "special": sorted(self.special)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def content(self, name: str) -> dict[str, Any]:
        """What the file of that name contains, {} without one."""
        return _parsed(self.files, name)

    def special_ids(self) -> dict[str, Any]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id` for the model's files, those that it had."""
        named = dict(self._model_ids)
        bos, pad = (named.get(f"{kind}_token_id", default) for kind, default in (("bos", self.bos), ("pad", ())))
        ends = self.stops[0] if len(self.stops) == 1 else [*self.stops]
        return {
            "bos_token_id": bos[0] if bos else None,
            "eos_token_id": ends,
            "pad_token_id": pad[0] if pad else self.stops[0],
        }

    def with_file(self, name: str, content: bytes) -> "PublishedEncoding":
        """The same tokenizer with one more file."""
        return encoding_of((*self.files, (name, content)), self._model_ids)

    def with_stop(self, token: int) -> "PublishedEncoding":
        """The same tokenizer with one more token that ends a text."""
        ids = dict(self._model_ids)
        ids["eos_token_id"] = (*ids.get("eos_token_id", ()), token)
        return encoding_of(self.files, tuple(sorted(ids.items())))

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The ids of `text`, without `bos`. Unless it `begins`, it is the rest of one that was cut behind a line.

        Raises TokenizerError if the library gives up on it.
        """
        if not begins:  # the library puts a prefix space only before the line break
            return self.encode(f"\n{text}")[len(self.encode("\n")) :]
        return _ids(self._backend, text)

    def encode_parts(self, parts: Iterable[Part], free: str) -> list[tuple[int, int]]:
        """The ids of a text that was split at its special tokens, each with the place where it begins.

        `free` is a character that the text does not contain. It stands for the special tokens while the rest is
        encoded: the library splits there as it does at a special token.
        """
        parts, backend = [*parts], self._separated(free)
        whole = _encoding(backend, free.join(part.text for part in parts))
        separator, starts = backend.token_to_id(free), [*accumulate((len(p.text) + 1 for p in parts), initial=0)]
        ids: list[tuple[int, int]] = []
        number = 0
        for token, (start, _) in zip(whole.ids, whole.offsets, strict=True):
            part = parts[number]
            if token == separator:
                ids.append((int(self._backend.token_to_id(part.special) or 0), part.end))
                number += 1
            else:
                ids.append((token, part.place(max(0, start - starts[number]))))
        return ids

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """How the special tokens are spelled, longest first."""
        return tuple(sorted(map(self.token, self.special), key=len, reverse=True))

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a special token as the library does, with the white space that it takes along."""
        added = self._backend.get_added_tokens_decoder().values()
        left, right = ({t.content for t in added if getattr(t, side)} for side in ("lstrip", "rstrip"))
        return special_pattern(self.special_tokens, left, right)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` behind other text; an id without a token has none."""
        return b"".join(map(self._bytes, ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, as `transformers` has it; invalid UTF-8 becomes U+FFFD."""
        begin = next((place for place, number in enumerate(ids) if self.token(number)), len(ids))
        first = [self.spelling.first(self.token(number)) for number in ids[begin : begin + 1]]
        return b"".join([*first, *map(self._bytes, ids[begin + 1 :])]).decode("utf-8", errors="replace")

    def token(self, number: int) -> str:
        """The token as in tokenizer.json, empty if the id has none."""
        return self._backend.id_to_token(number) or ""

    def _stops(self, config: dict[str, Any]) -> tuple[int, ...]:
        """The end-of-text token that the tokenizer names, then those of the model. Raises ValueError for none."""
        named = self._backend.token_to_id(_content(config.get("eos_token")))
        stops = [] if named is None else [named]
        stops += dict(self._model_ids).get("eos_token_id", ())
        if not stops:
            raise ValueError(
                f"no end-of-text token is named; expected eos_token in {CONFIG}, or eos_token_id in config.json"
            )
        for number in stops:
            if not self.token(number):
                raise ValueError(
                    f"eos_token_id is {number}, which is no token; the ids go from 0 to {self.n_vocab - 1}"
                )
        return tuple(dict.fromkeys(stops))

    def _bos(self) -> tuple[int, ...]:
        """The post_processor decides, and `add_bos_token` does not, as in `transformers` 5.23."""
        whole, text = self._backend.encode("a").ids, self.encode("a")
        starts = range(len(whole) - len(text) + 1)
        return tuple(whole[: next((i for i in starts if whole[i : i + len(text)] == text), 0)])

    def _check_special_are_text(self, unknown: str | None) -> None:
        """Raises ValueError if the characters of a special token give its id, unless as unknown ones."""
        for number, token in ((number, self.token(number)) for number in self.special):
            if token != unknown and number in self.encode(token):
                raise ValueError(f"text that reads {excerpt(token)} would become this special token")


def read_encoding(folder: Path) -> PublishedEncoding:
    """The tokenizer of the folder's tokenizer.json, which is valid JSON. Raises TokenizerError for an unfit one."""
    files = tuple((name, _read(folder / name)) for name in FILES if name == TOKENIZER or (folder / name).exists())
    for name in (CONFIG, NAMED, ADDED):
        if name in dict(files):
            read_json(folder / name, MOST_BYTES, TokenizerError)
    ids: dict[str, tuple[int, ...]] = {}
    for name in MODEL_FILES:
        if (folder / name).exists():
            ids = {**_special_ids(folder / name), **ids}
    try:
        return encoding_of(files, tuple(sorted(ids.items())))
    except BaseException as error:
        _raise_if_other(error)
        what: dict[type[BaseException], str] = {
            KeyError: f"{error} is missing",
            TypeError: f"a part has the wrong form ({error})",
        }
        reason = " ".join(what.get(type(error), str(error)).split())
        raise TokenizerError(f"the tokenizer in {folder} cannot be kept exactly: {reason}") from error


def without_tokenizer(folder: Path) -> str:
    """Why `folder` has no tokenizer that can be read."""
    missing = f"{folder} holds no tokenizer: neither {TOKENIZER} nor vocab.json with merges.txt"
    others = (
        "tokenizer.model",
        "spiece.model",
        "tekken.json",
        *sorted(file.name for file in folder.glob("*.tiktoken")),
    )
    found = next((name for name in others if (folder / name).is_file()), None)
    if found is None:
        return missing
    return (
        f"{missing}, only {found}. To convert it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), with "
        "transformers and sentencepiece"
    )


@lru_cache(maxsize=2)
def encoding_of(files: Files, model_ids: ModelIds) -> PublishedEncoding:
    """The encoding, made once: a worker unpickles it with every task, and a model's next version has the same."""
    return PublishedEncoding(files, model_ids)


def _raise_if_other(error: BaseException) -> None:
    """Raises `error` unless it says that a file is wrong. A panic of the library is a BaseException."""
    if isinstance(error, TokenizerError) or not (
        isinstance(error, Exception) or type(error).__name__ == "PanicException"
    ):
        raise error


def _read(file: Path) -> bytes:
    require_regular(file, TokenizerError)
    most = TOKENIZER_BYTES if file.name == TOKENIZER else MOST_BYTES
    if (size := file.stat().st_size) > most:
        raise TokenizerError(f"{file} is unreadable: it has {size:,} bytes; expected at most {most:,}")
    return file.read_bytes()


def _parsed(files: Files, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dict(files).get(name, b"{}"))
    return found


def _special_ids(file: Path) -> dict[str, tuple[int, ...]]:
    """The ids that config.json or generation_config.json names. Raises TokenizerError unless the last are numbers."""
    content, found = read_json(file, MOST_BYTES, TokenizerError), {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(key)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if all(type(number) is int and number >= 0 for number in numbers):
            found[key] = tuple(numbers)
        elif key == "eos_token_id":
            raise TokenizerError(f"{file}: {key} is {excerpt(value)}; expected the id of a token, or a list of them")
    return {key: numbers for key, numbers in found.items() if numbers}


def _content(token: Any) -> str:
    """A token's text, which files have bare or with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _check_supported(content: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The largest id + 1. Raises ValueError for a model, a splitting or code that would not keep a text or its ids."""
    model, custom = content["model"], config.get("auto_map")
    if custom:
        raise ValueError(f"{CONFIG} names code of its own, {excerpt(custom)}, which is not run")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {excerpt(model['type'])}; expected 'BPE'")
    if model.get("dropout"):
        raise ValueError(f"its model has dropout {excerpt(model['dropout'])}, so its ids are random; expected none")
    for step in steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] not in PRE_TOKENIZERS or step.get("behavior") == "Removed":
            raise ValueError(
                f"it splits text by other rules, {excerpt(step['type'])}, which lose characters; expected some of "
                f"{', '.join(PRE_TOKENIZERS)}"
            )
    tokens = {token["content"]: token["id"] for token in content.get("added_tokens") or []} | model["vocab"]
    owners: dict[int, str] = {}
    for token, number in tokens.items():
        if (other := owners.setdefault(number, token)) != token:
            raise ValueError(f"its tokens are not distinct: {excerpt(other)} and {excerpt(token)} have the id {number}")
    return max(owners) + 1


def _splits_lines(content: Mapping[str, Any]) -> bool:
    """Whether nothing looks across the end of a line: no step before the merges is known to, and no token does."""
    normalizers = [*steps(content.get("normalizer"), "normalizers")]
    splits = [*steps(content.get("pre_tokenizer"), "pretokenizers")]
    kinds = [step["type"] for step in splits]
    added = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    if any(token.get("lstrip") or ACROSS_LINES.search(token["content"]) for token in added):
        return False
    if kinds[-1:] == ["ByteLevel"]:
        if splits[-1].get("add_prefix_space", True) or any(step["type"] != "NFC" for step in normalizers):
            return False
        if kinds == ["Split", "ByteLevel"]:
            return splits[0]["pattern"].get("Regex") in LINE_SPLITTERS and not splits[0].get("invert")
        return kinds in (["ByteLevel"], ["Digits", "ByteLevel"]) and bool(splits[-1].get("use_regex", True))
    replaces = [step for step in normalizers if step["type"] == "Replace"]
    local = all("\n" not in step["pattern"].get("String", "\n") + step["content"] for step in replaces)
    known = {step["type"] for step in normalizers} <= {"NFC", "Prepend", "Replace"} and kinds in ([], ["Metaspace"])
    model = content["model"]
    fuses = model.get("unk_token") is not None and not model.get("byte_fallback")  # unknown characters become one
    return local and known and not fuses and not any(map(ACROSS_LINES.search, model["vocab"]))


def _separated(backend: tokenizers.Tokenizer, free: str) -> tokenizers.Tokenizer:
    """The backend with one more token, at which a text is split."""
    backend.add_tokens([tokenizers.AddedToken(free, special=False, normalized=False)])
    return backend


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of `text`. Raises TokenizerError."""
    return _encoding(backend, text).ids


def _encoding(backend: tokenizers.Tokenizer, text: str) -> Any:
    """`text` encoded; lone surrogates are replaced. Raises TokenizerError if the library gives up on it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return backend.encode(text, add_special_tokens=False)
    except BaseException as error:
        _raise_if_other(error)
        raise TokenizerError(f"the tokenizer cannot split a text of {len(text):,} characters: {error}") from error


def _backend(content: Mapping[str, Any], config: Mapping[str, Any], raw: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer, with the special tokens that tokenizer_config.json adds to those of tokenizer.json."""
    backend = tokenizers.Tokenizer.from_str(raw.decode())
    backend.no_truncation()
    backend.no_padding()
    for token in content.get("added_tokens") or []:
        if (number := backend.token_to_id(token["content"])) != token["id"]:
            raise ValueError(
                f"its added token {excerpt(token['content'])} has the id {token['id']}, which the library `tokenizers` "
                f"changes to {number}; expected ids that follow the vocabulary's, or a vocabulary with this token"
            )
    for token in (config["added_tokens_decoder"] or {}).values():
        if backend.token_to_id(token["content"]) is None:
            raise ValueError(f"{CONFIG} or {ADDED} has the token {excerpt(token['content'])}, which {TOKENIZER} lacks")
        if len(token) > 1:
            backend.add_tokens([tokenizers.AddedToken(**token)])
    named = {_content(value) for key, value in config.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        named |= {_content(token) for token in (more.values() if isinstance(more, dict) else more)}
    special = [name for name in sorted(named - {""}) if backend.token_to_id(name) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    backend.encode_special_tokens = True
    return backend
