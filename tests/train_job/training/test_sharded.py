"""Several workers train as one would, whether each has the whole model or they divide it among them."""

import itertools
import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gptcore.hf_format import empty_model
from gptcore.model import GPT
from tests.train_job.conftest import SMALL
from tests.train_job.training.workers import Workers, workers
from train_job.config import build_config
from train_job.data.inputs import build_model, prepare_inputs, seeded_weights
from train_job.training import muon
from train_job.training.checkpoint import StoredModel, TrainState, check_checkpoint, save_checkpoint, verified
from train_job.training.events import CheckpointDue, Evaluation, Progress
from train_job.training.loop import Trainer
from train_job.training.parallel import clip_gradients, is_sharded, local
from train_job.training.writer import CheckpointWriter

SHAPE: dict[str, Any] = SMALL | dict(
    num_layers=3, hidden_size=32, log_interval=1, precision="fp32", batch_size=8, val_fraction=0.02
)


@pytest.fixture(scope="module")
def crew() -> Iterator[Workers]:
    with workers(4) as ready:
        yield ready


@pytest.fixture
def base(text_file: Path, tmp_path: Path) -> dict[str, Any]:
    return SHAPE | {"data": str(text_file), "cache_dir": str(tmp_path / "cache"), "storage_path": str(tmp_path)}


def made(settings: dict[str, Any]) -> Trainer:
    """A Trainer with seeded weights; a sharded model never exists as a whole."""
    config = build_config({"name": "run", **settings})
    inputs = prepare_inputs(config)
    model: GPT
    weights: Any = ()
    if is_sharded(config):
        model, weights = empty_model(inputs.model), seeded_weights(config, inputs.model)
    else:
        model = build_model(config, inputs.model)
    return Trainer(inputs.config, model, inputs.train, inputs.validation, torch.device("cpu"), weights=weights)


@dataclass
class Trained:
    """What one worker saw of a run."""

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    weights: dict[str, Tensor]
    """Whole."""


def train(settings: dict[str, Any]) -> Trained:
    trainer = made(settings)
    events = list(trainer.run())
    steps = [event for event in events if isinstance(event, Progress)]
    judged = [event.loss for event in events if isinstance(event, Evaluation)]
    return Trained([e.loss for e in steps], [e.grad_norm for e in steps], judged, whole_weights(trainer))


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in trainer.parameters.items()}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in weights.items()}


RUNS = {
    "qwen3, Muon": dict(family="qwen3"),
    "gpt2, AdamW": dict(family="gpt2", optimizer="adamw"),
    "qwen3, AdamW": dict(optimizer="adamw"),
    "qwen3, AdamW, micro-batches": dict(optimizer="adamw", micro_batch_size=2),
    "tied, grouped, recomputed": dict(tie_embeddings=True, num_kv_heads=1, checkpoint_activations=True),
}


@pytest.mark.parametrize(
    ("run", "count", "steps", "most"),
    [
        # Workers add up in the order of the ranks, whoever holds the sum: the bits are the same.
        ("qwen3, Muon", 2, 10, 0),
        pytest.param("qwen3, Muon", 2, 100, 0, marks=pytest.mark.slow),
        pytest.param("gpt2, AdamW", 2, 100, 0, marks=pytest.mark.slow),
        ("tied, grouped, recomputed", 2, 10, 0),
        pytest.param("qwen3, Muon", 3, 10, 0, marks=pytest.mark.slow),
        pytest.param("qwen3, Muon", 4, 100, 0, marks=pytest.mark.slow),
        pytest.param("qwen3, AdamW", 4, 100, 0, marks=pytest.mark.slow),
        # Micro-batches are summed over workers before they are added up, and not after.
        ("qwen3, AdamW, micro-batches", 2, 20, 1e-5),
    ],
)
def test_sharded_training_has_the_loss_of_ddp_and_repeats_to_the_bit(
    crew: Workers, base: dict[str, Any], run: str, count: int, steps: int, most: float
):
    given = base | RUNS[run] | {"max_steps": steps, "eval_interval": steps}
    ddp, one, again = (crew.call(count, train, given | {"parallel": mode}) for mode in ("ddp", "fsdp", "fsdp"))
    assert max(abs(a - b) for a, b in zip(one[0].losses, ddp[0].losses, strict=True)) <= most
    assert one[0].norms == pytest.approx(ddp[0].norms, rel=10 * most)
    assert one[0].evaluations == pytest.approx(ddp[0].evaluations, abs=most)
    assert one[0].losses == again[0].losses
    for found in (*one, *again):
        assert all(torch.equal(found.weights[name], one[0].weights[name]) for name in one[0].weights)
    assert all(torch.equal(ddp[0].weights[name], ddp[1].weights[name]) for name in ddp[0].weights)


@pytest.mark.parametrize("reduce_precision", ["fp32", "bf16"])
def test_in_bf16_a_sharded_step_multiplies_what_ddp_multiplies(
    crew: Workers, base: dict[str, Any], reduce_precision: str
):
    given = base | {"precision": "bf16", "max_steps": 5, "reduce_precision": reduce_precision}
    ddp, fsdp = (crew.call(2, train, given | {"parallel": mode}) for mode in ("ddp", "fsdp"))
    assert fsdp[0].losses[0] == pytest.approx(ddp[0].losses[0], abs=1e-6)
    assert fsdp[0].norms[0] == pytest.approx(ddp[0].norms[0], rel=1e-6 if reduce_precision == "fp32" else 1e-3)
    assert fsdp[0].losses == pytest.approx(ddp[0].losses, abs=2e-3)


def test_reducing_in_bf16_rounds_the_gradients(crew: Workers, base: dict[str, Any]):
    for mode in ("ddp", "fsdp"):
        exact, rounded = (
            crew.call(2, train, base | {"max_steps": 1, "parallel": mode, "reduce_precision": precision})[0]
            for precision in ("fp32", "bf16")
        )
        assert exact.norms != rounded.norms
        assert exact.norms == pytest.approx(rounded.norms, rel=1e-2)


def test_shares_of_different_sizes_make_as_many_passes(crew: Workers, base: dict[str, Any]):
    given = base | {"batch_size": 7, "micro_batch_size": 2, "max_steps": 4, "parallel": "fsdp"}
    assert crew.call(3, train, given)[0].losses == pytest.approx(train(given).losses, abs=1e-5)


def test_weights_made_one_at_a_time_are_those_of_the_whole_model(base: dict[str, Any]):
    for changes in (dict(), dict(family="gpt2"), dict(tie_embeddings=True)):
        config = build_config(base | changes)
        shape = prepare_inputs(config).model
        weights = dict(seeded_weights(config, shape))
        for name, parameter in build_model(config, shape).named_parameters():
            assert torch.equal(weights.pop(name), parameter), name
        assert not weights


def owned(settings: dict[str, Any]) -> int:
    """Bytes of this worker's weights, gradients and optimizer state, after a step that has not cleared gradients."""
    trainer = made(settings)
    for part in trainer.optimizers.parts:
        part.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    next(event for event in trainer.run() if isinstance(event, Progress))
    kept = [*trainer.tensors().values(), *(p.grad for p in trainer.parameters.values())]
    return sum(local(tensor).numel() * tensor.element_size() for tensor in kept if tensor is not None)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_worker_holds_its_share_of_weights_gradients_and_optimizer_state(
    crew: Workers, base: dict[str, Any], optimizer: str
):
    given = base | {"optimizer": optimizer, "hidden_size": 128}
    alone = owned(given)
    for count in (2, 4):
        for bytes_held in crew.call(count, owned, given | {"parallel": "fsdp"}):
            assert bytes_held == pytest.approx(alone / count, rel=0.1)
        assert set(crew.call(count, owned, given)) == {alone}


# --- Muon ---


def worked(settings: dict[str, Any]) -> tuple[list[tuple[int, ...]], dict[str, Tensor]]:
    """The matrices that this worker orthogonalised in a step, and the weights after it."""
    trainer, shapes = made(settings), []
    original = muon.orthogonalise

    def counted(updates: Tensor) -> Tensor:
        shapes.extend(tuple(update.shape) for update in updates)
        return original(updates)

    muon.orthogonalise = counted
    try:
        list(trainer.run())
    finally:
        muon.orthogonalise = original
    return shapes, whole_weights(trainer)


@pytest.mark.parametrize(("count", "parallel"), [(4, "ddp"), (3, "ddp"), (3, "fsdp"), (4, "fsdp")])
def test_muons_work_is_divided_and_the_result_is_that_of_one_worker(
    crew: Workers, base: dict[str, Any], count: int, parallel: str
):
    given = base | {"max_steps": 1, "parallel": parallel, "eval_interval": 1, "batch_size": 12}
    all_shapes, weights = worked(given)
    most = sum(map(muon.work, all_shapes)) / count + max(map(muon.work, all_shapes))
    found = crew.call(count, worked, given)
    assert sorted(itertools.chain.from_iterable(shapes for shapes, _ in found)) == sorted(all_shapes)
    for shapes, after in found:
        assert sum(map(muon.work, shapes)) <= most
        for name, weight in weights.items():
            torch.testing.assert_close(after[name], weight, atol=2e-4, rtol=0)


# --- checkpoints ---


def saved(settings: dict[str, Any], steps: int) -> list[float]:
    """Trains some steps and saves; returns the losses of the steps after that, to the end."""
    trainer = made(settings)
    identity = trainer.identity("tokenizer")
    writer = CheckpointWriter(trainer.config, identity, "first", print)
    losses = []
    for event in trainer.run():
        if isinstance(event, CheckpointDue) and event.step == steps:
            writer.save(trainer)
        if isinstance(event, Progress) and event.step > steps:
            losses.append(event.loss)
    writer.wait()
    return losses


def resumed(settings: dict[str, Any], folder: Path) -> list[float]:
    trainer = made(settings)
    check_checkpoint(folder, trainer.identity("tokenizer"))
    trainer.restore(folder)
    return [event.loss for event in trainer.run() if isinstance(event, Progress)]


@pytest.mark.parametrize(
    ("count", "parallel", "optimizer"),
    [
        (4, "fsdp", "muon"),
        pytest.param(3, "fsdp", "adamw", marks=pytest.mark.slow),
        pytest.param(2, "ddp", "muon", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_resumes_from_a_checkpoint_of_any_other(
    crew: Workers, base: dict[str, Any], tmp_path: Path, count: int, parallel: str, optimizer: str
):
    given = base | {"optimizer": optimizer, "batch_size": 12}
    expected = crew.call(count, saved, given | {"parallel": parallel}, 6)[0]
    [folder] = (tmp_path / "run").glob("checkpoint_*")
    files = sorted(verified(folder)["files"])
    assert [name[:11] for name in files] == [f"shard-{n + 1:05}" for n in range(count)]
    assert crew.call(count, resumed, given | {"parallel": parallel}, folder)[0] == expected
    assert resumed(given, folder) == pytest.approx(expected, abs=1e-3)
    for others, mode in ((1, "ddp"), (2, "fsdp"), (3, "ddp"), (4, "fsdp")):
        assert crew.call(others, resumed, given | {"parallel": mode}, folder)[0] == pytest.approx(expected, abs=1e-3)


def test_a_package_gets_each_tensor_of_a_sharded_checkpoint_whole(crew: Workers, base: dict[str, Any], tmp_path: Path):
    crew.call(4, saved, base | {"parallel": "fsdp", "max_steps": 6}, 6)
    [folder] = (tmp_path / "run").glob("checkpoint_*")
    stored, trainer = StoredModel(folder), made(base)
    trainer.restore(folder)
    assert dict(stored).keys() == trainer.parameters.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in trainer.parameters.items())


def unwritable(settings: dict[str, Any], rank: int) -> str:
    """What this worker gets if `rank` cannot write."""
    trainer = made(settings)
    writer = CheckpointWriter(trainer.config, trainer.identity("t"), "first", print)
    if dist.get_rank() == rank:
        from train_job.training import checkpoint

        def full(file: Path) -> str:
            raise OSError(28, "No space left on device")

        checkpoint.sha256 = full  # type: ignore[attr-defined]
    writer.save(trainer)
    try:
        writer.wait()
    except Exception as error:
        return str(error)
    finally:
        if dist.get_rank() == rank:
            from gptcore.files import sha256

            checkpoint.sha256 = sha256  # type: ignore[attr-defined]
    return ""


def test_if_one_worker_cannot_write_all_know_and_nothing_is_left(crew: Workers, base: dict[str, Any], tmp_path: Path):
    for text in crew.call(2, unwritable, base, 1):
        assert text.startswith("the disk is full: no space for a checkpoint in ")
    assert not list((tmp_path / "run").glob("checkpoint_*"))


def clipped(most: float) -> tuple[float, float]:
    """The norm of some gradients before and after clipping; the other parameters are whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    matrix = torch.nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))
    vector = torch.nn.Parameter(torch.zeros(4))
    matrix.grad = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])  # type: ignore[assignment]
    vector.grad = torch.ones(4)
    before = float(clip_gradients([matrix, vector], most))
    return before, float(clip_gradients([matrix, vector], math.inf))


@pytest.mark.parametrize("count", [2, 4])
def test_clipping_uses_the_norm_of_the_whole_gradient(crew: Workers, count: int):
    norm = math.sqrt(sum(n * n for n in range(15)) + 4)
    for before, after in crew.call(count, clipped, 2.0):
        assert before == pytest.approx(norm)
        assert after == pytest.approx(2.0)
    for before, after in crew.call(count, clipped, 100.0):
        assert before == after == pytest.approx(norm)


# --- memory ---


def within(settings: dict[str, Any], room: int) -> None:
    """Trains, with a limit on what the process may allocate: `room` bytes more than it has."""
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + room, before[1]))
    try:
        list(made(settings).run())
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux limits what a process allocates")
def test_a_model_too_large_for_one_worker_trains_on_four(base: dict[str, Any]):
    with workers(4) as fresh:  # what earlier tests have left in a process would count
        trains_on_four_alone(fresh, base)


def trains_on_four_alone(crew: Workers, base: dict[str, Any]) -> None:
    crew.call(4, train, base | {"parallel": "fsdp", "max_steps": 1})  # imports what a step needs
    # So large that what a process takes besides, for threads and messages, does not decide.
    large = base | dict(hidden_size=384, num_layers=16, num_heads=4, optimizer="adamw", max_steps=2, eval_interval=2)
    # One worker needs more for weights, gradients and AdamW's state. Four take 0.65, and more on a busy machine.
    room = int(0.95 * 16 * empty_model(prepare_inputs(build_config(large)).model).num_parameters())
    crew.call(4, within, large | {"parallel": "fsdp"}, room)
    with pytest.raises(AssertionError, match=r"can't allocate memory|MemoryError"):
        crew.call(1, within, large, room)


def test_workers_that_have_all_write_a_share_each(crew: Workers, base: dict[str, Any], tmp_path: Path):
    crew.call(2, saved, base | {"max_steps": 6}, 6)
    [folder] = (tmp_path / "run").glob("checkpoint_*")
    sizes = [(folder / name).stat().st_size for name in verified(folder)["files"]]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)
    assert dict(StoredModel(folder)).keys() == made(base).parameters.keys()


def test_only_what_a_run_still_needs_is_kept(base: dict[str, Any], tmp_path: Path):
    trainer = made(base | {"max_steps": 4})
    identity = trainer.identity("tokenizer")
    killed = tmp_path / "run" / "checkpoint_before_00000002"
    killed.mkdir(parents=True)
    damaged = tmp_path / "run" / "checkpoint_before_00000000"
    save_checkpoint(damaged, TrainState(step=0), identity, {"w": torch.ones(1)})
    writer = CheckpointWriter(trainer.config, identity, "now", print, {damaged.name})
    for step in (1, 2, 3):
        trainer.state = TrainState(step=step)
        writer.save(trainer)
    writer.wait()
    kept = sorted(folder.name for folder in (tmp_path / "run").iterdir())
    assert kept == [damaged.name, "checkpoint_now_00000002", "checkpoint_now_00000003"]
