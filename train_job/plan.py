"""Estimates what a run or a service needs: `python -m train_job.plan --gpus 8 --gpu h200 …`.

In: the settings of a run, a kind and number of GPUs, and optionally a load to serve. Out: memory per GPU, tokens/s,
time, cost, and the number of GPUs from which a step is communication-bound. `train_job.planning.costs` has the
formulas, docs/scaling.md explains them. Nothing is trained; `--gpu here` measures this machine for a few seconds.
"""

import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptcore.engine.runners import SHARE
from gptcore.engine.settings import MOST_SLOTS, UTILISATION
from gptcore.errors import ConfigError, FoundryError
from gptcore.progress import doing
from gptcore.units import count, gib
from train_job.cli import Help, Parser, format_examples, parse_settings
from train_job.config import TUNED_LENGTH, UNBOUNDED, TrainConfig, build_config
from train_job.planning.choice import Choice, choose, doublings
from train_job.planning.costs import (
    Memory,
    Serving,
    Step,
    Workload,
    largest_micro_batch,
    micro_batch,
    serving,
    training_memory,
    training_step,
    workload,
)
from train_job.session.console import lasting_output, model_text
from train_job.training.devices import Device, Rates, assumed_rates, find_device

EXAMPLES = {
    "--gpu here": "the preset quick on this machine, measured",
    "--preset foundry-124m --gpus 8 --gpu h200": "a full-sized model on rented GPUs",
    "--preset foundry-124m --hidden-size 4096 --num-heads 32": "how many GPUs a larger one needs",
    "--preset foundry-124m --gpu l4 --load 200": "and the replicas that serve 200 requests per second",
}
FAILURE_GPU_HOURS = 50_700
"""GPU-hours between interruptions: 419 in 54 days of 16,384 H100s (Llama 3, Dubey et al. 2024)."""


@dataclass(frozen=True)
class PlanOptions:
    """The command line without the settings of the run."""

    gpus: int | None
    gpu: str
    price: float | None
    load: float | None
    prompt_tokens: int | None
    new_tokens: int | None
    slots: int | None
    as_json: bool


@dataclass(frozen=True)
class TrainingPlan:
    """The estimates for a run on some number of GPUs."""

    workers: int
    memory: Memory
    step: Step
    tokens_per_second: float
    mfu: float | None
    """Share of the device's peak; None if unknown."""
    steps: int
    hours: float
    cost: float | None
    """Dollars."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan; returns the exit code, 2 for wrong input."""
    try:
        options, given = parse(sys.argv[1:] if argv is None else argv)
        config, work = planned(given)
        if options.gpus is not None and not 1 <= options.gpus <= config.batch_size:
            raise ConfigError(
                f"gpus is {options.gpus}; expected 1 to {config.batch_size}, since a step has batch_size "
                f"{config.batch_size} sequences to divide"
            )
        device, rates = device_of(options, work, options.gpus or config.workers[1])
        choice = choose(config, given, work, device, options.gpus)
        config = choice.config
        plan = make_plan(config, work, device, rates, choice.gpus)
        served = serve_plan(options, work, device, rates) if options.load is not None else None
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    if options.as_json:
        shown = {"device": asdict(device), "rates": asdict(rates), "plan": asdict(plan)}
        shown["plan"] |= {"parallel": config.parallel, "micro_batch": micro_batch(config, choice.gpus)}
        shown["plan"] |= {"memory_bytes": plan.memory.total, "step_seconds": plan.step.seconds}
        print(json.dumps(shown | ({"serving": asdict(served)} if served else {})))
        return 0
    show_training(choice, work, device, rates, plan)
    if served:
        show_serving(work, device, served)
    return 0


def parse(argv: Sequence[str]) -> tuple[PlanOptions, dict[str, Any]]:
    """The command's own options, and the settings of the run. Raises ConfigError."""
    command = "python -m train_job.plan"
    parser = Parser(
        prog=command,
        usage=f"{command} [--gpu NAME] [--gpus N] [--load N] [--SETTING VALUE ...]",
        description="Estimates memory, speed, time and cost of a run. Accepts every setting of train_job/run.py.\n"
        "Chooses the number of GPUs, and whether they divide the model, where these are left open.\n\n"
        + format_examples(command, EXAMPLES),
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="INT",
        help="GPUs that train together [default: num_workers, or what fits]",
    )
    parser.add_argument("--gpu", default="h100", help="b200, h200, h100, a100 …, or here: measured [default: h100]")
    parser.add_argument("--price", type=float, metavar="FLOAT", help="dollars per GPU-hour; default: a typical price")
    parser.add_argument("--load", type=float, metavar="FLOAT", help="also plan a service for this many requests/s")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="INT", help="prompt tokens per request [default: 256, or half the context]"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        metavar="INT",
        help="new tokens per request [default: 128, or a quarter of the context]",
    )
    parser.add_argument("--slots", type=int, metavar="INT", help="sequences that a replica decodes together")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one line of JSON instead of text")
    known, rest = parser.parse_known_args(argv)
    for name in ("price", "load", "prompt_tokens", "new_tokens", "slots"):
        value = getattr(known, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; expected more than 0, and finite")
    return PlanOptions(**vars(known)), parse_settings(rest)


def planned(given: dict[str, Any]) -> tuple[TrainConfig, Workload]:
    """The run's config and its workload; a parent has its own shape. Raises ConfigError."""
    from gptcore.tokenizer import parse_tokenizer
    from train_job.data.inputs import check_context, padded

    config = build_config(given)
    if config.precision == "fp32":
        raise ConfigError("precision is 'fp32', but the plan is only for bf16; expected bf16 or auto")
    if config.device != "auto":
        raise ConfigError(f"device is {config.device!r}, but the plan is for the device of --gpu; expected auto")
    if config.lora:
        raise ConfigError(f"lora_rank is {config.lora_rank}, but the plan is for training all weights; leave it out")
    if config.init_from:
        from gptcore.hub import resolve
        from gptcore.package import open_package

        shape = open_package(resolve(config.init_from)).config
        config = replace(config, sequence_length=config.sequence_length or min(shape.context_length, TUNED_LENGTH))
    else:
        shape = config.model_config(padded(parse_tokenizer(config.tokenizer)))
    check_context(config, shape)
    return config, workload(shape, config.context)


def device_of(options: PlanOptions, work: Workload, gpus: int) -> tuple[Device, Rates]:
    """The named GPU, or this machine's device, with its rates. Raises ConfigError."""
    if options.gpu == "here":
        from train_job.planning.rates import measure_in_subprocess

        with doing("measuring this machine: training, then decoding"):
            device, rates = measure_in_subprocess(work.model.family)
        if device.per_machine < min(gpus, 2):
            raise ConfigError(f"gpus is {gpus}, but this machine trains on its {device.name}; expected 1, or a --gpu")
    else:
        device = find_device(options.gpu)
        rates = assumed_rates(device)
    return (replace(device, price=options.price) if options.price else device), rates


def make_plan(config: TrainConfig, work: Workload, device: Device, rates: Rates, workers: int) -> TrainingPlan:
    """The estimates for this number of workers. Raises ConfigError if the run's length is not known in tokens."""
    step = training_step(config, work, device, rates, workers)
    per_step = config.batch_size * work.length
    rate = per_step / step.seconds
    steps = planned_steps(config)
    hours = steps * step.seconds / 3600
    peak = device.flops * workers if device.per_machine > 1 else None
    return TrainingPlan(
        workers,
        training_memory(config, work, workers),
        step,
        rate,
        rate * work.flops_per_token / peak if peak else None,
        steps,
        hours,
        hours * workers * device.price if device.price else None,
    )


def planned_steps(config: TrainConfig) -> int:
    """Steps until the first limit that does not depend on the text. Raises ConfigError."""
    steps, _ = config.planned_steps()
    if steps == UNBOUNDED:
        raise ConfigError("the length of this run depends on its text; give --max-tokens or --max-steps")
    return steps


def serve_plan(options: PlanOptions, work: Workload, device: Device, rates: Rates) -> Serving:
    """Replicas for the load. Raises ConfigError if a request does not fit the model, or the slots the memory."""
    context = work.model.context_length
    prompt = options.prompt_tokens or min(256, context // 2)
    new = options.new_tokens or min(128, context // 4)
    if prompt + new > context:
        raise ConfigError(
            f"prompt_tokens + new_tokens is {prompt + new}; expected at most the model's context of {context}"
        )
    weights = 2 * work.read_weights
    fit = max(0, int((device.memory - weights) / (context * work.cache_bytes)))
    if (options.slots or 1) > fit:
        raise ConfigError(
            f"slots is {options.slots or 1}; expected at most {fit}, since {device.name} has {gib(device.memory)} GiB "
            f"and the weights take {gib(weights)} of them"
        )
    usual = MOST_SLOTS.get(device.name, MOST_SLOTS["cuda"])
    slots = options.slots or max(1, min(usual, int(SHARE * fit)))
    return serving(work, device, rates, slots, prompt, new, options.load or 0)


# --- printing ------------------------------------------------------------------------------------------------------


def show_training(choice: Choice, work: Workload, device: Device, rates: Rates, plan: TrainingPlan) -> None:
    """Prints the run on the requested GPUs, then on fewer and more."""
    config, model, micro = choice.config, work.model, micro_batch(choice.config, plan.workers)
    print(f"model     {model_text(config, model, work.parameters)}")
    print(f"device    {f'{plan.workers} x ' if plan.mfu else ''}{device.name}; rates {rates.source}")
    if choice.reasons:
        print(f"chosen    {'; '.join(choice.reasons)}")
    if device.per_machine > 1:
        print(f"flags     {choice.flags}")
    share = math.ceil(config.batch_size / plan.workers)
    print(f"step      {config.batch_size} sequences of {work.length:,} tokens; {share} a worker, {micro} at a time")
    parts = ", ".join(f"{name} {gib(size)}" for name, size in vars(plan.memory).items() if size >= 2**20)
    room = device.memory - plan.memory.total
    most = largest_micro_batch(config, work, plan.workers, device)
    fits = "fits" if room >= 0 else "DOES NOT FIT"
    print(f"memory    {gib(plan.memory.total)} of {gib(device.memory)} GiB: {fits}; micro-batch up to {most} would")
    print(f"          {parts}")
    sharded = training_memory(replace(config, parallel="fsdp"), work, plan.workers).total
    if room < 0 and config.parallel == "ddp" and sharded <= device.memory:
        print(f"          --parallel fsdp would fit: {gib(sharded)} GiB")
    used = f", {plan.mfu:.0%} of the peak" if plan.mfu else ""
    print(f"speed     {count(plan.tokens_per_second)} tokens/s{used}; a step takes {milliseconds(plan.step.seconds)}")
    print(f"          {', '.join(f'{name} {milliseconds(s)}' for name, s in spent(plan.step).items())}")
    steps = f"{'at most ' if config.max_epochs else ''}{plan.steps:,} steps"  # epochs of a short text end it earlier
    print(f"run       {steps}, {count(plan.steps * config.batch_size * work.length)} tokens: {cost(plan)}")
    lost = plan.hours * plan.workers / FAILURE_GPU_HOURS
    if device.per_machine == 1:
        return
    print(f"          {lost:.2g} interruptions expected; each loses the steps since the last checkpoint")
    print("\n   gpus    tokens/s   of linear     hours   GPU-hours    dollars   GiB each  a step waits")
    asked = "this plan" if choice.reasons else "asked for"
    alone = make_plan(config, work, device, rates, 1)
    for workers in sorted({*doublings(config.batch_size), plan.workers}):
        row = make_plan(config, work, device, rates, workers)
        mark = f"  <- {asked}" if workers == plan.workers else ""
        print(
            f"{workers:7} {count(row.tokens_per_second):>11}"
            f" {row.tokens_per_second / alone.tokens_per_second / workers:11.0%} {row.hours:9.2f}"
            f" {row.hours * workers:11.1f} {f'{row.cost:,.0f}' if row.cost is not None else '-':>10}"
            f" {gib(row.memory.total):>10} {row.step.waiting / row.step.seconds:6.0%}{mark}"
        )
    print(f"\n{verdict(config, work, device, rates)}")


def verdict(config: TrainConfig, work: Workload, device: Device, rates: Rates) -> str:
    """The number of GPUs from which a step is communication-bound, as text."""
    for workers in doublings(config.batch_size)[1:]:
        step = training_step(config, work, device, rates, workers)
        if step.waiting > 0.25 * step.seconds:
            sent = "weights and gradients" if config.parallel == "fsdp" else "gradients"
            return (
                f"Communication-bound from {workers} GPUs on: sending {sent} takes {milliseconds(step.gradients)} "
                f"there, and computing hides {milliseconds(step.gradients - step.waiting)} of it. "
                "A larger batch_size raises that number."
            )
    return f"Not communication-bound up to {config.batch_size} GPUs, where each has one sequence of a step."


def show_serving(work: Workload, device: Device, served: Serving) -> None:
    """Prints the replicas, and the times that a client sees."""
    each = served.slots / served.step_seconds
    tokens = f"{served.prompt_tokens} prompt and {served.new_tokens} new tokens each"
    print(f"\nserving   {served.load:g} requests/s, {tokens}")
    replicas = f"{served.replicas} replica{'s' if served.replicas != 1 else ''}"
    print(f"          {replicas}, {UTILISATION:.0%} busy, {served.slots} slots;")
    print(f"          one completes {served.requests_per_second:.3g} requests/s and decodes {count(each)} tokens/s")
    print(
        f"          first token after {milliseconds(served.first_token_seconds)} on an idle one, then one every "
        f"{milliseconds(served.step_seconds)} with its slots full"
    )
    weights, cache = 2 * work.read_weights, served.slots * work.model.context_length * work.cache_bytes
    print(f"          {gib(weights)} GiB of weights and {gib(cache)} of cache, in bf16, of {gib(device.memory)} GiB")
    if served.dollars_per_million is not None:
        hourly = served.replicas * (device.price or 0)
        print(f"          {hourly:,.2f} dollars an hour, {served.dollars_per_million:,.2g} per million new tokens")
    # If one of two replicas fails, the other answers.
    settings = f"min_replicas={min(2, served.replicas)} max_replicas={served.replicas} slots={served.slots}"
    print(f"          {settings} target_ongoing_requests={served.target_ongoing_requests:g}")


def spent(step: Step) -> dict[str, float]:
    """The named parts of a step that take at least a thousandth of it."""
    names = {
        "products": "matrix products",
        "elementwise": "elementwise",
        "softmax": "loss",
        "optimizer": "optimizer",
        "launching": "launching kernels",
        "waiting": "waiting for other GPUs",
    }
    return {words: getattr(step, n) for n, words in names.items() if getattr(step, n) > step.seconds / 1000}


def cost(plan: TrainingPlan) -> str:
    hours = f"{plan.hours:,.2f} h" if plan.hours >= 0.1 else f"{plan.hours * 60:.1f} min"
    dollars = f", {plan.cost:,.2f} dollars" if plan.cost is not None else "; --price gives a cost"
    together = f", {plan.hours * plan.workers:,.1f} GPU-hours" if plan.mfu else ""
    return f"{hours}{together}{dollars if plan.mfu or plan.cost else ''}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 1}f} ms"


if __name__ == "__main__":
    with lasting_output():
        sys.exit(main())
