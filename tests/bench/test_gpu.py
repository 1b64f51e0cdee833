"""The GPU benchmark runs from a bare checkout, and says what failed. What it measures is judged there, on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.__main__ import main
from bench.gpu.report import failures, markdown
from tests.memory import multiplies_bf16

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "H100", "kind": "cuda", "torch": "2.13", "cuda": "13", "python": "3.11"}
BARE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "mlflow", "fastapi", "pydantic", "httpx2", "transformers", "click"}:
            raise ImportError(f"{name} is not on the machine that this benchmark is for")
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
@multiplies_bf16
def test_every_part_runs_in_tiny_shapes_from_a_checkout_with_torch_alone(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GPT_FOUNDRY_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == []
    assert done.returncode == 0
    assert set(report["seconds"]) == {"correctness", "training", "decoding", "planned", "peers"}
    assert sum(check["ok"] is True for check in report["checks"].values()) == 5
    assert all(row["tokens_per_second"] > 0 for row in report["training"].values())
    assert set(report["decoding"]) == {"1", "2"}
    assert list(report["peers"]) == ["nanoGPT's loop, GPT-2 124M, trains"]
    assert report["plan"]["foundry-124m"]["measured_rates"] > 0
    assert "| foundry-124m, activation checkpointing |" in done.stdout


def test_failed_checks_parts_and_plans_are_named():
    report: dict[str, Any] = {
        "machine": MACHINE,
        "checks": {
            "forward": {"ok": True, "measured": "1e-6"},
            "resume": {"ok": False, "measured": "3 differ"},
            "sync": {"ok": None, "measured": "on CUDA alone"},
        },
        "training": {"qwen": {"error": "OutOfMemoryError: 80 GiB"}},
        "plan": {
            "near": {"seconds": 1.0, "measured_rates": 1.2, "assumed_rates": 3.0, "memory": 0.8, "compiled": False},
            "far": {"seconds": 1.0, "measured_rates": 1.3, "assumed_rates": None, "memory": 0.7, "compiled": True},
            "less": {"seconds": 1.0, "measured_rates": 1.0, "assumed_rates": None, "memory": 1.5, "compiled": True},
            "most": {"seconds": 1.0, "measured_rates": 1.0, "assumed_rates": None, "memory": 1.5, "compiled": False},
        },
        "within": 0.25,
        "errors": {"decoding": "it took longer than 110 s"},
    }
    assert failures(report) == [
        "resume",
        "decoding: it took longer than 110 s",
        "training, qwen: OutOfMemoryError: 80 GiB",
        "plan, far: measured_rates is 1.3",
        "plan, far: memory is 0.7",
        "plan, most: memory is 1.5",
    ]
    table = markdown(report)
    assert "| resume | **no** | 3 differ |" in table
    assert "| qwen | OutOfMemoryError: 80 GiB |  |  |" in table
    assert "| near | 1 | 1.2 | 3 | 0.8 |" in table


def test_a_device_that_was_named_and_is_absent_is_one_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["--device", "cuda:77"])
    assert left.value.code == 2
    assert "device is 'cuda:77', but torch sees no such device here" in capsys.readouterr().err


def test_an_unknown_part_is_one_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["--only", "speed"])
    assert left.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err
