"""A false package is refused by name or opens with the logits of transformers, quickly and without using memory."""

import contextlib
import json
import os
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptcore import package as packages
from gptcore.config import ModelConfig
from gptcore.documents import MOST_BYTES
from gptcore.engine import EngineSettings, runners
from gptcore.errors import NoMemory, PackageError
from gptcore.hf_format import count_parameters, empty_model, tensor_shapes, to_published
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.tokenizer import Tokenizer
from tests.gptcore.test_package import edit

MakeModel = Callable[[ModelConfig], GPT]


@pytest.fixture
def bare(package: Package) -> Path:
    """The folder of a qwen3 without foundry.json, as other tools write it."""
    (package.path / "foundry.json").unlink()
    return package.path


def refused(folder: Path, message: str) -> None:
    """Opening the folder raises PackageError with the message, before anything of size is made."""
    began = time.monotonic()
    with pytest.raises(PackageError, match=message):
        open_package(folder)
    assert time.monotonic() - began < 20  # modules of millions of layers take minutes


def change_json(file: Path, **changes: Any) -> None:
    """Sets keys, to null too."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_shapes_compared_with_a_header_are_the_published_ones(config: ModelConfig) -> None:
    published = dict(to_published(empty_model(config), GPT(config).state_dict()))
    assert dict(tensor_shapes(config)) == {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert count_parameters(config) == empty_model(config).num_parameters()


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**40, 1e9, 2.0, True, "2", None, [2], {}, float("nan")], ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    ],
)
def test_an_invalid_or_out_of_range_whole_number_is_named(bare: Path, key: str, value: Any) -> None:
    change_json(bare / "config.json", **{key: value})
    refused(bare, rf"config\.json.*{key}|is missing|has shape")


@pytest.mark.parametrize("value", [-1.0, 10**400, "1", True, None, [1.0], float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "attention_dropout", "rope_theta"])
def test_an_invalid_or_out_of_range_number_is_named(bare: Path, key: str, value: Any) -> None:
    change_json(bare / "config.json", **{key: value}, rope_parameters=None)
    refused(bare, rf"config\.json: {key} is ")


@pytest.mark.parametrize("value", ["false", 0, 1, None, []])
def test_a_switch_must_be_true_or_false(bare: Path, value: Any) -> None:
    change_json(bare / "config.json", tie_word_embeddings=value)
    refused(bare, r"config\.json: tie_word_embeddings is .*expected")


def test_a_context_of_a_billion_is_refused_before_its_tables_are_made(bare: Path) -> None:
    change_json(bare / "config.json", max_position_embeddings=10**9)
    refused(bare, "max_position_embeddings is 1000000000; expected a whole number from 1 to 16777216")


def test_a_context_too_large_for_memory_is_refused_with_the_figures(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(bare / "config.json", max_position_embeddings=2**22)
    package = open_package(bare)
    for module in (packages, runners):
        monkeypatch.setattr(module, "free_memory", lambda device: 2**30)
    with pytest.raises(NoMemory, match=r"needs 2,048 MiB .*for a context of 4,194,304 tokens\), but only 1,024 MiB"):
        package.load_model()
    with pytest.raises(NoMemory, match="for one slot of keys and values"):
        runners.make_runner(package, EngineSettings(device="cpu", max_context=2**22))


@pytest.mark.parametrize("layers", [3, 1000])
def test_layers_missing_from_the_weights_are_found_from_the_header(bare: Path, layers: int) -> None:
    change_json(bare / "config.json", num_hidden_layers=layers)
    refused(bare, rf"model\.layers\.2\.\S+ is missing: config\.json says {layers} layers, the weights have 2")


def test_millions_of_layers_are_refused(bare: Path) -> None:
    change_json(bare / "config.json", num_hidden_layers=3_000_000)
    refused(bare, "num_hidden_layers is 3000000; expected a whole number from 1 to 1024")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_not_floats_are_named(bare: Path, dtype: torch.dtype) -> None:
    tensors = load_file(bare / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, bare / "model.safetensors")
    refused(bare, r"model\.norm\.weight is of type \w+; expected one of F64, F32, F16, BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_weight_that_is_not_finite_is_found(bare: Path, value: float) -> None:
    tensors = load_file(bare / "model.safetensors")
    tensors["model.embed_tokens.weight"][77, 5] = value  # of a token that no warm-up runs
    save_file(tensors, bare / "model.safetensors")
    with pytest.raises(PackageError, match=r"model\.embed_tokens\.weight contains values that are not finite"):
        open_package(bare).load_model()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_theta": 500.0},
        {"rope_parameters": {}, "rope_theta": 500.0},
        {"layer_types": ["full_attention"] * 2},
    ],
    ids=str,
)
def test_rotary_embeddings_of_the_default_kind_load_as_in_transformers(bare: Path, changes: dict[str, Any]) -> None:
    change_json(bare / "config.json", **changes)
    theirs = AutoModelForCausalLM.from_pretrained(bare, dtype=torch.float32).eval()
    same_logits(open_package(bare).load_model(), theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; expected an object with rope_type, or null"),
        ({"rope_scaling": ["default"]}, r"rope_scaling is \['default'\]"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic' in rope_scaling; expected one of",
        ),
        ({"rope_scaling": {"rope_type": "llama"}}, "Did you mean 'llama3'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling lacks factor, which rope_type 'linear' needs"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
            "factor is '4'; expected a number .*, in rope_scaling",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "low_freq_factor is 4; expected less than high_freq_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": -1}},
            "original_max_position_embeddings is -1; expected a whole number",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "mscale": "1"}}, "mscale is '1' in rope_scaling"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window is missing, so 4096; only null"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8; only null"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True; only False"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True; only False"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"rope_scaling": {"rope_type": None}}, "rope_type is None"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; expected a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one setting per kind of layer"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"head_dim": 33}, "head_dim 33 is odd"),
        ({"model_type": ["qwen3"]}, r"model_type \['qwen3'\] is not one of"),
        ({"model_type": "x" * 10**6}, "model_type 'xxx.{,100}' is not one of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_network_features_are_refused_by_name(bare: Path, changes: dict[str, Any], message: str) -> None:
    change_json(bare / "config.json", **changes)
    refused(bare, message)


def same_logits(ours: GPT, theirs: Any) -> None:
    x = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_tied_head_that_is_stored_and_differs_is_used_as_transformers_does(
    random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path, family: str, equal: bool
) -> None:
    shape: dict[str, Any] = dict(vocab_size=257, hidden_size=32, num_layers=1, num_heads=2, context_length=32)
    config = ModelConfig(family=family, tie_embeddings=True, **shape)
    folder = save_package(tmp_path / "p", config, random_model(config).state_dict(), byte_tokenizer, {}).path
    (folder / "foundry.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if tensor.shape == (257, 32))
    tensors["lm_head.weight"] = embedding.clone() if equal else torch.randn(257, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    package = open_package(folder)
    assert package.config.tie_embeddings is equal
    same_logits(package.load_model(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


# --- Files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/b", "..", ".", "", "a\0b", "x" * 300, "a\\b"], ids=ascii)
def test_a_manifest_may_only_name_files_in_its_folder(package: Package, name: str) -> None:
    manifest = package.path / "foundry.json"
    edit(manifest, files={**json.loads(manifest.read_text())["files"], name: "0" * 64})
    refused(package.path, r"foundry\.json names the file .*expected plain names in the folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_manifest_without_a_required_file_is_incomplete(package: Package, name: str) -> None:
    files = json.loads((package.path / "foundry.json").read_text())["files"]
    del files[name]
    edit(package.path / "foundry.json", files=files)
    refused(package.path, rf"incomplete: it lacks the sha256 of {name}")


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "foundry.json"])
def test_a_pipe_or_a_device_is_refused_in_a_package(package: Package, name: str, manifest: bool) -> None:
    if not manifest:
        (package.path / "foundry.json").unlink()
        if name == "foundry.json":
            return
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (package.path / name).unlink()
        make(package.path / name)
        refused(package.path, rf"{name} is not a regular file|holds no tokenizer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "unreadable"),
        ('{"a":' * 100_000, "unreadable"),
        ('{"vocab_size": 1, "vocab_size": 320}', "has the key 'vocab_size' twice"),
        (b"\xff\xfe{}", "unreadable"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "unreadable"),
        (" " * (MOST_BYTES + 1), "expected at most"),
        ("", "unreadable"),
        ("null", "expected a JSON object"),
    ],
    ids=["deep list", "deep object", "key twice", "no UTF-8", "digits", "huge", "empty", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "foundry.json"])
def test_absurd_json_is_refused(package: Package, name: str, content: str | bytes, message: str) -> None:
    (package.path / "foundry.json").unlink()
    (package.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if message == "expected at most" and name == "tokenizer.json":
        message = "unreadable"  # it may be larger
    refused(package.path, message)


# --- At random ------------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "\ud800", [], [1], {}, {"a": 1}]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value; of long ones, the first and the last few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    keys = keys[:6] + keys[6:][-6:] if len(keys) > 40 else keys
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The JSON with one of its values replaced or left out, or one key doubled."""
    value = json.loads(data)
    container, key = chance.choice(places(value))
    if chance.random() < 0.15:
        del container[key]
    else:
        container[key] = chance.choice(ODD)
    return json.dumps(value).encode()


def mutate_weights(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header altered, or cut, or with a byte changed."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:
        return struct.pack("<Q", chance.choice([0, 1, length - 1, length + 1, 2**20, 2**63, 2**64 - 1])) + data[8:]
    if kind == 2:
        at = chance.randrange(len(header))
        header = header[:at] + bytes([chance.randrange(256)]) + header[at + 1 :]
    else:
        header = mutated(header, chance)
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_package_either_gives_the_same_logits_or_is_refused(package: Package, seed: int) -> None:
    chance = random.Random(seed)
    (package.path / "foundry.json").unlink()
    before = {file: file.read_bytes() for file in package.path.iterdir()}
    x = torch.randint(0, 257, (1, 8))
    expected = package.load_model()(x)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(8):
        name = chance.choice(["config.json", "tokenizer.json", "model.safetensors"])
        file = package.path / name
        file.write_bytes((mutate_weights if name.endswith("s") else mutated)(before[file], chance))
        with contextlib.suppress(PackageError, NoMemory):
            assert open_package(package.path).load_model()(x).shape == expected.shape
        file.write_bytes(before[file])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB
    assert torch.equal(open_package(package.path).load_model()(x), expected)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_listed_file_is_read_only_if_its_size_is_plausible(package: Package, name: str) -> None:
    """A sparse file of a terabyte is free to make and takes hours to hash."""
    manifest = json.loads((package.path / "foundry.json").read_text())
    manifest["files"][name] = "0" * 64
    change_json(package.path / "foundry.json", files=manifest["files"])
    with open(package.path / name, "ab") as file:
        file.truncate(1 << 40)
    refused(package.path, rf"{name} has 1,099,511,627,776 bytes; for this model it can have at most")


def test_a_broken_link_to_a_manifest_is_not_treated_as_no_manifest(package: Package) -> None:
    (package.path / "foundry.json").unlink()
    (package.path / "foundry.json").symlink_to("nowhere")
    refused(package.path, r"foundry\.json")


def test_a_name_of_a_weights_file_that_is_too_long_in_bytes_is_refused(bare: Path) -> None:
    (bare / "model.safetensors").rename(bare / "model-1.safetensors")
    index = {"weight_map": {"x": "é" * 200 + ".safetensors"}}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(bare, "plain name|model.safetensors.index.json")
