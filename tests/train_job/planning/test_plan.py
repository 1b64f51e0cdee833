"""The plan of a run: its figures compared with real steps, and what a user sees."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptcore.config import ModelConfig
from gptcore.model import GPT
from serve_app.settings import load_settings
from tests.memory import allocated, multiplies_bf16
from tests.refusals import one_error
from train_job.config import TrainConfig, build_config
from train_job.data.inputs import padded
from train_job.plan import main, make_plan
from train_job.planning.costs import (
    BUCKET,
    FRAGMENTATION,
    GPU_RESERVE,
    LOGIT_BYTES,
    Workload,
    all_reduce_seconds,
    block_bytes,
    largest_micro_batch,
    newton_schulz_flops,
    optimizer_seconds,
    saved_bytes,
    serving,
    training_memory,
    training_step,
    workload,
)
from train_job.training import muon
from train_job.training.devices import assumed_rates, device_called, find_device
from train_job.training.optimizer import Optimizers
from train_job.training.parallel import prepare_model

FAMILIES = ("qwen3", "gpt2", "llama", "qwen2")
LONG = 640
"""A sequence length at which attention is fused on a CPU, as it is on a GPU."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")
VIEWS = ("view", "_unsafe_view", "t", "transpose", "slice", "split", "expand", "detach", "alias", "select", "unsqueeze")
NO_READS = ("size", "stride", "device", "empty_like", "empty", "new_empty", "ones_like", "zeros", "full", "as_strided")


def shape(family: str, **changes: Any) -> ModelConfig:
    small = dict(vocab_size=512, context_length=LONG, hidden_size=128, num_layers=2, num_heads=2)
    return ModelConfig(**{**small, "family": family, **changes})


def loss(model: GPT, sequences: int, length: int = LONG) -> Tensor:
    tokens = torch.zeros(sequences, length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        return model(tokens, tokens)


def planned(preset: str, **settings: Any) -> tuple[TrainConfig, Workload]:
    config = build_config(dict(preset=preset), settings)
    return config, workload(config.model_config(50304), config.context)


# --- sums against real steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, dict(hidden_size=192, num_heads=3), dict(num_layers=5)])
def test_autograd_keeps_as_many_bytes_per_token_as_the_plan_says(family: str, changes: dict[str, int]):
    config = shape(family, **changes)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def bytes_of(sequences: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(GPT(config), sequences)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    per_token = (bytes_of(2) - bytes_of(1)) / LONG
    assert per_token == pytest.approx(saved_bytes(config), rel=0.01)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, except matrix products and views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Sequence[Any] = (), named: Any = None) -> Any:
        made = operation(*arguments, **(named or {}))
        name = operation.overloadpacket.__name__
        if not name.startswith(PRODUCTS) and name not in VIEWS + NO_READS:
            tensors = [leaf for leaf in tree_leaves((arguments, named, made)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_the_loss_read_and_write_as_many_bytes_as_the_plan_says(family: str):
    def moved(config: ModelConfig) -> float:
        found = []
        for sequences in (1, 2):
            with Traffic() as traffic:
                loss(GPT(config), sequences).backward()
            found.append(traffic.bytes)
        return (found[1] - found[0]) / LONG

    one, two = moved(shape(family, num_layers=1)), moved(shape(family))
    assert two - one == pytest.approx(block_bytes(shape(family), LONG, "cuda"), rel=0.1)
    wide = moved(shape(family, num_layers=1, vocab_size=2048))
    assert (wide - one) / (2048 - 512) == pytest.approx(LOGIT_BYTES, rel=0.1)


@multiplies_bf16
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_steps_memory_peaks_where_the_plan_says(family: str, checkpointed: bool):
    settings: dict[str, Any] = dict(
        checkpoint_activations=checkpointed,
        batch_size=4,
        max_steps=1,
        optimizer="adamw" if family == "gpt2" else "muon",
        context_length=LONG,
    )
    config = build_config(settings, dict(family=family, hidden_size=256, num_layers=4, num_heads=2))
    model = GPT(config.model_config(4096))
    prepare_model(model, config)
    optimizers = Optimizers(model, config)
    loss(model, 4).backward()
    optimizers.step(1.0)  # its state is there from now on
    before = sum(p.numel() * 4 for p in model.parameters())
    before += sum(tensor.numel() * tensor.element_size() for tensor in optimizers.tensors().values())
    peak = before + allocated(lambda: loss(model, 4).backward())[0]
    memory = training_memory(config, workload(model.config, LONG), 1)
    expected = memory.total - GPU_RESERVE - (1 - 1 / FRAGMENTATION) * (memory.activations + memory.loss)
    assert expected == pytest.approx(peak, rel=0.25)


PUBLISHED = {
    "llm.c's GPT-2 124M, 10B tokens in 45 minutes on 8 H100": ("h100", 8, "gpt2-124m", {}, 10e9 / (45 * 60)),
    "a modded nanoGPT, 162M with rotary embeddings and Muon, on one A100": (
        "a100",
        1,
        "foundry-124m",
        dict(context_length=2048, tie_embeddings=False, batch_size=256),
        195_000,
    ),
}


@pytest.mark.parametrize("run", PUBLISHED)
def test_assumed_rates_are_close_to_published_runs(run: str):
    gpu, gpus, preset, settings, tokens_per_second = PUBLISHED[run]
    config, work = planned(preset, compile=True, **settings)
    device = find_device(gpu)
    plan = make_plan(config, work, device, assumed_rates(device), gpus)
    assert plan.tokens_per_second == pytest.approx(tokens_per_second, rel=0.25)


# --- what follows from them ---------------------------------------------------------------------------------------


def test_more_gpus_are_faster_and_less_efficient():
    config, work = planned("foundry-124m", compile=True)
    device = find_device("h200")
    plans = [make_plan(config, work, device, assumed_rates(device), n) for n in (1, 2, 8, 64, 512)]
    rates = [plan.tokens_per_second for plan in plans]
    assert rates == sorted(rates)
    shares = [plan.tokens_per_second / plan.workers for plan in plans]
    assert shares == sorted(shares, reverse=True)
    assert plans[0].step.waiting == 0 < plans[-1].step.waiting
    assert plans[-1].step.waiting > 0.5 * plans[-1].step.seconds


def test_a_larger_batch_hides_gradient_traffic_on_more_gpus():
    device = find_device("h100")

    def share_waited(batch: int) -> float:
        config, work = planned("gpt2-124m", batch_size=batch)
        step = training_step(config, work, device, assumed_rates(device), 128)
        return step.waiting / step.seconds

    assert share_waited(4096) < share_waited(480) / 2


def test_an_all_reduce_moves_twice_the_gradients_over_the_slower_link():
    device = find_device("h100")
    inside, last = all_reduce_seconds(1e9, device, 8)
    across, _ = all_reduce_seconds(1e9, device, 16)
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / (0.8 * device.link), rel=0.6)
    assert across / inside > 0.5 * device.link / device.network
    assert 0 < last < inside
    assert all_reduce_seconds(BUCKET, device, 1) == (0, 0)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    config, work = planned("gpt2-124m")
    device = find_device("l4")
    most = largest_micro_batch(config, work, 4, device)
    for size, fits in ((most, True), (most + 1, False)):
        at, _ = planned("gpt2-124m", micro_batch_size=size)
        assert (training_memory(at, work, 4).total <= device.memory) is fits


def test_twice_the_load_takes_twice_the_replicas():
    _, work = planned("foundry-124m")
    device = find_device("l4")
    few, many = (serving(work, device, assumed_rates(device), 16, 256, 128, load) for load in (300, 600))
    assert few.replicas > 1
    assert many.replicas == pytest.approx(2 * few.replicas, abs=1)
    assert few.replicas == math.ceil(300 / (0.7 * few.requests_per_second))


def test_torchs_names_of_gpus_are_recognised():
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA L40S": "L40S", "NVIDIA L4": "L4"}
    names |= {"NVIDIA A100-SXM4-40GB": "A100", "NVIDIA GeForce RTX 4090": "RTX 4090"}
    assert {name: device_called(name).name for name in names} == names  # type: ignore[union-attr]
    for other in ("NVIDIA GeForce GTX 1080", "NVIDIA L40", "NVIDIA GH200 480GB"):
        assert device_called(other) is None
    assert find_device("rtx4090") is find_device("RTX-4090")


# --- at the keyboard --------------------------------------------------------------------------------------------


def test_the_plan_shows_memory_speed_time_cost_and_bottleneck(capsys: pytest.CaptureFixture[str]):
    assert main(["--preset", "foundry-124m", "--gpus", "8", "--gpu", "h200", "--load", "2000"]) == 0
    said = capsys.readouterr().out
    for words in ("8 x H200", "GiB: fits", "tokens/s", "GPU-hours", "dollars", "Communication-bound from", "replicas"):
        assert words in said
    assert "assumed from its data sheet" in said


def test_a_price_scales_the_cost_and_json_has_the_figures(capsys: pytest.CaptureFixture[str]):
    def cost(price: str) -> float:
        assert main(["--preset", "gpt2-124m", "--gpus", "8", "--gpu", "l4", "--price", price, "--json"]) == 0
        return float(json.loads(capsys.readouterr().out)["plan"]["cost"])

    assert cost("2") == pytest.approx(2 * cost("1"))


def test_the_plan_has_the_services_settings_and_the_price_of_its_tokens(capsys: pytest.CaptureFixture[str]):
    flags = ["--preset", "foundry-124m", "--gpu", "l4", "--load", "200", "--price", "0.5"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "min_replicas=2 max_replicas=5 slots=64 target_ongoing_requests=44.8\n" in said
    assert load_settings(dict(pair.split("=") for pair in said.splitlines()[-1].split()), {}).target_ongoing == 44.8
    assert main([*flags, "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["serving"]
    tokens = 3600 * served["load"] * served["new_tokens"]
    assert served["dollars_per_million"] == pytest.approx(served["replicas"] * 0.5 / tokens * 1e6)
    assert main(["--gpu", "l4", "--load", "5"]) == 0
    said = capsys.readouterr().out
    assert "per million" not in said  # the price is not known
    assert "min_replicas=1 max_replicas=1" in said


def test_the_plan_says_that_a_model_does_not_fit(capsys: pytest.CaptureFixture[str]):
    big = [
        "--preset",
        "foundry-124m",
        "--hidden-size",
        "8192",
        "--num-layers",
        "40",
        "--num-heads",
        "64",
        "--gpu",
        "h100",
    ]
    assert main([*big, "--gpus", "1"]) == 0
    assert "DOES NOT FIT; micro-batch up to 0 would" in capsys.readouterr().out
    assert main([*big, "--gpus", "16", "--parallel", "ddp", "--micro-batch-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT; micro-batch up to 0 would" in said
    assert "--parallel fsdp would fit" in said


EIGHT_BILLION = "--preset foundry-124m --hidden-size 4096 --num-layers 36 --num-heads 32 --num-kv-heads 8 --gpu h100"


def chosen(capsys: pytest.CaptureFixture[str], arguments: str) -> tuple[int, str, int]:
    """(GPUs, parallel, micro-batch) of the plan."""
    assert main([*arguments.split(), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    return plan["workers"], plan["parallel"], plan["micro_batch"]


def test_what_is_left_open_is_the_fewest_gpus_that_fit_and_ddp_before_fsdp(capsys: pytest.CaptureFixture[str]):
    assert chosen(capsys, "--preset foundry-124m --gpu h100") == (1, "ddp", 16)
    assert chosen(capsys, "--preset foundry-124m --gpu h100 --gpus 8")[:2] == (8, "ddp")
    assert chosen(capsys, "--preset foundry-124m --gpu h100 --num-workers 4 --use-gpu")[:2] == (4, "ddp")
    gpus, parallel, micro = chosen(capsys, EIGHT_BILLION)
    assert (gpus, parallel) == (2, "fsdp")
    assert 1 <= micro < 16  # the preset's does not fit
    assert chosen(capsys, f"{EIGHT_BILLION} --gpus 8 --micro-batch-size 16")[2] == 16  # the user's stays
    assert chosen(capsys, f"{EIGHT_BILLION} --micro-batch-size {micro + 1}")[0] > gpus


def test_the_plan_says_what_it_chose_and_why(capsys: pytest.CaptureFixture[str]):
    assert main(EIGHT_BILLION.split()) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"chosen    2 GPUs, the fewest that fit; fsdp, since ddp needs [0-9.]+ GiB; \d+ sequences? at", said
    )
    assert re.search(r"flags     --num-workers 2 --use-gpu --parallel fsdp --micro-batch-size \d+\n", said)
    assert main([*EIGHT_BILLION.split(), "--gpus=8", "--parallel=fsdp", "--micro-batch-size=1"]) == 0
    said = capsys.readouterr().out
    assert "chosen" not in said
    assert "flags     --num-workers 8 --use-gpu --parallel fsdp\n" in said


def test_a_model_that_fits_nowhere_is_planned_for_all_gpus(capsys: pytest.CaptureFixture[str]):
    assert main([*EIGHT_BILLION.split(), "--batch-size=2", "--gpu=l4", "--max-steps=10"]) == 0
    said = capsys.readouterr().out
    assert "2 GPUs, and none fits" in said
    assert "DOES NOT FIT" in said


def test_fsdp_divides_weights_gradients_and_optimizer_state():
    config, work = planned("foundry-124m", parallel="fsdp")
    few, many = (training_memory(config, work, n) for n in (2, 8))
    whole = training_memory(planned("foundry-124m")[0], work, 2)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(many, name) == pytest.approx(getattr(few, name) / 4, rel=0.01)
        assert getattr(few, name) == pytest.approx(getattr(whole, name) / 2, rel=0.01)
    assert whole.buckets > 0 == many.buckets
    assert many.gathered > 4 * work.outside


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_gradients_take_less_time(parallel: str):
    device = find_device("h100")

    def step(**settings: Any) -> Any:
        config, work = planned("foundry-124m", parallel=parallel, **settings)
        return training_step(config, work, device, assumed_rates(device), 64)

    full, half = step(), step(reduce_precision="bf16")
    assert half.gradients < (0.55 if parallel == "ddp" else 0.9) * full.gradients
    assert half.waiting < full.waiting


def test_the_plan_counts_the_operations_that_muon_makes():
    for shape in ((24, 24), (24, 64), (64, 24)):
        assert newton_schulz_flops(shape) == muon.work(shape)


def test_workers_share_muons_products():
    config, work = planned("foundry-124m", hidden_size=2048, num_layers=24, num_heads=16)
    device = find_device("h100")
    alone, eight = (optimizer_seconds(config, work, assumed_rates(device), device, n) for n in (1, 8))
    assert alone / 8 < eight < alone / 3


def test_the_plan_has_one_gpu_per_worker(capsys: pytest.CaptureFixture[str]):
    assert main(["--num-workers", "2:4", "--use-gpu"]) == 0
    assert "4 x H100" in capsys.readouterr().out


def test_the_default_request_fits_a_short_context_and_the_slots_the_memory(capsys: pytest.CaptureFixture[str]):
    def served(*flags: str) -> dict[str, Any]:
        assert main(["--load", "5", "--json", *flags]) == 0
        return dict(json.loads(capsys.readouterr().out)["serving"])

    assert (served()["prompt_tokens"], served()["new_tokens"], served()["slots"]) == (128, 64, 64)
    assert served("--preset=foundry-124m")["prompt_tokens"] == 256
    wide = ["--preset=foundry-124m", "--gpu=l4", "--context-length=32768"]
    assert 1 <= served(*wide)["slots"] < 16


def test_the_plan_promises_nothing_about_a_text_that_may_end_first(capsys: pytest.CaptureFixture[str]):
    assert main(["--max-steps=10", "--max-epochs=1"]) == 0
    assert "at most 10 steps" in capsys.readouterr().out
    assert main(["--max-steps=10"]) == 0
    assert "at most" not in capsys.readouterr().out


def test_a_failed_measurement_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # what starts there ends at once
    assert main(["--gpu", "here"]) == 2
    assert re.search(r"^error: this machine cannot be measured: .+\n$", one_error(capsys.readouterr().err))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu h300", r"gpu is 'h300'; expected here .*\. Did you mean 'h200'\?"),
        ("--gpus 9", r"gpus is 9; expected 1 to 8, since a step has batch_size 8 sequences to divide"),
        ("--gpus 0", "gpus is 0; expected 1 to 8"),
        ("--precision fp32", "precision is 'fp32', but the plan is only for bf16"),
        ("--device cpu", "device is 'cpu', but the plan is for the device of --gpu"),
        ("--sequence-length 4096", "sequence_length 4096 is more than the model's context_length 256"),
        ("--preset foundry-124m --gpu l4 --load 9 --slots 5000", "slots is 5000; expected at most [0-9]+, since L4"),
        ("--gpus two", "argument --gpus: invalid int value"),
        ("--price -1", "price is -1.0; expected more than 0"),
        ("--load 5 --prompt-tokens 400", r"prompt_tokens \+ new_tokens is 464; expected at most .* 256"),
        ("--max-epochs 2", "depends on its text; give --max-tokens or --max-steps"),
        ("--prset mini", r"unknown argument '--prset'\. Did you mean '--preset'\?"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(message, one_error(said.err))


def test_the_plan_uses_the_vocabulary_size_of_a_run():
    assert padded(50257) == 50304
