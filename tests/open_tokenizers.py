"""The tokenizers of open models, rebuilt here as their folders have them, and texts to try them on.

Layout, split patterns, normalisers, decoders and special tokens are the published ones. Qwen's vocabulary is the real
one where it lies beside the checkout; the others are learned from the text below, since there is no network.
"""

import base64
import json
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers, trainers

from gptcore.config import ModelConfig
from gptcore.hf_format import published_config, to_published
from gptcore.hf_tokenizer import LINE_SPLITTERS
from gptcore.merges import byte_characters, last_merge
from gptcore.model import GPT

QWEN_RANKS = Path(__file__).resolve().parents[2] / "shared" / "tiktoken" / "qwen.tiktoken"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added tokens that a text may contain: they are not special."""

TEXT = """Once upon a time, in 1984, there was a cat. The cat sat on the mat; it wasn't hers; they'll say we've seen it.
def main(argv: list[str]) -> int:\n    return 0  # the end\n\n\tif x == 10:\r\n        y += 3.14159
Es war einmal ein Mädchen, das hieß Käthe. Жили-были старик со старухой. 从前有一座山，山里有一个老和尚。
むかしむかし、あるところに。 한국어 텍스트. नमस्ते दुनिया। مرحبا بالعالم. שלום עולם. Γειά σου Κόσμε. สวัสดีชาวโลก.
"""
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
KINDS = ("qwen3", "llama3", "smollm2", "llama2", "mistral", "metaspace")


def write_tokenizer(kind: str, folder: Path) -> Path:
    """Writes a tokenizer of this kind into `folder`, which is made if it is missing; returns it."""
    content, config, beside = {"qwen3": _qwen3, "llama3": _llama3, "smollm2": _smollm2}.get(kind, _sentencepiece)(kind)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": content, "tokenizer_config.json": config, **beside}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder


def publish(tokenizer: Path, folder: Path, vocab_size: int, family: str = "qwen3", context: int = 64) -> Path:
    """Writes a small model of random weights with that tokenizer into `folder`, as the hub has it; returns it."""
    shutil.copytree(tokenizer, folder)
    shape: dict[str, Any] = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
    config = ModelConfig(family=family, vocab_size=vocab_size, tie_embeddings=True, context_length=context, **shape)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.1 + (value.ndim == 1 and "norm" in name)
        for name, value in GPT(config).named_parameters()
    }
    tensors = {name: tensor.clone() for name, tensor in to_published(GPT(config), state)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    ids = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(published_config(config) | ids))
    return folder


def added(token: str, number: int, special: bool = True) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    return {"id": number, "content": token, **FLAGS, "special": special}


def split(pattern: str) -> dict[str, Any]:
    """A step of the pre_tokenizer that splits text by a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _whole(**parts: Any) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, **parts}


@cache
def qwen_ranks() -> dict[bytes, int]:
    """Qwen's published ranks."""
    lines = QWEN_RANKS.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@cache
def _qwen_bpe() -> dict[str, Any]:
    shown, ranks = byte_characters(), qwen_ranks()
    spelled = {token: "".join(shown[b] for b in token) for token in ranks}
    merges = [[spelled[left], spelled[right]] for left, right in (last_merge(t, ranks) for t in ranks if len(t) > 1)]
    return {**BPE, "vocab": {spelled[token]: rank for token, rank in ranks.items()}, "merges": merges}


def _qwen3(kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    first = len(qwen_ranks())
    tokens = [added(token, first + i) for i, token in enumerate(QWEN_SPECIAL)]
    tokens += [added(token, first + len(tokens) + i, special=False) for i, token in enumerate(QWEN_PLAIN)]
    content = _whole(
        added_tokens=tokens,
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split(LINE_SPLITTERS[0]), BYTE_LEVEL]},
        post_processor=BYTE_LEVEL,
        decoder=BYTE_LEVEL,
        model=_qwen_bpe(),
    )
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in tokens},
        "additional_special_tokens": [*QWEN_SPECIAL[1:]],
        "bos_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {"bos_token_id": first, "eos_token_id": [first + 2, first], "pad_token_id": first, "do_sample": True}
    return content, config, {"generation_config.json": generation}


@cache
def _learned(size: int, pattern: str | None) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens in their order, and merges, learned from TEXT: byte-level, or of sentencepiece's words."""
    learner = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        learner.pre_tokenizer, alphabet = pre_tokenizers.Metaspace(), []
    else:
        cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        learner.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(TEXT.splitlines() * 2 if pattern is None else [TEXT] * 2, trainer)
    model = json.loads(learner.to_str())["model"]
    return tuple(sorted(model["vocab"], key=model["vocab"].get)), tuple(map(tuple, model["merges"]))


def _llama3(kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """With holes: ids go on at 300 after the 256 bytes, and at 1000 with the special tokens."""
    tokens, merges = _learned(600, LINE_SPLITTERS[1])
    vocabulary = {token: i if i < 256 else i + 44 for i, token in enumerate(tokens)}
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    special = [added(name, 1000 + i) for i, name in enumerate(names)]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": names[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {names[0]: {"id": names[0], "ids": [1000], "tokens": [names[0]]}},
    }
    content = _whole(
        added_tokens=special,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split(LINE_SPLITTERS[1]), BYTE_LEVEL]},
        post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template]},
        decoder={**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        model={
            **BPE,
            "ignore_merges": True,
            "vocab": vocabulary | {token["content"]: token["id"] for token in special},
            "merges": [" ".join(pair) for pair in merges],
        },
    )
    config = {
        "bos_token": names[0],
        "eos_token": "<|eot_id|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    named = {"bos_token": {"content": names[0], **FLAGS}, "eos_token": {"content": "<|eot_id|>", **FLAGS}}
    ids = {"bos_token_id": 1000, "eos_token_id": [1001, 1004]}
    return content, config, {"special_tokens_map.json": named, "generation_config.json": ids}


def _smollm2(kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
    tokens, merges = _learned(500, gpt2)
    vocabulary = {token: i for i, token in enumerate([*names, *tokens])}
    digits = {"type": "Digits", "individual_digits": True}
    content = _whole(
        added_tokens=[added(name, i) for i, name in enumerate(names)],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, {**BYTE_LEVEL, "use_regex": True}]},
        decoder={**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        model={**BPE, "vocab": vocabulary, "merges": [" ".join(pair) for pair in merges]},
    )
    config = {
        "add_prefix_space": False,
        "bos_token": names[0],
        "eos_token": names[0],
        "unk_token": names[0],
        "tokenizer_class": "GPT2Tokenizer",
    }
    return content, config, {"config.json": {"bos_token_id": 0, "eos_token_id": 0}}


def _sentencepiece(kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Llama 2's form (Prepend and Replace), Mistral's (Metaspace), or one decoded by Metaspace, without BOS.

    The merges of the first two are what transformers' converter makes of sentencepiece's tokens: every pair.
    """
    tokens, merges = _learned(500, None)
    if kind != "metaspace":
        known = {*tokens}
        halves = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
        merges = tuple(pair for pair in halves if known.issuperset(pair))
    names = ("<unk>", "<s>", "</s>")
    order = [*names, *(f"<0x{b:02X}>" for b in range(256)), *tokens]
    mark, first = "\u2581", kind == "metaspace"
    space = {"type": "Metaspace", "replacement": mark, "prepend_scheme": "always" if first else "first", "split": first}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    steps = [
        {"type": "Replace", "pattern": {"String": mark}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    content = _whole(
        added_tokens=[added(name, i) for i, name in enumerate(names)],
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": mark}, replace]}
        if kind == "llama2"
        else None,
        pre_tokenizer=None if kind == "llama2" else space,
        post_processor=None if first else template,
        decoder=space if first else {"type": "Sequence", "decoders": steps},
        model={
            **BPE,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": not first,
            "vocab": {token: i for i, token in enumerate(order)},
            "merges": [" ".join(pair) for pair in merges],
        },
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    if kind == "mistral":
        config |= {"add_bos_token": True, "add_eos_token": False}
    return content, config, {"config.json": {"bos_token_id": 1, "eos_token_id": 2}}


SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x250, 0x370), (0x370, 0x400), (0x400, 0x530), (0x530, 0x700), (0x700, 0x900),
    (0x900, 0xE00), (0xE00, 0x1000), (0x1000, 0x1400), (0x1400, 0x1E00), (0x1E00, 0x2000), (0x2000, 0x2C00),
    (0x2C00, 0x3000), (0x3000, 0x3400), (0x3400, 0xA000), (0xA000, 0xAC00), (0xAC00, 0xD7FC), (0xE000, 0x10000),
    (0x10000, 0x13000), (0x13000, 0x18000), (0x18000, 0x1D000), (0x1D000, 0x20000), (0x20000, 0x32000),
    (0x32000, 0x110000),
)  # fmt: skip
"""Ranges of code points, a few scripts each, so that every script is drawn as often."""
MARKS = "\u0300\u0301\u0308\u0327\u0345\u05b0\u064b\u093c\u094d\u1100\u1161\u11a8\u3099\ufe0f\u200d\u200c\u20e3"
EMOJI = "🙂🧑🏽🚀👩\u200d👩\u200d👧🇩🇪🏴\U000e0067\U000e007f❤\ufe0f1\ufe0f\u20e3"
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u3000\u2581"


def fuzzed(count: int, seed: int, special: tuple[str, ...]) -> Iterator[str]:
    """Random texts: every script, marks, emoji, control characters, invalid bytes, special tokens' spellings, runs."""
    chance = random.Random(seed)
    words = TEXT.split(" ")

    def part() -> str:
        match chance.randrange(10):
            case 0 | 1:
                return " ".join(chance.choices(words, k=chance.randint(1, 6)))
            case 2 | 3:
                low, high = chance.choice(SCRIPTS)
                return "".join(chr(chance.randrange(low, high)) for _ in range(chance.randint(1, 8)))
            case 4:
                bases = chance.choices("aeoucnsAE가か", k=chance.randint(1, 4))
                return "".join(base + chance.choice(MARKS) for base in bases)
            case 5:
                return "".join(chance.choices(EMOJI, k=chance.randint(1, 6)))
            case 6:
                return "".join(chance.choices(SPACES, k=chance.randint(1, 5)))
            case 7:
                raw = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
                return raw.decode("utf-8", errors="replace") + chr(chance.randrange(32))
            case 8:
                token = chance.choice(special)
                return chance.choice([token, token, token[1:], token[:-1], f" {token} "])
            case _:
                character = chance.choice(" \n\ta0=.!é中🙂\u0301\u2581" + chr(chance.randrange(0x20, 0xD800)))
                return character * chance.choice([2, 3, 7, 40, 300])

    for _ in range(count):
        yield "".join(part() for _ in range(chance.randint(0, 5)))
