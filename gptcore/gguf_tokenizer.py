"""Writes a tokenizer into a GGUF file so that llama.cpp gives the same ids; used by `gptcore.export`.

GGUF has two kinds of BPE: `gpt2`, a list of merges behind one of llama.cpp's splits, and `llama`, sentencepiece's,
where a token's score orders the merges. A tokenizer that neither can express raises ExportError, which names the part.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from gptcore.chat import template_source
from gptcore.errors import ExportError, excerpt
from gptcore.hf_tokenizer import LINE_SPLITTERS
from gptcore.merges import byte_characters
from gptcore.spelling import steps
from gptcore.tokenizer import Tokenizer, tokenizer_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel's own regular expression splits by."""
QWEN_SPLIT, LLAMA3_SPLIT = LINE_SPLITTERS
PRE_TOKENIZERS = {
    ((GPT2_SPLIT,), False): "gpt-2",
    ((r"\p{N}", GPT2_SPLIT), False): "smollm",
    ((QWEN_SPLIT,), False): "qwen2",
    ((LLAMA3_SPLIT,), False): "dbrx",
    ((LLAMA3_SPLIT,), True): "llama-bpe",
}
"""Patterns in order, and whether a word that is a token skips the merges -> llama.cpp's name (llama-vocab.cpp)."""
KNOWN_SPLITS = "GPT-2's, SmolLM's (the same behind single digits), Qwen 2's or Llama 3's"
MARK = "\u2581"
"""Sentencepiece's space."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's types of tokens."""
ENDS = ("eos", "eot", "eom")
"""GGUF's keys for tokens that end a text."""
NOT_NFC = "llama.cpp does not normalise texts: one that is not in Unicode's form NFC has other ids there"
PREFIXED = "llama.cpp puts a space before every text, also before one that begins with a space, which we do not"


def add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> list[str]:
    """Adds the fields to a gguf.GGUFWriter, for an embedding of so many rows.

    Returns the known differences that remain, a sentence each. Raises ExportError.
    """
    content = tokenizer_json(tokenizer)
    model = content["model"]
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ExportError("GGUF has no prefix or suffix of subwords, which this tokenizer has")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    _check_added(content)
    types = _add_tokens(writer, tokenizer, content, rows)
    if tokenizer.published is None or tokenizer.published.spelling.byte_level:
        notes = _add_byte_level(writer, content, merges)
    else:
        notes = _add_sentencepiece(writer, content, merges, rows)
    _add_special(writer, tokenizer)
    if unused := [number for number, kind in enumerate(types) if kind == UNUSED]:
        writer.add_array("tokenizer.ggml.suppress_tokens", unused)  # never chosen
    if template := template_source(tokenizer):
        writer.add_chat_template(template)
    return notes


def _check_added(content: Mapping[str, Any]) -> None:
    for token in content.get("added_tokens") or []:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag) and not token.get("special"):
                raise ExportError(f"the added token {excerpt(token['content'])} has {flag}, which GGUF cannot say")


def _add_tokens(writer: Any, tokenizer: Tokenizer, content: Mapping[str, Any], rows: int) -> list[int]:
    """Adds each id's token and type; returns the types. An id without a token is unused."""
    vocab: dict[str, int] = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    token_of = {number: token for token, number in (vocab | added).items()}
    unknown = content["model"].get("unk_token")
    falls_back = bool(content["model"].get("byte_fallback"))
    tokens, types = [], []
    for number in range(rows):
        token = token_of.get(number, f"[PAD{number}]")
        if number not in token_of:
            kind = UNUSED
            while token in vocab or token in added:
                token = f"[{token}]"
        elif token == unknown:
            kind = UNKNOWN
        elif number in tokenizer.special:
            kind = CONTROL
        elif token in added:
            kind = USER_DEFINED
        else:
            kind = BYTE if falls_back and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
        tokens.append(token)
        types.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return types


def _add_byte_level(writer: Any, content: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> list[str]:
    pre = _pre_tokenizer(content)
    normalizers = [step["type"] for step in steps(content.get("normalizer"), "normalizers")]
    if {*normalizers} - {"NFC"}:
        raise ExportError(f"GGUF cannot say that texts are normalised by {excerpt(content['normalizer'])}")
    if missing := [b for b, shown in byte_characters().items() if shown not in content["model"]["vocab"]]:
        raise ExportError(f"llama.cpp needs a token for each byte; the vocabulary lacks 0x{min(missing):02X}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    # llama.cpp needs a list: without merges, of one that never applies, since MARK stands for no byte.
    writer.add_token_merges([" ".join(pair) for pair in merges] or [f"{MARK} {MARK}"])
    return [NOT_NFC] if normalizers else []


def _pre_tokenizer(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits text."""
    splits = [*steps(content.get("pre_tokenizer"), "pretokenizers")]
    patterns: list[str] = []
    for step in splits:
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex") or "")
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space", True):
            patterns += [GPT2_SPLIT] if step.get("use_regex", True) else []
        else:
            patterns.append("")  # unknown
    ignores_merges = bool(content["model"].get("ignore_merges"))
    pre = PRE_TOKENIZERS.get((tuple(patterns), ignores_merges))
    if pre is None or splits[-1]["type"] != "ByteLevel":
        skipping = ", with ignore_merges" if ignores_merges else ""
        raise ExportError(
            f"llama.cpp has no split like this tokenizer's, {excerpt(content.get('pre_tokenizer'))}{skipping}; "
            f"expected {KNOWN_SPLITS}"
        )
    return pre


def _add_sentencepiece(
    writer: Any, content: Mapping[str, Any], merges: Sequence[tuple[str, ...]], rows: int
) -> list[str]:
    prefix, notes = _prefix(content)
    vocab = content["model"]["vocab"]
    plain = [token["content"] for token in content.get("added_tokens") or [] if not token.get("special")]
    if plain:
        raise ExportError(
            f"llama.cpp puts a space behind the added token {excerpt(plain[0])}; expected special ones only"
        )
    if missing := [b for b in range(256) if f"<0x{b:02X}>" not in vocab]:
        raise ExportError(f"llama.cpp needs a token for each byte; the vocabulary lacks <0x{missing[0]:02X}>")
    scores = _scores(vocab, merges)
    by_id = {number: token for token, number in vocab.items()}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores.get(by_id.get(i, ""), 0.0) for i in range(rows)])
    writer.add_add_space_prefix(prefix)
    return notes


def _prefix(content: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front, and what differs."""
    normalizers = [*steps(content.get("normalizer"), "normalizers")]
    splits = [*steps(content.get("pre_tokenizer"), "pretokenizers")]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    if not splits and normalizers == [{"type": "Prepend", "prepend": MARK}, replaces]:
        return True, []
    if not splits and normalizers == [replaces]:
        return False, []
    if not normalizers and len(splits) == 1:
        step = {"split": True, "prepend_scheme": "always", **splits[0]}
        if (step["type"], step.get("replacement"), step["split"]) == ("Metaspace", MARK, False):
            return (False, []) if step["prepend_scheme"] == "never" else (True, [PREFIXED])
    raise ExportError(
        f"GGUF cannot say that texts are normalised by {excerpt(content.get('normalizer'))} and split by "
        f"{excerpt(content.get('pre_tokenizer'))}; expected sentencepiece's {MARK} for spaces, and no split"
    )


def _scores(vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """The score of each merged token: the earlier its merges, the higher.

    llama.cpp joins any two neighbours that make a token. So each such pair must be a merge, and a token's merges must
    follow each other, as in what transformers' converter makes of sentencepiece's model.
    """
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    if len({*order}) < len(order):
        twice = next(token for i, token in enumerate(order) if token in order[:i])
        raise ExportError(f"the merges into {excerpt(twice)} do not follow each other, and GGUF has one rank for them")
    known = {*merges}
    for token in vocab:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if all(len(part) == 1 or part in vocab for part in (left, right)) and (left, right) not in known:
                raise ExportError(
                    f"llama.cpp would join {excerpt(left)} and {excerpt(right)}, which is no merge of this tokenizer; "
                    "expected every pair of tokens that make a token, as transformers' converter writes them"
                )
    return {token: -float(rank) for rank, token in enumerate(order)}


def _add_special(writer: Any, tokenizer: Tokenizer) -> None:
    """What begins and ends a text."""
    if len(tokenizer.bos) > 1:
        raise ExportError(f"{len(tokenizer.bos)} tokens begin a text, {tokenizer.bos}; GGUF has one")
    if len(tokenizer.stops) > len(ENDS):
        raise ExportError(f"{len(tokenizer.stops)} tokens end a text, {tokenizer.stops}; GGUF has {len(ENDS)}")
    writer.add_bos_token_id((tokenizer.bos or (tokenizer.eot,))[0])
    writer.add_add_bos_token(bool(tokenizer.bos))
    writer.add_add_eos_token(False)
    for name, number in zip(ENDS, tokenizer.stops, strict=False):
        getattr(writer, f"add_{name}_token_id")(number)
    if tokenizer.published and (pad := tokenizer.published.special_ids()["pad_token_id"]) is not None:
        writer.add_pad_token_id(pad)
