"""Adapters are trained beside a frozen model, by one or several workers, and become a whole model, or PEFT's folder."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore.config import FAMILIES, Lora, ModelConfig
from gptcore.devices import pick_dtype
from gptcore.errors import CheckpointError, ConfigError, PackageError
from gptcore.hf_format import empty_model
from gptcore.lora import Merged, add_adapters, check_adapters, initial_adapters, is_adapter, save_adapter
from gptcore.model import GPT
from gptcore.package import Package, open_package, save_package
from gptcore.tokenizer import load_tokenizer
from tests.train_job.training.workers import Workers, workers
from train_job.config import build_config
from train_job.data.inputs import prepare_inputs
from train_job.session.finish import ADAPTER
from train_job.training.checkpoint import StoredModel, check_checkpoint, save_checkpoint
from train_job.training.events import CheckpointDue, Evaluation, Progress
from train_job.training.loop import Trainer

SHAPE: dict[str, Any] = dict(hidden_size=32, num_layers=2, num_heads=4, context_length=32)
GROUPED = dict(num_kv_heads=2, head_dim=16)
CPU = torch.device("cpu")


def parent(folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.float32, **shape: Any) -> Package:
    """A package of random weights whose embedding is tied."""
    tokenizer = load_tokenizer("bytes", None)
    grouped = {} if family == "gpt2" else GROUPED
    sizes = SHAPE | grouped | {"tie_embeddings": True} | shape
    config = ModelConfig(vocab_size=320, family=family, **sizes)
    torch.manual_seed(5)
    state = {
        name: (torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight"))).to(dtype)
        for name, p in GPT(config).named_parameters()
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return save_package(folder, config, state, tokenizer, {})


@pytest.fixture
def settings(text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Twelve steps of adapters of rank 4 in every matrix, in fp32."""
    base = parent(tmp_path / "base")
    return dict(
        data=str(text_file),
        cache_dir=str(tmp_path / "cache"),
        storage_path=str(tmp_path),
        name="run",
        init_from=str(base.path),
        lora_rank=4,
        learning_rate=1e-2,
        batch_size=4,
        max_steps=12,
        eval_interval=6,
        log_interval=1,
        warmup_steps=2,
        sample_tokens=0,
        precision="fp32",
        val_fraction=0.02,
    )


def made(given: dict[str, Any]) -> Trainer:
    """A Trainer as a Ray worker makes it."""
    config = build_config(given)
    inputs = prepare_inputs(config)
    assert inputs.parent
    assert config.lora
    model = empty_model(inputs.model)
    add_adapters(model, config.lora, pick_dtype(config.precision, CPU))
    weights = chain(inputs.parent.parameters(dtype=None), initial_adapters(inputs.model, config.lora, config.seed))
    base = inputs.parent.weights_hash()
    return Trainer(inputs.config, model, inputs.train, inputs.validation, CPU, weights=weights, base=base)


def train(given: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and adapters."""
    trainer = made(given)
    losses = [event.loss for event in trainer.run() if isinstance(event, Progress)]
    return losses, {n: p.detach().clone() for n, p in trainer.parameters.items() if is_adapter(n)}


def whole(base: Package, adapters: Any, lora: Lora) -> GPT:
    """The network with the adapters merged."""
    model = empty_model(base.config)
    state = dict(Merged(base, adapters, lora))
    if base.config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if base.config.rotary:
        fresh = base.load_model()
        model.cos, model.sin = fresh.cos, fresh.sin
    return model.eval()


def trained_adapters(config: ModelConfig, lora: Lora) -> dict[str, Tensor]:
    """Adapters that change the model."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in initial_adapters(config, lora, 1)
    }


def test_adapters_start_as_the_base_and_training_them_lowers_the_loss(settings: dict[str, Any]):
    trainer = made(settings)
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    judged = [event.loss for event in trainer.run() if isinstance(event, Evaluation)]
    base = open_package(settings["init_from"])
    inputs = prepare_inputs(build_config(settings))
    with torch.no_grad():
        tokens = torch.tensor(inputs.tokenizer.encode("Once upon a time"))[None]
        again = made(settings).model.eval()(tokens)
        assert torch.allclose(again, base.load_model()(tokens), atol=1e-5)
    assert judged[-1] < judged[0] - 0.1
    for name, p in trainer.parameters.items():
        assert is_adapter(name) != torch.equal(p, before[name]), name


def test_a_checkpoint_has_the_adapters_alone_and_a_resumed_run_goes_on_to_the_bit(
    settings: dict[str, Any], tmp_path: Path
):
    given = settings | {"lora_dropout": 0.1, "checkpoint_interval": 5}
    trainer, folder = made(given), tmp_path / "checkpoint"
    for event in trainer.run():
        if isinstance(event, CheckpointDue) and event.step == 5:
            save_checkpoint(folder, trainer.state, trainer.identity("t"), trainer.tensors())
    assert StoredModel(folder).keys() == {n for n in trainer.parameters if is_adapter(n)}
    resumed = made(given)
    check_checkpoint(folder, resumed.identity("t"))
    resumed.restore(folder)
    assert resumed.state.step == 5
    list(resumed.run())
    for name, p in trainer.parameters.items():
        assert torch.equal(p, resumed.parameters[name]), name


def test_adapters_do_not_go_on_beside_another_base(settings: dict[str, Any], tmp_path: Path):
    trainer, folder = made(settings), tmp_path / "checkpoint"
    save_checkpoint(folder, trainer.state, trainer.identity("t"), trainer.tensors())
    weights = open_package(settings["init_from"]).path
    shutil.rmtree(weights)
    torch.manual_seed(9)
    other = parent(tmp_path / "other", tie_embeddings=True)
    state = {name: value + 0.01 for name, value in other.parameters()}
    state["lm_head.weight"] = state["embed_tokens.weight"]
    save_package(weights, other.config, state, other.tokenizer, {})
    with pytest.raises(CheckpointError, match="another model"):
        check_checkpoint(folder, made(settings).identity("t"))


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.2}, {"precision": "bf16"}], ids=str)
def test_a_repeated_run_has_the_same_bits(settings: dict[str, Any], changes: dict[str, Any]):
    (losses, adapters), (again, same) = train(settings | changes), train(settings | changes)
    assert losses == again
    assert all(torch.equal(adapters[name], same[name]) for name in adapters)


def test_activation_checkpointing_changes_nothing(settings: dict[str, Any]):
    plain, recomputed = (train(settings | {"checkpoint_activations": on, "lora_dropout": 0.1}) for on in (False, True))
    assert plain[0] == recomputed[0]


@pytest.fixture(scope="module")
def crew() -> Iterator[Workers]:
    with workers(3) as ready:
        yield ready


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_or_not_workers_train_the_same_adapters(
    crew: Workers, settings: dict[str, Any], count: int, precision: str
):
    given = settings | {"precision": precision, "batch_size": 6, "max_steps": 5}
    alone = train(given)
    for mode in ("ddp", "fsdp"):
        found = crew.call(count, train, given | {"parallel": mode})
        assert found[0][0] == pytest.approx(alone[0], abs=1e-5 if precision == "fp32" else 2e-3)
        for _, adapters in found:
            assert all(torch.equal(adapters[name], found[0][1][name]) for name in adapters)


def held(given: dict[str, Any]) -> int:
    """Bytes of this worker's weights, gradients and optimizer state after a step."""
    trainer = made(given)
    for part in trainer.optimizers.parts:
        part.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    next(event for event in trainer.run() if isinstance(event, Progress))
    kept = [*trainer.parameters.values(), *trainer.optimizers.tensors().values()]
    kept += [p.grad for p in trainer.parameters.values() if p.grad is not None]
    return sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in kept)


def test_a_frozen_base_takes_two_bytes_a_weight_and_is_divided(crew: Workers, settings: dict[str, Any], tmp_path: Path):
    base = parent(tmp_path / "wider", hidden_size=128, num_layers=3)
    given = settings | {"init_from": str(base.path), "lora_rank": 2, "precision": "bf16"}
    matrices = sum(p.numel() for p in empty_model(base.config).parameters() if p.ndim == 2)
    adapters = check_adapters(base.config, Lora(2, 4.0))
    assert held(given) == pytest.approx(2 * matrices + 16 * adapters, rel=0.02)
    for bytes_held in crew.call(2, held, given | {"parallel": "fsdp", "batch_size": 4}):
        assert bytes_held == pytest.approx(matrices + 16 * adapters, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj", "down_proj")], ids="-".join)
def test_peft_loads_the_adapter_beside_the_base_and_computes_the_merged_model(
    tmp_path: Path, family: str, targets: tuple[str, ...]
):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, lora = parent(tmp_path / "base", family), Lora(4, 12.0, 0.1, targets)
    adapters = trained_adapters(base.config, lora)
    save_adapter(tmp_path / ADAPTER, base, str(base.path), adapters, lora)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base.path), tmp_path / ADAPTER
    )
    tokens = torch.arange(24).view(2, 12) * 7 % 256
    with torch.no_grad():
        ours = whole(base, adapters, lora)(tokens)
        assert (ours - base.load_model()(tokens)).abs().max() > 0.1
        assert torch.allclose(theirs.eval()(tokens).logits, ours, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_package_and_the_adapter_keep_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype):
    base, lora = parent(tmp_path / "base", dtype=dtype), Lora(2, 4.0)
    adapters = trained_adapters(base.config, lora)
    merged = Merged(base, adapters, lora)
    package = save_package(tmp_path / "merged", base.config, merged, base.tokenizer, {})
    name = "layers.1.mlp.down_proj"
    exact = dict(base.parameters())[f"{name}.weight"] + 2 * adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"]
    stored = dict(package.parameters(dtype=None))
    assert torch.equal(stored[f"{name}.weight"], exact.to(dtype))
    assert torch.equal(stored["norm.weight"], dict(base.parameters(dtype=None))["norm.weight"])
    save_adapter(tmp_path / ADAPTER, base, "base", adapters, lora)
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / ADAPTER / "adapter_model.safetensors").values()} == {dtype}


def test_the_adapter_of_a_small_open_model_has_less_than_3_percent_of_its_bytes():
    # Qwen3-0.6B: adapters of rank 16 in every matrix, both in bf16.
    config = ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        tie_embeddings=True,
        context_length=64,
    )
    whole_model = sum(p.numel() for p in empty_model(config).parameters())
    assert check_adapters(config, Lora(16, 32.0)) < 0.03 * whole_model


def test_a_merged_weight_that_its_dtype_cannot_hold_is_named(tmp_path: Path):
    base, lora = parent(tmp_path / "base", dtype=torch.float16), Lora(2, 1e7)
    merged = Merged(base, trained_adapters(base.config, lora), lora)
    with pytest.raises(PackageError, match=r"layers\.0\.self_attn\.q_proj\.weight contains values that are not finite"):
        save_package(tmp_path / "merged", base.config, merged, base.tokenizer, {})
    assert not (tmp_path / "merged").exists()


def wrong(settings: dict[str, Any], **changes: Any) -> str:
    given = {k: v for k, v in (settings | changes).items() if v is not ...}
    with pytest.raises(ConfigError) as error:
        prepare_inputs(build_config(given))
    return str(error.value)


def test_settings_that_cannot_work_are_named(settings: dict[str, Any], tmp_path: Path):
    assert "did you mean 'q_proj'" in wrong(settings, lora_targets=["q_prj"]).lower()
    gpt2 = parent(tmp_path / "gpt2", "gpt2")
    assert "gate_proj" in wrong(settings, init_from=str(gpt2.path), lora_targets=["gate_proj"])
    assert "expected at most 32" in wrong(settings, lora_rank=33)
    assert "lora_targets is empty" in wrong(settings, lora_targets=[])
    assert "there is no model to adapt" in wrong(settings, init_from=...)
    assert "lora_alpha has no effect without lora_rank" in wrong(settings, lora_rank=..., lora_alpha=8)
    assert "lora_rank is 0" in wrong(settings, lora_rank=0)


def test_alpha_is_twice_the_rank_by_default_and_users_settings_win(settings: dict[str, Any]):
    config = build_config(settings | {"optimizer": "muon"})
    assert config.lora == Lora(4, 8.0, 0.0, ("all-linear",))
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("muon", 1e-2, 0.0)
    assert build_config(settings | {"lora_alpha": 3}).lora == replace(config.lora, alpha=3.0)


def test_a_whole_model_is_tuned_on_sequences_that_a_batch_fits(settings: dict[str, Any], tmp_path: Path):
    base = parent(tmp_path / "long", context_length=4096)
    given = settings | {"init_from": str(base.path)}
    assert prepare_inputs(build_config(given)).config.sequence_length == 1024
    assert prepare_inputs(build_config(settings)).config.sequence_length == 32
