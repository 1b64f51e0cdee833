"""With weights of 8 or 4 bits, the native kernel computes what its rounding says, bit for bit the same in any batch."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig
from gptcore.engine import native, runners
from gptcore.engine.engine import Engine
from gptcore.engine.interface import Chunk
from gptcore.engine.native import BITS, NativeRunner, packed_bytes
from gptcore.engine.runners import check_memory, make_runner
from gptcore.engine.settings import EngineSettings
from gptcore.errors import ConfigError, NoMemory
from gptcore.hf_format import count_parameters
from gptcore.model import GPT
from gptcore.package import Package
from tests.gptcore.engine.test_native import GPT2, QWEN3, at_once, compiled_with, random_model, some_tokens

CONFIGS = {
    "gpt2, tied": GPT2,
    "qwen3": QWEN3,
    "qwen3, tied": replace(QWEN3, num_layers=1, tie_embeddings=True),
}
VARIANTS = {"as built": (), "AVX2": ("-march=haswell",), "without AVX2": ("-march=x86-64",)}
WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4"])
GROUP = 32


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel, compiled for an older processor than this one."""
    yield from compiled_with(VARIANTS[request.param], request.param, monkeypatch)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def quantised(model: GPT, weights: str, slots: int = 2, threads: int = 2, dtype=torch.float32) -> NativeRunner:
    return NativeRunner(model.config, model.named_parameters(), slots, dtype, threads, weights=weights)


def in_groups(x: Tensor) -> Tensor:
    """(…, k) as (…, groups, 32), padded with zeros."""
    return F.pad(x, (0, -x.size(-1) % GROUP)).unflatten(-1, (-1, GROUP))


def rounded(x: Tensor) -> Tensor:
    """Activations (…, k) as the kernel rounds them: to 8 bits, in groups of 32."""
    groups = in_groups(x)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp(min=1e-30)).round() * scale).flatten(-2)[..., : x.size(-1)]


def on_a_grid(model: GPT, weights: str) -> GPT:
    """`model` with matrices that 8 or 4 bits hold exactly, and with activations rounded before each product."""
    layers, head = BITS[weights]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            most = 2 ** ((head if name == "lm_head" else layers) - 1) - 1
            groups = in_groups(module.weight.data)
            scale = 2.0 ** (groups.abs().amax(-1, keepdim=True) / most).log2().ceil()
            whole = (groups / scale).round().clamp(-most, most)
            whole[..., 0] = most if most == 127 else -most - 1
            module.weight.data.copy_((whole * scale).flatten(-2)[:, : module.weight.size(1)])
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    return model


@WEIGHTS
def test_weights_that_the_bits_hold_give_the_models_logits(config: ModelConfig, weights: str, variant: str) -> None:
    model, (tokens,) = on_a_grid(random_model(config), weights), some_tokens(config, 1, 70)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0]
    logits = at_once(quantised(model, weights), 1, tokens)
    error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.quantile(0.1) < 1e-5
    assert error.max() < 0.05  # where an activation between two whole numbers was rounded the other way


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.05), ("int4", 0.4)])
def test_other_weights_give_logits_near_the_models(config: ModelConfig, weights: str, most: float) -> None:
    model, (tokens,) = random_model(config), some_tokens(config, 1, 70)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]))[0]
    for dtype in (torch.float32, torch.bfloat16):
        logits = at_once(quantised(model, weights, dtype=dtype), 1, tokens)
        assert (logits - expected).norm() < most * expected.norm()


@WEIGHTS
def test_logits_are_bit_identical_however_tokens_are_batched(config: ModelConfig, weights: str, variant: str) -> None:
    model, texts = random_model(config), some_tokens(config, 17, 60)
    single = quantised(model, weights, slots=1, threads=1)
    alone = [at_once(single, 0, tokens) for tokens in texts]
    crowd = quantised(model, weights, slots=17)
    cuts = [5 + 3 * n % 40 for n in range(17)]  # every sequence is somewhere else
    crowd.forward([Chunk(n, 0, tokens[: cuts[n]], 0) for n, tokens in enumerate(texts)])
    for step, together in enumerate([17, 16, 7, 3, 2, 1]):
        places = [cuts[n] + step for n in range(17)]
        ran = [Chunk(n, places[n], texts[n][places[n] : places[n] + 1], 1) for n in range(17)]
        first = crowd.forward(ran[:together]).clone()
        for n, row in enumerate(torch.cat([first, crowd.forward(ran[together:])]) if together < 17 else first):
            assert torch.equal(row, alone[n][places[n]])


@WEIGHTS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_finite_number_is_not_hidden(weights: str, value: float) -> None:
    model = random_model(GPT2)
    model.layers[0].mlp.up_proj.weight.data[3, 40] = value
    assert not at_once(quantised(model, weights), 1, [1, 2, 3]).isfinite().any()


def test_a_quantised_model_fits_into_less_memory(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dict(vocab_size=320, hidden_size=256, num_layers=4, num_heads=4, context_length=64)
    large = replace(package, config=ModelConfig(**shape))
    cpu, half = torch.device("cpu"), torch.bfloat16
    bytes_of = {weights: packed_bytes(large.config, half, weights) for weights in BITS}
    share = {weights: bytes_of[weights] / count_parameters(large.config) for weights in BITS}
    assert share[""] == 2
    assert 8.5 / 8 < share["int8"] < 1.1
    assert 4.5 / 8 < share["int4"] < 0.65
    slot = runners.slot_bytes(large.config, half)
    monkeypatch.setattr(runners, "free_memory", lambda _: bytes_of["int4"] + 2 * slot)
    monkeypatch.setattr(Package, "memory", lambda *_: {})
    check_memory(large, cpu, half, native=True, weights="int4")
    with pytest.raises(NoMemory, match="for packed weights"):
        check_memory(large, cpu, half, native=True, weights="int8")


@WEIGHTS
def test_the_setting_reaches_the_kernel_and_the_engines_info(package: Package, weights: str) -> None:
    engine = Engine(package, EngineSettings(device="cpu", slots=2, weights=weights))
    assert (engine.info.weights, engine.info.dtype) == (weights, str(engine.runner.dtype).removeprefix("torch."))
    engine.warm_up()
    plain = Engine(package, EngineSettings(device="cpu", slots=2))
    assert plain.info.weights == ""
    tokens = list(range(40))
    near, exact = (at_once(e.runner, 0, tokens) for e in (engine, plain))
    assert 0 < (near - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "int5"}, r"weights is 'int5'; expected one of int8, int4\. Did you mean 'int8'"),
        ({"weights": "int8", "backend": "torch"}, "weights is 'int8', but backend is 'torch'; .* leave out backend or"),
        ({"weights": "int8", "compile": True}, "weights is 'int8', but compile is True"),
        ({"weights": "int4", "engine": "vllm"}, "weights is 'int4', but engine is 'vllm'"),
    ],
)
def test_settings_without_the_native_kernel_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        EngineSettings(**given)
    assert error.value.param == "weights"


def test_without_a_compiler_quantised_weights_are_refused(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load_library.cache_clear()
    message = "weights is 'int8', which only the native kernel has, but CXX is 'no-such-compiler'"
    with pytest.raises(ConfigError, match=message):
        make_runner(package, EngineSettings(device="cpu", slots=1, weights="int8"))
    native.load_library.cache_clear()


def test_a_gpu_has_no_quantised_weights(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "pick_device", lambda _: torch.device("mps"))
    with pytest.raises(ConfigError, match=r"weights is 'int8', .* but device is mps; set device to cpu, or leave out"):
        make_runner(package, EngineSettings(weights="int8"))
