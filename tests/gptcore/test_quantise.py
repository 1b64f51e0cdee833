"""`python -m gptcore.quantise` writes a package of 8 or 4 bits, which does what quantising at load does."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptcore import generate, inspect
from gptcore import package as packages
from gptcore.calibration import error_of, improved, input_squares
from gptcore.config import Lora, ModelConfig
from gptcore.engine import EngineSettings
from gptcore.engine.native import load_library, quantise
from gptcore.engine.runners import make_runner
from gptcore.engine.vllm_engine import _without_spare_rows
from gptcore.errors import ConfigError, PackageError
from gptcore.export import export
from gptcore.hf_format import count_parameters
from gptcore.lora import Merged
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.quantise import main, quantise_package
from gptcore.quantised import GROUP, Quantised, from_stored, to_stored
from gptcore.tokenizer import Tokenizer
from tests.gptcore.conftest import CONFIGS, SHAPE
from tests.gptcore.engine.test_native import at_once
from tests.gptcore.test_package import edit
from tests.refusals import one_error

WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4"])
CPU = EngineSettings(device="cpu", slots=1, dtype="float32", threads=1)
TEXT = "".join(f"{n} green bottles hanging on the wall, take {n % 7} down.\n" for n in range(30))

Saved = Callable[..., Package]


@pytest.fixture
def saved(tmp_path: Path, random_model: Callable[[ModelConfig], GPT], byte_tokenizer: Tokenizer) -> Saved:
    """A package of random weights of this shape."""

    def save(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Package:
        state = random_model(config).to(dtype).state_dict()
        return save_package(tmp_path / "package", config, state, byte_tokenizer, {"bits_per_byte": 2.5})

    return save


@pytest.fixture
def small(package: Package, tmp_path: Path) -> Package:
    """The fixture `package` in int4."""
    return quantise_package(package, tmp_path / "small", "int4")


def logits(package: Package, weights: str = "") -> torch.Tensor:
    """Those of the native kernel, for forty tokens."""
    return at_once(make_runner(package, replace(CPU, backend="native", weights=weights)), 0, list(range(40)))


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_stored_package_gives_the_logits_of_quantising_at_load(
    config: ModelConfig, weights: str, dtype: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    package = saved(config, dtype)
    made = quantise_package(package, tmp_path / "small", weights)
    assert open_package(made.path).weights == weights  # with its checksums
    assert torch.equal(logits(made), logits(package, weights))
    assert torch.equal(logits(made, weights), logits(package, weights))


def test_the_command_line_writes_a_package_that_continues_the_same_text(
    package: Package, tmp_path: Path, capsys: Any
) -> None:
    assert main([str(package.path), str(tmp_path / "small"), "--weights", "int4"]) == 0
    assert f"wrote {tmp_path / 'small'}: 0.2 MB of weights, int4" in capsys.readouterr().out
    sampling = ["--prompt=ab", "--max-new-tokens=9", "--seed=8"]
    assert generate.main([str(tmp_path / "small"), *sampling]) == 0
    text = capsys.readouterr().out
    assert generate.main([str(package.path), *sampling, "--weights=int4"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4", 4.5)])
def test_matrices_take_a_quarter_or_an_eighth_and_their_scales(
    weights: str, bits: float, saved: Saved, tmp_path: Path
) -> None:
    package = saved(replace(CONFIGS["qwen3"], vocab_size=257, hidden_size=256, num_layers=4))
    made = quantise_package(package, tmp_path / "small", weights)
    tensors = load_file(made.path / "model.safetensors")
    layers = {name: tensor for name, tensor in tensors.items() if "_proj" in name}
    matrices = sum(tensor.numel() for name, tensor in package.parameters() if "_proj" in name)
    assert sum(tensor.nbytes for tensor in layers.values()) == matrices * bits / 8
    whole = (made.path / "model.safetensors").stat().st_size
    assert whole < 4 * count_parameters(package.config) * (bits / 32 + 0.1)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32  # it is looked up, not multiplied with


def test_foundry_json_has_the_scheme_and_the_training_summary(package: Package, small: Package) -> None:
    scheme = {"scheme": "int4", "bits": 4, "head_bits": 8, "group_size": 32, "chosen_by": "weights"}
    assert small.info["weights"] == scheme
    assert small.info["training"] == package.info["training"]
    assert "weights: int4 in groups of 32" in packages.describe(small)
    card = (small.path / "README.md").read_text()
    assert "library_name: gptcore" in card
    assert "Its int4 weights are read by gptcore only." in card
    assert "AutoModel" not in card
    assert "weights in int4" in inspect.served_here(small)


@WEIGHTS
def test_everything_else_opens_what_the_stored_weights_stand_for(
    config: ModelConfig, weights: str, saved: Saved, tmp_path: Path
) -> None:
    package = saved(config)
    made = quantise_package(package, tmp_path / "small", weights)
    stored, whole = dict(made.stored_parameters()), dict(made.parameters(dtype=None))
    exact = dict(package.parameters())
    assert whole.keys() == stored.keys() == exact.keys()
    for name, value in made.load_model().named_parameters():
        assert torch.equal(value, whole[name])
        if isinstance(matrix := stored[name], Quantised):
            assert torch.equal(matrix.dequantised(), value)
            most = {"int8": 0.01, "int4": 0.12}[weights]
            assert (value - exact[name]).norm() < most * exact[name].norm()
        else:
            assert torch.equal(value, exact[name])
    assert sum(isinstance(value, Quantised) for value in stored.values()) > 6 * config.num_layers - 1
    assert all(torch.equal(value, whole[name]) for name, value in Merged(made, {}, Lora(1, 1.0)).items())
    export(made, tmp_path / "model.gguf")
    with _without_spare_rows(made, torch.float32) as folder:
        assert open_package(folder).weights == ""


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_transformers_says_why_it_does_not_open_the_weights(family: str, saved: Saved, tmp_path: Path) -> None:
    made = quantise_package(saved(CONFIGS[family]), tmp_path / "small", "int8")
    assert AutoTokenizer.from_pretrained(made.path)("ab")["input_ids"] == made.tokenizer.encode("ab")
    with pytest.raises(ValueError, match=f"`{family} in GPT Foundry's int8, which only gptcore opens`"):
        AutoModelForCausalLM.from_pretrained(made.path)
    own = {"gpt2": transformers.GPT2LMHeadModel, "qwen3": transformers.Qwen3ForCausalLM}[family]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # it never takes integers for weights
        own.from_pretrained(made.path)


def test_other_weights_than_the_stored_ones_are_refused(small: Package, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights is 'int8', but the package .*small stores int4; leave out"):
        make_runner(small, replace(CPU, weights="int8"))
    assert generate.main([str(small.path), "--weights", "int8"]) == 2
    assert "stores int4" in one_error(capsys.readouterr().err)


def test_on_torch_a_stored_package_runs_as_what_it_stands_for(small: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(small, replace(CPU, backend="torch"))
    with torch.inference_mode():
        expected = small.load_model()(torch.arange(40)[None])[0]
    torch.testing.assert_close(at_once(runner, 0, list(range(40))), expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    runner = make_runner(small, CPU)
    load_library.cache_clear()
    assert (runner.weights, "not native: CXX is" in runner.note) == ("", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT"], "required: --weights"),
        (["OUT", "--weights", "int3"], "--weights is 'int3'; expected int8 or int4. Did you mean"),
        (["OUT", "--weights", "int4", "--txt", "a"], "unrecognized arguments: --txt a. Did you mean '--text'?"),
        (["PACKAGE", "--weights", "int4"], "package exists; choose another folder"),
        (["nowhere/OUT", "--weights", "int4"], "OUT cannot be written: there is no folder nowhere"),
        (["OUT", "--weights", "int8", "--text", "TEXT"], "--text chooses values of int4, but --weights is int8"),
        (["OUT", "--weights", "int4", "--text", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["OUT", "--weights", "int4", "--text", "EMPTY"], "empty.txt is empty"),
        (["OUT", "--weights", "int4", "--text", "SHORT"], "the text has 9 tokens; expected at least 256"),
        (["OUT", "--weights", "int4", "--text", "BINARY"], "binary.txt is not UTF-8"),
    ],
)
def test_bad_arguments_write_nothing(
    package: Package, tmp_path: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    files = {"TEXT": TEXT.encode(), "EMPTY": b" \n", "SHORT": b"too short", "BINARY": b"\xff\xfe\0"}
    given = {name: tmp_path / f"{name.lower()}.txt" for name in files}
    for name, content in files.items():
        given[name].write_bytes(content)
    places = {**given, "OUT": tmp_path / "out", "PACKAGE": package.path}
    before = sorted(tmp_path.rglob("*"))
    assert main([str(package.path), *(str(places.get(argument, argument)) for argument in arguments)]) == 2
    assert message in one_error(capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_that_is_quantised_is_not_quantised_again(small: Package, tmp_path: Path, capsys: Any) -> None:
    assert main([str(small.path), str(tmp_path / "out"), "--weights", "int8"]) == 2
    assert "small stores int4 already; take the package that it was made from" in one_error(capsys.readouterr().err)


def test_rows_that_are_no_whole_number_of_groups_are_refused(saved: Saved, tmp_path: Path, capsys: Any) -> None:
    package = saved(ModelConfig(family="qwen3", **{**SHAPE, "hidden_size": 80}))
    assert main([str(package.path), str(tmp_path / "out"), "--weights", "int4"]) == 2
    message = "model.layers.0.self_attn.q_proj.weight has 80 inputs; quantised weights need a multiple of 32"
    assert message in one_error(capsys.readouterr().err)
    assert {entry.name for entry in tmp_path.iterdir()} == {"package"}


def test_weights_that_are_not_finite_write_nothing(package: Package, tmp_path: Path, capsys: Any) -> None:
    state = package.load_model().state_dict()
    state["layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    broken = save_package(tmp_path / "broken", package.config, state, package.tokenizer, {})
    assert main([str(broken.path), str(tmp_path / "out"), "--weights", "int4"]) == 2
    assert "up_proj.weight contains values that are not finite" in one_error(capsys.readouterr().err)
    assert {entry.name for entry in tmp_path.iterdir()} == {"package", "broken"}


def test_a_full_disk_writes_nothing(package: Package, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packages, "save_tokenizer", full)
    assert main([str(package.path), str(tmp_path / "out"), "--weights", "int4"]) == 2
    assert "No space left" in one_error(capsys.readouterr().err)
    assert {entry.name for entry in tmp_path.iterdir()} == {"package"}


def test_without_a_compiler_the_error_says_so(package: Package, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    assert main([str(package.path), str(tmp_path / "out"), "--weights", "int4"]) == 2
    load_library.cache_clear()
    assert "CXX is 'no-such-compiler'" in one_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scheme", ["int4", {"scheme": "int4"}, {"scheme": "int4", "bits": 4, "group_size": 64}, None, {}]
)
def test_an_unknown_scheme_is_refused(small: Package, scheme: object) -> None:
    manifest = json.loads((small.path / "foundry.json").read_text())
    (small.path / "foundry.json").write_text(json.dumps({**manifest, "weights": scheme}))
    with pytest.raises(PackageError, match=r"foundry.json: weights is .*; expected \{'scheme': 'int8'"):
        open_package(small.path)


def test_the_scheme_that_does_not_fit_the_files_is_refused(small: Package) -> None:
    scheme = {"scheme": "int8", "bits": 8, "head_bits": 8, "group_size": 32}
    edit(small.path / "foundry.json", weights=scheme)
    with pytest.raises(PackageError, match=r"q_proj.weight has shape \(128, 2, 16\), expected \(128, 2, 32\)"):
        open_package(small.path)


def test_without_foundry_json_stored_weights_are_not_taken_for_others(small: Package) -> None:
    (small.path / "foundry.json").unlink()
    with pytest.raises(PackageError, match="qwen3 in GPT Foundry's int4, which only gptcore opens"):
        open_package(small.path)


def test_scales_that_are_not_finite_are_found(small: Package) -> None:
    file = small.path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.0.mlp.up_proj.weight_scales"][3, 1] = torch.nan
    save_file(tensors, file)
    opened = open_package(small.path, verify=False)
    for use in (opened.load_model, lambda: make_runner(opened, replace(CPU, backend="native"))):
        with pytest.raises(PackageError, match=r"up_proj\.weight contains values that are not finite"):
            use()


def test_the_layout_is_as_documented() -> None:
    values = torch.randint(-8, 8, (3, 2, 32), dtype=torch.int8)
    stored = to_stored(values, 4)
    assert (stored.shape, stored.dtype) == ((3, 2, 16), torch.uint8)
    assert int(stored[1, 1, 5]) == int(values[1, 1, 5]) + 8 + 16 * (int(values[1, 1, 21]) + 8)
    assert torch.equal(from_stored(stored), values)
    assert torch.equal(from_stored(to_stored(values, 8)), values)


def test_a_text_makes_no_group_worse_and_most_better(package: Package) -> None:
    squares = {name: values.clone() for name, values in input_squares(package, TEXT).items()}
    squares["model.layers.0.mlp.up_proj.weight"][:8] *= 100  # some inputs matter more
    for name, matrix in package.published_tensors():
        if "_proj" not in name:
            continue
        rounded = quantise(matrix, 4)
        chosen = improved(matrix, rounded, squares[name])
        x, h = matrix.unflatten(1, (-1, GROUP)), squares[name].view(-1, GROUP)
        before, after = (error_of(x, q.values, q.scales, h) for q in (rounded, chosen))
        assert (after <= before).all()
        assert after.sum() < 0.99 * before.sum()
        assert -8 <= chosen.values.min() <= chosen.values.max() <= 7


def test_groups_of_zeros_stay_zero() -> None:
    zeros = torch.zeros(64, 64)
    chosen = improved(zeros, quantise(zeros, 4), torch.ones(64))
    assert torch.equal(chosen.dequantised(), zeros)


def test_the_mean_squares_are_of_what_each_matrix_multiplies(package: Package) -> None:
    seen: list[torch.Tensor] = []
    squares, model = input_squares(package, TEXT[:300]), package.load_model()
    model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids, length = package.tokenizer.encode(TEXT[:300]), package.config.context_length - 1
    with torch.inference_mode():
        for start in range(0, len(ids), length):
            model(torch.tensor([[package.tokenizer.eot, *ids[start : start + length]]]))
    rows = torch.cat([part[0] for part in seen])
    expected = rows.square().sum(0) / len(ids)
    torch.testing.assert_close(squares["model.layers.1.mlp.down_proj.weight"], expected)


def test_a_text_writes_other_values_of_the_same_scheme(package: Package, small: Package, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [str(package.path), str(tmp_path / "aware"), "--weights=int4", f"--text={tmp_path / 'text.txt'}"]
    assert main(command) == 0
    made = open_package(tmp_path / "aware")
    assert (made.weights, made.info["weights"]["chosen_by"]) == ("int4", "activations")
    assert not torch.equal(logits(made), logits(small))
    first = (made.path / "model.safetensors").read_bytes()
    shutil.rmtree(made.path)
    assert main(command) == 0
    assert (made.path / "model.safetensors").read_bytes() == first
