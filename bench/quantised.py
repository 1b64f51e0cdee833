"""Measures what quantised weights cost in quality: `python -m bench.quantised PACKAGE --data FILE`.

Without a package, a model of the preset quick is trained on the rest of the corpus first, by torch alone. The end of
the corpus, at most `--bytes` of it, is read in windows of the model's context, each behind the end-of-text token. For
the engine in fp32, bf16, int8 and int4, and for llama.cpp in bf16, q8_0 and q4_0, it reports bits per byte and how much
more that is than the engine's in fp32. `--text FILE` adds int4 with values chosen by that text, as
`python -m gptcore.quantise` does. It prints one JSON line last.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.peers.llama_cpp import open_decoder
from bench.peers.task import DecodeTask
from bench.time_to_quality import parse_change
from bench.turns import cores
from gptcore import hub
from gptcore.engine import EngineSettings, Request
from gptcore.engine.engine import Engine
from gptcore.errors import FoundryError, PackageError
from gptcore.package import Package, open_package, save_package
from gptcore.quantise import quantise_package, read_text
from gptcore.sampling import SamplingParams
from train_job.config import build_config
from train_job.data.corpus import open_corpus, split
from train_job.data.inputs import build_model, prepare_inputs
from train_job.training.events import Evaluation
from train_job.training.loop import Trainer

ENGINE = {"fp32": ("float32", ""), "bf16": ("bfloat16", ""), "int8": ("float32", "int8"), "int4": ("float32", "int4")}
"""Name -> dtype and weights."""
LLAMA_CPP = {"bf16": "bfloat16", "q8_0": "int8", "q4_0": "int4"}
"""Name -> precision of the peer."""
HELD_OUT = 0.1
"""The share of a corpus that a run keeps for validation by default."""


def main(argv: list[str] | None = None) -> int:
    """Prints the table and the JSON line. Returns 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PACKAGE_OR_URI", nargs="?", help=f"{hub.KINDS}; else one is trained")
    parser.add_argument("--data", default="shakespeare", help="corpus, as for train_job/run.py")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="add int4 chosen by this text, which is not measured on"
    )
    parser.add_argument("--bytes", type=int, default=100_000, help="at most so much of its end")
    parser.add_argument("--steps", type=int, default=150, help="of training, without a package")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of training to change from their defaults"
    )
    arguments = parser.parse_args(argv)
    for name in ("bytes", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"argument --{name}: {getattr(arguments, name)}; expected at least 1")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            if arguments.model:
                package = open_package(hub.resolve(arguments.model))
                if package.weights:
                    raise PackageError(
                        f"{package.path} stores {package.weights}; take the package that it was made from"
                    )
            else:
                settings = dict(data=arguments.data, max_steps=arguments.steps, eval_interval=arguments.steps)
                package = trained(settings | dict(map(parse_change, arguments.set)), Path(scratch))
            text = held_out(arguments.data, arguments.bytes, Path(scratch))
            chosen = None
            if arguments.text:
                chosen = quantise_package(package, Path(scratch) / "chosen", "int4", read_text(arguments.text))
            report = measure(package, text, scratch, chosen)
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"bench": "quantised", "model": arguments.model, "bytes": len(text.encode()), **report}))
    return 0


def held_out(data: str, most: int, cache: Path) -> str:
    """The last `most` bytes of the corpus, or its validation split if that is shorter."""
    _, validation = split(open_corpus(data, cache_dir=cache), HELD_OUT)
    return "\n".join(validation.documents()).encode()[-most:].decode(errors="ignore")


def trained(settings: dict[str, Any], scratch: Path) -> Package:
    """A model that has learned from the corpus without its last tenth."""
    config = build_config(settings | {"cache_dir": str(scratch)})
    inputs = prepare_inputs(config)
    model = build_model(inputs.config, inputs.model)
    trainer = Trainer(inputs.config, model, inputs.train, inputs.validation, torch.device("cpu"))
    for event in trainer.run():
        if isinstance(event, Evaluation):
            print(f"step {event.step} {event.bits_per_byte:.4f} bits/byte", flush=True)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return save_package(scratch / "package", inputs.model, state, inputs.tokenizer, {"step": event.step})


def measure(package: Package, text: str, scratch: str, chosen: Package | None = None) -> dict[str, Any]:
    """Bits per byte of each contestant; `chosen` is the package in int4 by a text."""
    ids, eot = package.tokenizer.encode(text), package.tokenizer.eot
    length = package.config.context_length - 1
    windows = [[eot, *ids[i : i + length]] for i in range(0, len(ids), length)]
    found: dict[str, float] = {}

    def report(name: str, nats: Callable[[list[int]], float]) -> None:
        found[name] = sum(map(nats, windows)) / math.log(2) / len(text.encode())
        worse = found[name] / found["engine fp32"] - 1
        print(f"{name:18}{found[name]:10.5f} bits per byte{worse:+10.3%}", flush=True)

    for name, (dtype, weights) in ENGINE.items():
        report(f"engine {name}", by_engine(package, dtype, weights))
    if chosen:
        report("engine int4 text", by_engine(chosen, "float32", ""))
    task = DecodeTask(str(package.path), scratch, 1, length + 1, 1, cores(), package.config.vocab_size)
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is not installed: pip install -c constraints.txt -e '.[bench]'")
        absent = {f"llama.cpp {name}": "not installed: llama_cpp" for name in LLAMA_CPP}
        return {name: round(value, 5) for name, value in found.items()} | {"absent": absent}
    for name, precision in LLAMA_CPP.items():
        report(f"llama.cpp {name}", open_decoder(task, precision).nats)
    return {name: round(value, 5) for name, value in found.items()}


def by_engine(package: Package, dtype: str, weights: str) -> Callable[[list[int]], float]:
    """What a window's tokens, after the first, cost in nats."""
    settings = EngineSettings(device="cpu", backend="native", dtype=dtype, weights=weights, slots=1)
    engine = Engine(package, settings)

    def nats(window: list[int]) -> float:
        engine.add(Request("0", tuple(window), SamplingParams(), prompt_logprobs=True, prompt_only=True))
        updates = []
        while engine.busy:
            updates += engine.step()
        return -sum(entry.logprob or 0.0 for update in updates for entry in update.prompt_logprobs)

    return nats


if __name__ == "__main__":
    torch.set_num_threads(cores())
    sys.exit(main())
