"""The torch runner computes the model's logits in every batch, and the right runner is chosen."""

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from gptcore import devices, memory
from gptcore.config import ModelConfig
from gptcore.engine import runners
from gptcore.engine.engine import Engine
from gptcore.engine.interface import Chunk, Request
from gptcore.engine.runners import make_runner
from gptcore.engine.settings import EngineSettings
from gptcore.engine.torch_runner import TorchRunner, packed_linear
from gptcore.errors import ConfigError, FoundryError
from gptcore.hf_format import count_parameters
from gptcore.model import GPT
from gptcore.package import Package, save_package
from gptcore.sampling import SamplingParams, generate_text
from gptcore.tokenizer import Tokenizer

from .conftest import run

MakeModel = Callable[[ModelConfig], GPT]
SLOTS, PREFILL = 4, 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of several widths in a context of 64."""
    monkeypatch.setattr("gptcore.engine.torch_runner.NARROWEST", 16)


@pytest.fixture
def model(config: ModelConfig, random_model: MakeModel) -> GPT:
    """Each shape in turn."""
    return random_model(config)


def torch_runner(model: GPT, **changes: Any) -> TorchRunner:
    return TorchRunner(model, **{"slots": SLOTS, "prefill": PREFILL, **changes})


def some_tokens(length: int) -> list[int]:
    return torch.randint(0, 257, (length,)).tolist()


@dataclass
class Crowd:
    """The content of each slot, and the steps that produce it: chunks of any length, and copies."""

    context: int
    held: list[list[int]] = field(default_factory=lambda: [[] for _ in range(SLOTS)])

    def step(self, dice: random.Random) -> list[Chunk]:
        chunks = []
        for slot in dice.sample(range(SLOTS), dice.randint(1, SLOTS)):
            room = self.context - len(self.held[slot])
            if not room:
                self.held[slot], room = [], self.context
            tokens = some_tokens(min(room, dice.choice([1, 1, 1, 2, 7, PREFILL, 33])))
            wanted = dice.choice([0, 1, 1, len(tokens)])
            chunks.append(Chunk(slot, len(self.held[slot]), tokens, wanted))
            self.held[slot] = self.held[slot] + tokens
        return chunks


def test_logits_are_the_models_in_any_mix_of_slots_chunks_and_copies(model: GPT) -> None:
    runner, crowd, dice = torch_runner(model), Crowd(model.config.context_length), random.Random(3)
    compared = 0
    for _ in range(40):
        if dice.random() < 0.2:
            source, target = dice.sample(range(SLOTS), 2)
            length = dice.randint(0, len(crowd.held[source]))
            runner.copy(source, target, length)
            crowd.held[target] = crowd.held[source][:length]
        chunks = crowd.step(dice)
        logits = runner.forward(chunks)
        with torch.no_grad():
            whole = [model(torch.tensor([crowd.held[chunk.slot]]))[0] for chunk in chunks]
        expected = torch.cat([rows[len(rows) - chunk.wanted :] for rows, chunk in zip(whole, chunks, strict=True)])
        assert logits.shape == (sum(chunk.wanted for chunk in chunks), model.config.vocab_size)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        compared += len(logits)
    assert compared > 200


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_packed_layer_is_the_linear_layer() -> None:
    x, weight, bias = torch.randn(3, 48), torch.randn(80, 48), torch.randn(80)
    try:
        packed = packed_linear(weight, bias)(x), packed_linear(weight, rows=3)(x)
    except (AttributeError, RuntimeError, TypeError) as error:
        pytest.fail(f"torch {torch.__version__} has changed its packed layers: change packed_linear ({error})")
    torch.testing.assert_close(packed, (x @ weight.T + bias, x @ weight.T), atol=1e-4, rtol=0)


def follow(runner: TorchRunner, slot: int, tokens: Sequence[int], prompt: int, beside: Sequence[Chunk] = ()) -> Tensor:
    """Logits of a prompt's last token and of all that follow, one by one; `beside` runs in each step too."""
    logits = [runner.forward([Chunk(slot, 0, tokens[:prompt], 1), *beside])[:1]]
    for position in range(prompt, len(tokens)):
        logits.append(runner.forward([*beside, Chunk(slot, position, tokens[position : position + 1], 1)])[-1:])
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_is_bit_identical_in_every_slot_and_batch(model: GPT, dtype: torch.dtype) -> None:
    runner, tokens = torch_runner(model.to(dtype)), some_tokens(24)
    alone = follow(runner, 0, tokens, prompt=9)
    assert alone.dtype == torch.float32
    for slot in range(SLOTS):
        others = [other for other in range(SLOTS) if other != slot]
        beside = [Chunk(others[0], 0, some_tokens(20), 0), Chunk(others[1], 60, some_tokens(1), 1)]
        assert torch.equal(follow(runner, slot, tokens, 9, beside), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_is_bit_identical_however_it_is_chunked_or_its_prefix_was_computed(
    model: GPT, dtype: torch.dtype
) -> None:
    runner, tokens = torch_runner(model.to(dtype)), some_tokens(59)
    whole = runner.forward([Chunk(0, 0, tokens, 59)])
    assert torch.equal(runner.forward([Chunk(1, 0, tokens, 1)]), whole[-1:])
    runner.forward([Chunk(2, 0, tokens[:32], 0), Chunk(1, 0, [*tokens[:48], 1, 2, 3], 0)])
    assert torch.equal(runner.forward([Chunk(2, 32, tokens[32:], 27)]), whole[32:])
    runner.copy(1, 3, 48)
    assert torch.equal(runner.forward([Chunk(3, 48, tokens[48:], 1)]), whole[-1:])


def test_rows_without_a_token_leave_their_slots_unchanged(model: GPT) -> None:
    runner, tokens = torch_runner(model), some_tokens(64)
    runner.forward([Chunk(slot, 0, tokens[:32], 0) for slot in range(SLOTS)])
    for position in range(32, 64):
        runner.forward([Chunk(0, position, tokens[position : position + 1], 1)])
    rest = [runner.forward([Chunk(slot, 32, tokens[32:], 1)]) for slot in range(SLOTS)]
    assert all(torch.equal(logits, rest[0]) for logits in rest)


def test_half_precision_stays_close(model: GPT) -> None:
    tokens = some_tokens(30)
    exact = follow(torch_runner(model), 0, tokens, 10)
    half = torch_runner(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (follow(half, 0, tokens, 10) - exact).abs().mean() < 0.05


def test_the_cache_takes_as_much_memory_as_reported(model: GPT) -> None:
    spare = runners.slot_bytes(model.config, torch.float32) * SLOTS // model.config.context_length
    assert torch_runner(model).cache_bytes - spare == runners.slot_bytes(model.config, torch.float32) * SLOTS


@pytest.mark.slow
def test_a_compiled_step_computes_the_same_logits(random_model: MakeModel) -> None:
    model = random_model(ModelConfig(vocab_size=320, hidden_size=64, num_layers=2, num_kv_heads=2, context_length=32))
    tokens = some_tokens(20)
    compiled = torch_runner(model, compile=True)
    assert compiled.name == "torch, compiled"
    torch.testing.assert_close(follow(compiled, 1, tokens, 5), follow(torch_runner(model), 1, tokens, 5))


PROMPTS = ("Once", "the cat", "Ω", "x" * 30, "a", "It was a dark", "!", "and then he said", "0 1 2 3 4 5 6 7 8", "é")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_engine_gives_the_same_text_in_a_batch_as_alone(package: Package, temperature: float) -> None:
    settings = EngineSettings(slots=SLOTS, backend="torch", dtype="float32", device="cpu", prefill_tokens=PREFILL)
    engine, model = Engine(package, settings), package.load_model()
    requests = [
        Request(
            str(i),
            engine.encode(PROMPTS[i % len(PROMPTS)]),
            SamplingParams(max_new_tokens=20, temperature=temperature, top_k=100 * (i % 2), seed=i, stop=("~~",)),
        )
        for i in range(16)
    ]
    answers = run(engine, *requests)
    for i, request in enumerate(requests):
        text = generate_text(model, package.tokenizer, PROMPTS[i % len(PROMPTS)], request.params)
        assert answers[request.request_id].text == text


@dataclass
class FakeNative:
    """A stand-in with the arguments of NativeRunner."""

    config: ModelConfig
    parameters: Iterable[tuple[str, Tensor]]
    slots: int
    dtype: torch.dtype
    threads: int
    note: str
    weights: str


class NativeUnavailable(FoundryError):
    pass


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for gptcore.engine.native."""
    module = SimpleNamespace(NativeRunner=FakeNative, NativeUnavailable=NativeUnavailable)
    monkeypatch.setattr(runners, "NativeRunner", lambda *given: module.NativeRunner(*given))
    monkeypatch.setattr(runners, "NativeUnavailable", NativeUnavailable)
    return module


def unavailable(*_: Any) -> None:
    raise NativeUnavailable("no C++ compiler was found")


def test_on_a_cpu_the_native_kernels_are_used(package: Package, native: SimpleNamespace) -> None:
    made: Any = make_runner(package, EngineSettings(device="cpu", slots=3, dtype="bfloat16", threads=1))
    assert isinstance(made, FakeNative)
    assert (made.slots, made.dtype, made.threads) == (3, torch.bfloat16, 1)
    assert dict(made.parameters).keys() == dict(package.load_model().named_parameters()).keys()


def test_weights_are_read_in_the_precision_in_which_they_are_stored(package: Package, tmp_path: Path) -> None:
    state = package.load_model().bfloat16().state_dict()
    half = save_package(tmp_path / "half", package.config, state, package.tokenizer, {})
    for name, weight in half.parameters(dtype=None):
        assert torch.equal(weight, state[name]), name


def test_a_long_context_is_cut_to_what_memory_holds_for_four_sequences(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(package, config=replace(package.config, context_length=2**22))
    weights, slot = 4 * count_parameters(long.config), runners.slot_bytes(long.config, torch.float32)
    monkeypatch.setattr(runners, "free_memory", lambda device: weights + 2 * 4 * 1000 * slot // 2**22)
    monkeypatch.setattr(runners, "require_memory", lambda *_: None)
    made = make_runner(long, EngineSettings(device="cpu", dtype="float32", backend="torch"))
    assert (made.context_length, made.slots) == (960, 4)
    assert made.note == "a context of 960 of 4,194,304 tokens: what memory holds for 4 sequences"
    many = make_runner(long, EngineSettings(device="cpu", dtype="float32", backend="torch", slots=8))
    assert (many.context_length, many.slots) == (448, 8)
    asked = make_runner(long, EngineSettings(device="cpu", dtype="float32", backend="torch", max_context=100, slots=2))
    assert (asked.context_length, asked.slots) == (100, 2)
    assert asked.note == "a context of 100 of 4,194,304 tokens: max_context"


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_shorter_context_changes_no_logits(
    config: ModelConfig, random_model: MakeModel, byte_tokenizer: Tokenizer, tmp_path: Path, backend: str
) -> None:
    state = random_model(config).state_dict()
    package = save_package(tmp_path / "p", config, state, byte_tokenizer, {})
    settings = EngineSettings(device="cpu", dtype="float32", backend=backend, slots=2, prefill_tokens=PREFILL)
    tokens = some_tokens(30)
    whole, short = (make_runner(package, replace(settings, max_context=most)) for most in (0, 32))
    assert (whole.context_length, short.context_length) == (64, 32)
    chunk = Chunk(0, 0, tokens, 30)
    torch.testing.assert_close(short.forward([chunk]).clone(), whole.forward([chunk]), atol=1e-5, rtol=0)


def test_without_native_kernels_torch_computes_and_says_why(package: Package, native: SimpleNamespace) -> None:
    native.NativeRunner = unavailable
    made = make_runner(package, EngineSettings(device="cpu", slots=2, dtype="float32"))
    assert isinstance(made, TorchRunner)
    assert (made.name, made.note) == ("torch", "not native: no C++ compiler was found")
    assert (made.slots, made.dtype, made.context_length, made.vocab_size) == (2, torch.float32, 64, 320)
    with pytest.raises(ConfigError, match="backend is 'native', but no C") as error:
        make_runner(package, EngineSettings(device="cpu", slots=2, backend="native"))
    assert error.value.param == "backend"


def test_torch_computes_if_asked(package: Package, native: SimpleNamespace) -> None:
    made = make_runner(package, EngineSettings(device="cpu", slots=2, backend="torch", prefill_tokens=10))
    assert isinstance(made, TorchRunner)
    assert made.note == ""
    assert made.reuse_granularity == 10
    with pytest.raises(ConfigError, match="needs device cpu and compile off"):
        make_runner(package, EngineSettings(device="cpu", backend="native", compile=True))


def test_a_closed_runner_frees_its_memory(model: GPT) -> None:
    runner = torch_runner(model)
    keys = runner._keys
    runner.close()
    assert sys.getrefcount(keys) == 2  # this name and the call's argument


@pytest.mark.parametrize(
    ("asked", "free_mib", "slots"), [(0, 10, 5), (0, 1000, 16), (0, 1.5, 1), (3, 3.5, 3), (40, 1000, 40)]
)
def test_slots_fill_half_the_memory_up_to_a_limit(
    asked: int, free_mib: float, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(vocab_size=320, hidden_size=128, num_layers=2, num_heads=4, context_length=1024)
    assert runners.slot_bytes(config, torch.bfloat16) == 2**20
    monkeypatch.setattr(runners, "free_memory", lambda _: int(free_mib * 2**20))
    assert runners.count_slots(config, asked, CPU, torch.bfloat16) == slots


def test_more_slots_than_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=320, hidden_size=128, num_layers=2, num_heads=4, context_length=1024)
    monkeypatch.setattr(runners, "free_memory", lambda _: 5 * 2**20)
    with pytest.raises(ConfigError, match=r"slots is 9, which take 9 MiB .* but only 5 MiB .* 5 would fit") as error:
        runners.count_slots(config, 9, CPU, torch.bfloat16)
    assert error.value.param == "slots"


@pytest.mark.parametrize(
    ("limit", "free"), [("max", None), (str(500 * 2**20), 150 * 2**20), (str(100 * 2**20), 0), (str(2**60), None)]
)
def test_a_containers_limit_counts(
    limit: str, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    assert memory.free_memory(CPU) == 2**40
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{400 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\nfile {50 * 2**20}\n")
    assert memory.free_memory(CPU) == (2**40 if free is None else free)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cdua", r"device is 'cdua'; expected auto, cpu, cuda, cuda:N or mps. Did you mean 'cuda'\?"),
        ("cuda:x", "device is 'cuda:x'; expected"),
        ("cuda:77", "device is 'cuda:77', but torch sees no such device here"),
    ],
)
def test_a_missing_device_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        devices.pick_device(name)
    assert error.value.param == "device"


def test_half_precision_is_chosen_if_the_processor_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = f"torch {torch.__version__} has no such function: change gptcore.devices.pick_dtype"
    assert hasattr(torch.cpu, "_is_avx512_bf16_supported"), changed
    assert devices.pick_device("cpu") == CPU
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert devices.pick_dtype("auto", CPU) == dtype
        assert devices.pick_dtype("bfloat16", CPU) == torch.bfloat16
