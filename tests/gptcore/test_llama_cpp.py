"""llama.cpp reads an exported file: it gives the same ids for a text, and the same greedy text in fp32."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from gptcore.config import ModelConfig, RopeScaling
from gptcore.export import export
from gptcore.hf_tokenizer import LINE_SPLITTERS
from gptcore.model import GPT
from gptcore.package import save_package
from gptcore.parameters import SamplingParams
from gptcore.sampling import generate_text
from gptcore.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from tests.conftest import SHARED
from tests.gptcore.conftest import CONFIGS
from tests.llama_cpp import LlamaCpp
from tests.open_tokenizers import BYTE_LEVEL, QWEN_RANKS, TEXT, fuzzed, split, write_tokenizer

TEXTS, NEW = 1000, 36
NFC = normalizers.NFC().normalize_str
SHAPE: dict[str, Any] = dict(hidden_size=64, num_layers=2, num_heads=4, context_length=64)
KINDS = ("bytes", "bpe", "gpt2", "qwen3", "llama3", "smollm2", "llama2", "mistral")
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": {**BYTE_LEVEL, "use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    },
    "dbrx": {"type": "Sequence", "pretokenizers": [split(LINE_SPLITTERS[1]), BYTE_LEVEL]},
}


@pytest.fixture
def tokenizer_of(tmp_path: Path, learn: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Tokenizer]:
    """A tokenizer of this kind; skips one whose vocabulary is not beside the checkout."""

    def make(kind: str) -> Tokenizer:
        if kind in ("gpt2", "qwen3") and not QWEN_RANKS.exists():
            pytest.skip("published vocabularies are not beside the checkout")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
        if kind == "bpe":
            return learn(400, TEXT * 4)
        return (
            load_tokenizer(kind)
            if kind in ("bytes", "gpt2")
            else read_tokenizer(write_tokenizer(kind, tmp_path / kind))
        )

    return make


def export_random(tokenizer: Tokenizer, config: ModelConfig, folder: Path, make: Callable) -> tuple[GPT, Path]:
    """A network of random weights, and the file of it."""
    model = make(config)
    package = save_package(folder / "package", config, model.state_dict(), tokenizer, {})
    return model, export(package, folder / "model.gguf", "f32").file


def check_ids(tokenizer: Tokenizer, folder: Path, make: Callable, as_theirs: Callable[[str], str] = str) -> None:
    """Fails for a text that llama.cpp encodes otherwise; `as_theirs` is what it must be given for the same ids."""
    config = ModelConfig(family="llama", vocab_size=tokenizer.vocab_size + 3, tie_embeddings=True, **SHAPE)
    _, file = export_random(tokenizer, config, folder, make)
    special = tuple(map(tokenizer.spelling, sorted(tokenizer.special)))
    with LlamaCpp(file) as theirs:
        for text in fuzzed(TEXTS, 1, special):
            if text and not as_theirs(text):  # a single space, which gets another one there
                continue
            assert theirs.encode(as_theirs(text)) == tokenizer.encode(text), text
            assert theirs.encode(as_theirs(text), begin=True) == [*tokenizer.bos, *tokenizer.encode(text)], text


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_texts_have_the_same_ids(
    kind: str, tokenizer_of: Callable, tmp_path: Path, random_model: Callable
) -> None:
    as_theirs: dict[str, Callable[[str], str]] = {
        "qwen3": NFC,
        "mistral": lambda text: text[1:] if text[:1] in (" ", "\u2581") else text,  # they put a space before it
    }
    check_ids(tokenizer_of(kind), tmp_path, random_model, as_theirs.get(kind, str))


@pytest.mark.slow
@pytest.mark.parametrize("pre", SPLITS)
def test_a_large_vocabulary_is_split_alike(
    pre: str, tokenizer_of: Callable, tmp_path: Path, random_model: Callable
) -> None:
    tokenizer_of("qwen3")
    file = tmp_path / "qwen3" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": None, "pre_tokenizer": SPLITS[pre]}))
    check_ids(read_tokenizer(file.parent), tmp_path, random_model)


def scaled(kind: str, **changes: Any) -> RopeScaling:
    return replace(RopeScaling(kind, 4.0, original_context=16), **changes)


NETWORKS = CONFIGS | {
    "qwen3-linear": ModelConfig(family="qwen3", vocab_size=257, rope_scaling=scaled("linear"), **SHAPE),
    "llama-linear": ModelConfig(family="llama", vocab_size=257, rope_scaling=scaled("linear"), **SHAPE),
    "mistral-llama3": ModelConfig(family="mistral", vocab_size=257, rope_scaling=scaled("llama3"), **SHAPE),
    "qwen2-yarn": ModelConfig(
        family="qwen2", vocab_size=257, rope_scaling=scaled("yarn", attention_factor=1.14), **SHAPE
    ),
    "llama-yarn": ModelConfig(
        family="llama",
        vocab_size=257,
        rope_scaling=scaled("yarn", factor=8.0, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0),
        **SHAPE,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_continues_a_text_alike(
    name: str, byte_tokenizer: Tokenizer, tmp_path: Path, random_model: Callable
) -> None:
    config = replace(NETWORKS[name], vocab_size=320)  # 63 rows without a token
    model, file = export_random(byte_tokenizer, config, tmp_path, random_model)
    prompt = "Once upon a time, there was"
    expected = generate_text(model, byte_tokenizer, prompt, SamplingParams(NEW, temperature=0.0))
    with LlamaCpp(file) as theirs:
        ids, _ = theirs.greedy(prompt, NEW)
    assert byte_tokenizer.decode(ids) == expected
    assert len(ids) == NEW


def test_weights_of_four_bits_still_make_a_model(
    byte_tokenizer: Tokenizer, tmp_path: Path, random_model: Callable
) -> None:
    model = random_model(CONFIGS["llama"])
    package = save_package(tmp_path / "package", CONFIGS["llama"], model.state_dict(), byte_tokenizer, {})
    for weights in ("bf16", "q8_0", "q4_0"):
        with LlamaCpp(export(package, tmp_path / f"{weights}.gguf", weights).file) as theirs:
            assert len(theirs.greedy("The cat", 8)[0]) == 8
