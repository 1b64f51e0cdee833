"""Measures and checks this project on one GPU: `python -m bench.gpu`, in at most eight minutes.

Needs torch, numpy, safetensors, tiktoken, tokenizers, pyyaml, psutil and fsspec; no Ray, no MLflow. Each part runs in a
process of its own, so that one that fails leaves the others. Prints Markdown tables, and one JSON line last; exit code
1 if a check fails or a plan is off by more than a quarter. `--tiny` runs the same code in small shapes, also on a CPU.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from bench.gpu.report import failures, markdown
from bench.gpu.shapes import FULL, TINY
from gptcore.devices import pick_device
from gptcore.errors import ConfigError
from train_job.training.hardware import WORKER_ENV

PARTS = {"correctness": 80.0, "training": 170.0, "decoding": 60.0, "planned": 80.0, "peers": 90.0}
"""The parts, and how many seconds each may take."""


def main(argv: list[str] | None = None) -> int:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="run only these parts")
    parser.add_argument("--device", help="cuda, cuda:N, or cpu with --tiny; default: cuda if there is one")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the benchmark itself")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        device = pick_device(arguments.device or "cuda")
    except ConfigError as error:
        if arguments.device:
            parser.error(str(error))
        print(json.dumps({"bench": "gpu", "skipped": str(error)}))
        return 0
    if arguments.in_process:
        part = importlib.import_module(f"bench.gpu.{arguments.only[0]}")
        for found in part.measure(device, TINY if arguments.tiny else FULL):
            print(json.dumps(found), flush=True)  # at once: a part that runs out of time keeps its rows
        return 0
    report: dict[str, Any] = {"bench": "gpu", "machine": machine(device)}
    for part in arguments.only:
        began = time.perf_counter()
        print(f"{part} …", file=sys.stderr, flush=True)
        for found in in_process(part, device, arguments.tiny):
            merge(report, found)
        merge(report, {"seconds": {part: round(time.perf_counter() - began, 1)}})
    print(markdown(report))
    report["failed"] = failures(report)
    print(json.dumps(report))
    return int(bool(report["failed"]))


def in_process(part: str, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Measures one part in a process that is set up like a training worker, within its time."""
    command = [sys.executable, "-m", "bench.gpu", "--in-process", "--only", part, "--device", str(device)]
    command += ["--tiny"] * tiny
    # torch's deterministic kernels ask cuBLAS for this; the other checks are not affected.
    environment = os.environ | WORKER_ENV | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        why = ""
        try:
            code = subprocess.run(command, env=environment, stdout=out, stderr=said, timeout=PARTS[part]).returncode
        except subprocess.TimeoutExpired:
            code, why = 1, f"it took longer than {PARTS[part]:.0f} s"
        out.seek(0), said.seek(0)
        found: list[dict[str, Any]] = [json.loads(line) for line in out if line.startswith("{")]
        text = said.read()
    sys.stderr.write(text)
    if code:
        why = why or " ".join((text.splitlines() or ["no output"])[-1].split())[:300]
        found.append({"errors": {part: why}})
    return found


def merge(report: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds rows to the tables of a report."""
    for name, value in found.items():
        if isinstance(value, dict):
            report.setdefault(name, {}).update(value)
        else:
            report[name] = value


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "device": name,
        "kind": device.type,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
