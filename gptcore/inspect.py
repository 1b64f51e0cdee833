"""Says what a model is, and what it needs in memory to be served and to be trained, on the command line.

    python -m gptcore.inspect hf:Qwen/Qwen3-0.6B

Takes the name of a package (see gptcore.hub). If the model cannot be used, the reason is one line on stderr, and the
exit code is 2.
"""

import sys
from dataclasses import dataclass, replace

import torch

from gptcore.chat import chat_template
from gptcore.cli import Parser
from gptcore.config import Lora, ModelConfig
from gptcore.devices import pick_device, pick_dtype
from gptcore.engine.native import packed_bytes
from gptcore.engine.runners import SEQUENCES, check_memory, fit_context, slot_bytes, used_weights
from gptcore.engine.settings import EngineSettings
from gptcore.errors import FoundryError, NoMemory
from gptcore.hf_format import count_parameters
from gptcore.hub import KINDS, resolve
from gptcore.lora import check_adapters
from gptcore.package import Package, describe, open_package
from gptcore.units import gib

TRAINED_BYTES = 16
"""Of each parameter in training: the weight, its gradient and two moments of AdamW, in fp32."""
ADAPTERS = Lora(rank=16, alpha=32.0)


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes in memory."""

    weights: int
    """In bf16, as it is served."""
    token: int
    """Keys and values of one token, in bf16."""
    sequence: int
    """Those of a whole context."""
    training: int
    """Weights, gradients and AdamW's state in fp32. Activations come on top; they depend on the batch."""
    tuning: int
    """The same of ADAPTERS beside frozen weights in bf16."""


def needs(config: ModelConfig) -> Needs:
    """What a model of this shape needs."""
    parameters, sequence = count_parameters(config), slot_bytes(config, torch.bfloat16)
    tuning = 2 * parameters + TRAINED_BYTES * check_adapters(config, adapters(config))
    return Needs(2 * parameters, sequence // config.context_length, sequence, TRAINED_BYTES * parameters, tuning)


def adapters(config: ModelConfig) -> Lora:
    """ADAPTERS, with a lower rank if the model has matrices with a shorter side."""
    return replace(ADAPTERS, rank=min(ADAPTERS.rank, config.hidden_size, config.kv_heads * config.head_size))


def report(package: Package) -> str:
    """A few lines for people."""
    config, need = package.config, needs(package.config)
    weights = used_weights(package, EngineSettings(), pick_device("auto"))
    served = packed_bytes(config, torch.bfloat16, weights)
    return f"""{describe(package)}
to serve: {gib(served)} GiB of weights in {weights or "bfloat16"}, and {need.token / 2**10:,.0f} KiB for each \
token in a sequence, {gib(need.sequence)} GiB for {config.context_length:,}
here: {served_here(package)}
to train: {gib(need.training)} GiB for weights, gradients and AdamW's state in fp32, and activations, which depend on \
the batch (train_job/plan.py computes them); {gib(need.tuning)} GiB with --lora-rank {adapters(config).rank} in \
bfloat16
to chat: {chats(package)}"""


def chats(package: Package) -> str:
    """Whether it has a chat template, and whether that works here."""
    try:
        template = chat_template(package.tokenizer)
        if template is None:
            return "no: it has no chat template, so it only continues text"
        tokens = template.encode([{"role": "user", "content": "Hello"}])
    except FoundryError as error:
        return f"no: {error}"
    return f"by its own template, which makes {len(tokens)} tokens of a user's Hello"


def served_here(package: Package) -> str:
    """What a service with default settings would do on this machine, or why it cannot."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    try:
        fitted = fit_context(package, EngineSettings(), device, dtype)
        weights = used_weights(package, EngineSettings(), device)
        check_memory(fitted, device, dtype, native=device.type == "cpu", weights=weights)
    except NoMemory as error:
        return str(error)
    length, whole = fitted.config.context_length, package.config.context_length
    context = f"{length:,} of {whole:,}" if length < whole else f"all {whole:,}"
    kind = str(dtype).removeprefix("torch.") + (f" with weights in {weights}" if weights else "")
    return f"in {kind} on {device.type}, at least {SEQUENCES} sequences of {context} tokens fit into the free memory"


def main(argv: list[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    parser = Parser(prog="python -m gptcore.inspect", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="PACKAGE_OR_URI", help=KINDS)
    try:
        print(report(open_package(resolve(parser.parse_args(argv).model), verify=False)))
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
