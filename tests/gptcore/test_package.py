"""A package arrives whole or not at all, and other people's folders open too."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore.config import ModelConfig
from gptcore.errors import PackageError
from gptcore.model import GPT
from gptcore.package import FORMAT_VERSION, Package, describe, open_package, save_package
from gptcore.tokenizer import Tokenizer, load_tokenizer

MakeModel = Callable[[ModelConfig], GPT]
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def edit(file: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_package_holds_the_published_files_and_a_manifest_of_them(package: Package) -> None:
    assert sorted(file.name for file in package.path.iterdir()) == sorted([*FILES, "foundry.json"])
    info = json.loads((package.path / "foundry.json").read_text())
    assert info["format"] == FORMAT_VERSION
    assert tuple(info["files"]) == FILES
    assert info["tokenizer"] == {"name": "bytes", "fingerprint": package.tokenizer.fingerprint}
    assert info["training"] == {"steps": 3}
    assert open_package(package.path).info == package.info == info


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_named(package: Package, name: str) -> None:
    data = bytearray((package.path / name).read_bytes())
    data[-2] ^= 1
    (package.path / name).write_bytes(data)
    with pytest.raises(PackageError, match=rf"{name} was altered"):
        open_package(package.path)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(package: Package, name: str) -> None:
    data = (package.path / name).read_bytes()
    (package.path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(PackageError, match=rf"{name} was altered or cut short"):
        open_package(package.path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(package: Package, name: str) -> None:
    (package.path / name).unlink()
    with pytest.raises(PackageError, match=rf"{name} is missing"):
        open_package(package.path, verify=False)


def test_truncated_weights_are_refused_even_unverified(package: Package) -> None:
    data = (package.path / "model.safetensors").read_bytes()
    (package.path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(PackageError, match=r"model\.safetensors cannot be used"):
        open_package(package.path, verify=False).load_model()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2}', "format 2; this version reads format 1"),
        ("{}", "format None"),
        ('{"format": 1}', "incomplete"),
        ('{"format": 1, "files": {}, "tokenizer": "gpt2"}', "incomplete"),
        ('{"format": 1', "unreadable"),
        ("[]", "expected a JSON object"),
    ],
)
def test_an_unknown_or_broken_manifest_is_refused(package: Package, content: str, message: str) -> None:
    (package.path / "foundry.json").write_text(content)
    with pytest.raises(PackageError, match=message):
        open_package(package.path)


def test_a_missing_folder_or_one_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no such folder"):
        open_package(tmp_path / "nowhere")
    with pytest.raises(PackageError, match=r"model\.safetensors is missing"):
        open_package(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(PackageError, match=r"is a pickle, .* not opened"):
        open_package(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PackageError, match="is invalid"):
        open_package(tmp_path)
    with pytest.raises(PackageError, match="not a folder"):
        open_package(tmp_path / "pytorch_model.bin")


def test_a_tokenizer_larger_than_the_model_is_refused_on_saving_and_on_opening(
    package: Package, random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small = replace(package.config, vocab_size=256)
    with pytest.raises(PackageError, match="tokenizer bytes has 257 tokens, the model only 256"):
        save_package(tmp_path / "small", small, random_model(small).state_dict(), byte_tokenizer, {})
    assert not (tmp_path / "small").exists()
    (package.path / "foundry.json").unlink()
    edit(package.path / "config.json", vocab_size=256)
    with pytest.raises(PackageError, match=r"vocabulary of .* does not match"):
        open_package(package.path)


def test_another_tokenizer_of_the_same_size_is_refused(package: Package) -> None:
    edit(package.path / "foundry.json", tokenizer={"name": "bytes", "fingerprint": "0" * 64})
    with pytest.raises(PackageError, match="not the one that the model was trained with"):
        open_package(package.path, verify=False)


def test_weights_of_another_shape_are_refused(package: Package, random_model: MakeModel) -> None:
    config, tokenizer = package.config, package.tokenizer
    state = random_model(config).state_dict()
    with pytest.raises(PackageError, match=r"embed_tokens\.weight has shape \(320, 64\); the config says \(384, 64\)"):
        save_package(package.path, replace(config, vocab_size=384), state, tokenizer, {})
    del state["layers.1.mlp.up_proj.weight"]
    with pytest.raises(PackageError, match=r"lack layers\.1\.mlp\.up_proj\.weight"):
        save_package(package.path, config, state, tokenizer, {})
    (package.path / "foundry.json").unlink()
    edit(package.path / "config.json", intermediate_size=128)
    with pytest.raises(PackageError, match=r"mlp\.up_proj\.weight has shape \(192, 64\), expected \(128, 64\)"):
        open_package(package.path).load_model()


def test_a_missing_or_unknown_tensor_is_named(package: Package) -> None:
    (package.path / "foundry.json").unlink()
    weights = package.path / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "model.adapter.weight": torch.zeros(2)}, weights)
    with pytest.raises(PackageError, match=r"no place for the tensor model\.adapter\.weight"):
        open_package(package.path).load_model()
    del tensors["model.norm.weight"]
    save_file(tensors, weights)
    with pytest.raises(PackageError, match=r"the tensor model\.norm\.weight is missing"):
        open_package(package.path).load_model()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "'gemma' is not one of gpt2, qwen3, qwen2, llama, mistral"),
        ({"model_type": "llama"}, r"no place for the tensor model\.layers\.0\.self_attn\.k_norm\.weight"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        (
            {"num_hidden_layers": "two"},
            r"config\.json: num_hidden_layers is 'two'; expected a whole number",
        ),
    ],
)
def test_a_network_of_another_kind_is_refused(package: Package, changes: dict, message: str) -> None:
    (package.path / "foundry.json").unlink()
    edit(package.path / "config.json", **changes)
    with pytest.raises(PackageError, match=message):
        open_package(package.path)


@pytest.fixture
def gpt2_package(tmp_path: Path, random_model: MakeModel, byte_tokenizer: Tokenizer) -> Package:
    config = ModelConfig(vocab_size=257, family="gpt2", hidden_size=64, num_layers=2, context_length=32)
    return save_package(tmp_path / "gpt2", config, random_model(config).state_dict(), byte_tokenizer, {})


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_openais_published_gpt2_opens(gpt2_package: Package, prefix: str) -> None:
    expected = gpt2_package.load_model().state_dict()
    weights = gpt2_package.path / "model.safetensors"
    tensors = {prefix + name.removeprefix("transformer."): t for name, t in load_file(weights).items()}
    for layer in range(2):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, weights)
    for name in ("foundry.json", "generation_config.json", "tokenizer_config.json", "README.md"):
        (gpt2_package.path / name).unlink()
    edit(gpt2_package.path / "config.json", tie_word_embeddings=None, n_inner=None, qkv_bias=None, torch_dtype=None)
    package = open_package(gpt2_package.path)
    assert package.info == {}
    assert package.config == gpt2_package.config
    actual = package.load_model().state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_model_without_qkv_bias_is_published_with_zeros_and_says_so(
    random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = ModelConfig(vocab_size=257, family="gpt2", hidden_size=64, num_layers=1, qkv_bias=False)
    package = save_package(tmp_path / "p", config, random_model(config).state_dict(), byte_tokenizer, {})
    assert not load_file(package.path / "model.safetensors")["transformer.h.0.attn.c_attn.bias"].any()
    assert json.loads((package.path / "config.json").read_text())["qkv_bias"] is False
    assert package.config == config


def test_saving_again_replaces_the_package_and_leaves_no_other_files(package: Package, random_model: MakeModel) -> None:
    model = random_model(package.config)
    save_package(package.path, package.config, model.state_dict(), package.tokenizer, {"steps": 4})
    again = open_package(package.path)
    assert again.info["training"] == {"steps": 4}
    assert torch.equal(again.load_model().embed_tokens.weight, model.embed_tokens.weight)
    assert [p.name for p in package.path.parent.iterdir()] == [package.path.name]


def test_a_folder_with_other_things_in_it_is_not_replaced(package: Package, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("mine")
    state = package.load_model().state_dict()
    with pytest.raises(PackageError, match="is not a model package"):
        save_package(tmp_path / "thesis", package.config, state, package.tokenizer, {})
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "mine"


def test_a_full_disk_keeps_the_earlier_package_and_names_the_folder(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    state = package.load_model().state_dict()
    monkeypatch.setattr("gptcore.package.write_tensors", full)
    with pytest.raises(PackageError, match=rf"{package.path} cannot be written: .*No space left"):
        save_package(package.path, package.config, state, package.tokenizer, {})
    assert open_package(package.path).info["training"] == {"steps": 3}
    assert [p.name for p in package.path.parent.iterdir()] == [package.path.name]


def test_weights_with_gradients_or_in_half_precision_are_saved(package: Package) -> None:
    parameters = dict(package.load_model().bfloat16().named_parameters())
    saved = save_package(package.path, package.config, parameters, package.tokenizer, {})
    assert load_file(saved.path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((saved.path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert saved.load_model().norm.weight.dtype == torch.float32


def test_padding_rows_of_the_vocabulary_are_never_generated_by_transformers(package: Package) -> None:
    settings = json.loads((package.path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 256
    assert settings["suppress_tokens"] == list(range(257, 320))


def test_the_description_names_the_shape_the_tokenizer_and_the_training(package: Package) -> None:
    trained = replace(package, info={"training": {"bits_per_byte": 2.71828, "steps": 12, "curve": [1, 2]}})
    text = describe(trained)
    for part in ("qwen3, 0.2 M parameters", "4 heads (2 for keys and values)", "bytes: 257", "per byte: 2.718"):
        assert part in text
    assert "curve" not in text
    assert describe(package).splitlines()[0] in (package.path / "README.md").read_text()


def test_the_package_contains_gpt2s_vocabulary(gpt2_cache: Path, random_model: MakeModel, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    config = ModelConfig(vocab_size=50304, hidden_size=32, num_layers=1, num_heads=2, context_length=16)
    package = save_package(tmp_path / "p", config, random_model(config).state_dict(), tokenizer, {})
    assert package.tokenizer.name == "gpt2"
    assert package.tokenizer.fingerprint == tokenizer.fingerprint
