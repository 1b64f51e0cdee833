"""`python -m gptcore.export` writes what a package holds into a GGUF file, or refuses it by name and writes nothing."""

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gptcore import export as exporting
from gptcore.config import ModelConfig, RopeScaling
from gptcore.errors import ExportError
from gptcore.export import WEIGHTS, export, main
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.tokenizer import Tokenizer
from tests.gptcore.conftest import CONFIGS
from tests.open_tokenizers import BYTE_LEVEL, publish, split, write_tokenizer
from tests.refusals import one_error

Saved = Callable[[ModelConfig], Package]


@pytest.fixture
def saved(tmp_path: Path, random_model: Callable[[ModelConfig], GPT], byte_tokenizer: Tokenizer) -> Saved:
    """A package of random weights of this shape."""

    def save(config: ModelConfig) -> Package:
        return save_package(tmp_path / "package", config, random_model(config).state_dict(), byte_tokenizer, {})

    return save


def published(kind: str, folder: Path, **changes: Any) -> Package:
    """A small model with a tokenizer of this kind, whose tokenizer.json has these changes."""
    made = publish(write_tokenizer(kind, folder / "tokenizer"), folder / "package", 1024)
    file = made / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= changes.pop("model", {})
    file.write_text(json.dumps(content | changes))
    return open_package(made)


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Each tensor in fp32, rows of outputs."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def field(reader: gguf.GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return found.contents() if found else None


def test_the_file_says_what_the_model_is(package: Package, tmp_path: Path) -> None:
    made = export(package, tmp_path / "model.gguf", name="mine")
    reader = gguf.GGUFReader(made.file)
    expected = {
        "general.architecture": "qwen3",
        "general.name": "mine",
        "general.type": "model",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.license": None,
        "qwen3.context_length": 64,
        "qwen3.vocab_size": 320,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": None,
        "tokenizer.ggml.suppress_tokens": [*range(257, 320)],
    }
    assert {name: field(reader, name) for name in expected} == expected
    assert field(reader, "general.description").startswith("qwen3, 0.2 M parameters: 2 layers")
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert (tokens[ord("a")], tokens[256], tokens[319]) == ("a", "<|endoftext|>", "[PAD319]")
    assert types == [*[gguf.TokenType.NORMAL] * 256, gguf.TokenType.CONTROL, *[gguf.TokenType.UNUSED] * 63]


def test_the_weights_are_the_packages(config: ModelConfig, saved: Saved, tmp_path: Path) -> None:
    package = saved(config)
    found = values(gguf.GGUFReader(export(package, tmp_path / "model.gguf", "f32").file))
    state = {name: tensor.numpy() for name, tensor in package.parameters()}
    np.testing.assert_array_equal(found["token_embd.weight"], state["embed_tokens.weight"])
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], state["layers.1.mlp.down_proj.weight"])
    q, k, v = (state[f"layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    if config.family == "gpt2":
        np.testing.assert_array_equal(found["position_embd.weight"], state["embed_positions.weight"])
        np.testing.assert_array_equal(found["blk.1.attn_qkv.weight"], np.concatenate([q, k, v]))
    else:
        np.testing.assert_array_equal(found["blk.1.attn_v.weight"], v)
        pairs = [*range(config.head_size)]
        if config.family in ("llama", "mistral"):  # the two of a pair side by side
            pairs = [i // 2 + i % 2 * (config.head_size // 2) for i in pairs]
        heads = q.reshape(config.num_heads, config.head_size, -1)
        np.testing.assert_array_equal(found["blk.1.attn_q.weight"], heads[:, pairs].reshape(q.shape))
    assert ("output.weight" in found) != config.tie_embeddings
    scaled = {"rope_freqs.weight"} if config.rope_scaling else set()
    assert sum(found[name].size for name in {*found} - scaled) == sum(tensor.size for tensor in state.values())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_matrices_are_in_the_type_that_is_asked_for(weights: str, saved: Saved, tmp_path: Path) -> None:
    package = saved(replace(CONFIGS["qwen3-tied"], intermediate_size=100))
    exact = values(gguf.GGUFReader(export(package, tmp_path / "exact.gguf", "f32").file))
    reader = gguf.GGUFReader(export(package, tmp_path / "model.gguf", weights).file)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    blocks = weights in ("q8_0", "q4_0")
    assert kinds["blk.0.attn_q.weight"] == weights
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "f32"
    assert kinds["token_embd.weight"] == ("q8_0" if blocks else weights)  # it is the head as well
    assert kinds["blk.0.ffn_down.weight"] == ("bf16" if blocks else weights)  # rows of 100 are no blocks of 32
    least = {"f32": 0.0, "bf16": 2**-8, "q8_0": 0.01, "q4_0": 0.15}[weights]
    for name, tensor in values(reader).items():
        assert np.abs(tensor - exact[name]).max() <= least * np.abs(exact[name]).max()


def test_the_modelfile_is_ollamas_and_a_changed_one_is_kept(package: Package, tmp_path: Path, capsys: Any) -> None:
    assert main([str(package.path), str(tmp_path / "model.gguf")]) == 0
    file = tmp_path / "model.Modelfile"
    assert file.read_text() == 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 64\n'
    assert "ollama create model -f" in capsys.readouterr().out
    file.write_text("FROM ./model.gguf\nPARAMETER temperature 0.5\n")
    assert main([str(package.path), str(tmp_path / "model.gguf"), "--weights", "q8_0"]) == 0
    assert f"kept {file}, which was there" in capsys.readouterr().out
    assert "temperature" in file.read_text()


def test_a_chat_template_and_all_ends_of_a_text_are_in_the_file(tmp_path: Path, capsys: Any) -> None:
    package = published("llama3", tmp_path)
    (package.path / "chat_template.jinja").write_text("{{ messages }}")
    assert main([str(package.path), str(tmp_path / "model.gguf")]) == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert field(reader, "tokenizer.chat_template") == "{{ messages }}"
    names = [
        f"tokenizer.ggml.{name}" for name in ("pre", "bos_token_id", "add_bos_token", "eos_token_id", "eot_token_id")
    ]
    assert [field(reader, name) for name in names] == ["llama-bpe", 1000, True, 1004, 1001]
    assert "TEMPLATE" not in (tmp_path / "model.Modelfile").read_text()
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'model.gguf'}")


@pytest.mark.parametrize(
    ("model", "name"), [("hf:Qwen/Qwen3-0.6B", "Qwen3-0.6B"), ("models:/gpt@champion", "gpt"), ("runs/x", "package")]
)
def test_the_name_in_the_file_is_the_models(package: Package, model: str, name: str) -> None:
    assert exporting._name(model, package) == name


YARN = RopeScaling("yarn", 4.0, original_context=16, attention_factor=1.2)
SHAPE: dict[str, Any] = dict(vocab_size=257, hidden_size=64, num_layers=1, num_heads=4, context_length=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(family="qwen3", rope_scaling=RopeScaling("llama3", 8.0, 16)), "no RoPE scaling llama3 for qwen3"),
        (dict(family="llama", rope_scaling=replace(YARN, truncate=False)), "truncate is false"),
        (dict(family="llama", rope_scaling=replace(YARN, factor=0.5)), "yarn only stretches; .* is 0.5"),
        (dict(family="qwen2", head_dim=32), "hidden_size / num_heads features, 16; head_dim is 32"),
    ],
)
def test_a_network_that_llama_cpp_lacks_is_refused(
    changes: dict[str, Any], message: str, saved: Saved, tmp_path: Path, capsys: Any
) -> None:
    package = saved(ModelConfig(**SHAPE, **changes))
    assert main([str(package.path), str(tmp_path / "model.gguf")]) == 2
    assert re.search(message, one_error(capsys.readouterr().err))
    assert not [*tmp_path.glob("model.*"), *tmp_path.glob(".draft*")]


SPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
HALVES = {"type": "Sequence", "pretokenizers": [split(r"\d"), BYTE_LEVEL]}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("smollm2", {"pre_tokenizer": HALVES}, r"llama.cpp has no split like this tokenizer's, .*expected GPT-2's"),
        ("smollm2", {"model": {"ignore_merges": True}}, "no split like this .*, with ignore_merges"),
        ("smollm2", {"normalizer": {"type": "Lowercase"}}, "cannot say that texts are normalised by .*'Lowercase'"),
        ("llama2", {"pre_tokenizer": SPACE}, "cannot say that texts are normalised by .* and split by .*'Metaspace'"),
        ("mistral", {"pre_tokenizer": SPACE}, "cannot say that texts are normalised by None and split by"),
        ("metaspace", {"pre_tokenizer": {**SPACE, "split": False}}, "a token for each byte; .* lacks <0x00>"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_express_is_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if kind == "metaspace":
        changes |= {"model": {"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "merges": []}}
    package = published(kind, tmp_path, **changes)
    with pytest.raises(ExportError, match=message) as caught:
        export(package, tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.glob("model.*"), *tmp_path.glob(".draft*")]


def test_merges_that_scores_cannot_order_are_refused(tmp_path: Path) -> None:
    merges = json.loads((write_tokenizer("llama2", tmp_path / "t") / "tokenizer.json").read_text())["model"]["merges"]
    token = next(
        m.replace(" ", "") for m in merges if [n.replace(" ", "") for n in merges].count(m.replace(" ", "")) > 1
    )
    first = next(m for m in merges if m.replace(" ", "") == token)
    for i, (changed, message) in enumerate(
        [
            ([m for m in merges if m != first], "would join .*, which is no merge"),
            ([*(m for m in merges if m != first), first], f"the merges into '{token}' do not follow each other"),
        ]
    ):
        package = published("llama2", tmp_path / str(i), model={"merges": changed})
        with pytest.raises(ExportError, match=message):
            export(package, tmp_path / "model.gguf")


def test_bad_arguments_are_one_error_and_write_nothing(package: Package, tmp_path: Path, capsys: Any) -> None:
    name, file = str(package.path), str(tmp_path / "model.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for argv, message in (
        (
            [name, file, "--weights", "q8"],
            "--weights is 'q8'; expected one of bf16, q8_0, q4_0, f32. Did you mean 'q8_0'?",
        ),
        ([name, file, "--weigths", "f32"], "Did you mean '--weights'?"),
        ([name, str(tmp_path / "model.bin")], "expected a name that ends with .gguf, such as"),
        ([name, str(tmp_path / "folder.gguf")], "folder.gguf is a folder; expected the name of a new file"),
        ([name, str(tmp_path / "no" / "model.gguf")], f"there is no folder {tmp_path / 'no'}"),
        (["no/such/folder", file], "there is no model 'no/such/folder'"),
    ):
        assert main(argv) == 2
        assert message in one_error(capsys.readouterr().err)
    assert {entry.name for entry in tmp_path.iterdir()} == {"package", "folder.gguf"}


def test_a_full_disk_keeps_the_earlier_file(package: Package, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"earlier")

    def full(self: Any, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert main([str(package.path), str(file)]) == 2
    assert "model.gguf cannot be written: No space left" in one_error(capsys.readouterr().err)
    assert {entry.name for entry in tmp_path.iterdir()} == {"package", "model.gguf"}
    assert file.read_bytes() == b"earlier"


def test_damaged_weights_write_nothing(package: Package, tmp_path: Path, capsys: Any) -> None:
    with torch.no_grad():
        model = package.load_model()
        model.norm.weight[0] = torch.nan
    broken = tmp_path / "broken"
    save_package(broken, package.config, model.state_dict(), package.tokenizer, {})
    assert main([str(broken), str(tmp_path / "model.gguf")]) == 2
    assert "not finite" in one_error(capsys.readouterr().err)
    shutil.rmtree(broken)
    assert {entry.name for entry in tmp_path.iterdir()} == {"package"}


def test_without_the_library_the_error_names_the_extra(package: Package, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"install the library gguf: .*'\.\[gguf\]'"):
        export(package, tmp_path / "model.gguf")
