"""What Ray costs: steady-state tokens/s of the job against the bare loop, same config, in turn, in one run.

`python -m bench.ray_overhead` trains bare, through the job (Ray Train, MLflow, checkpoints and all), and bare again.
Steady state: the median over log intervals, the first two left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train_job.config import build_config
from train_job.hardware import pick_device
from train_job.inputs import build_model, prepare_inputs
from train_job.loop import Progress, Trainer

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
"""Log intervals that do not count."""


def main(argv: list[str] | None = None) -> int:
    """Prints the ratio job / bare as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.ray_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin", help="corpus, as for train_job/run.py")
    parser.add_argument("--steps", type=int, default=120, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="times that the job is run between bare ones")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        settings = dict(data=arguments.data, max_steps=arguments.steps, eval_interval=arguments.steps, sample_tokens=0)
        bare = [bare_loop(settings, Path(home))]
        job = []
        for n in range(arguments.rounds):
            job.append(ray_job(settings, Path(home), f"round-{n}"))
            bare.append(bare_loop(settings, Path(home)))
    report = {
        "bench": "ray_overhead",
        "job_tokens_per_second": [round(rate) for rate in job],
        "bare_tokens_per_second": [round(rate) for rate in bare],
        "ratio": round(statistics.mean(job) / statistics.mean(bare), 4),
        "bare_drift": round(bare[-1] / bare[0], 4),
    }
    print(json.dumps(report))
    return 0


def bare_loop(settings: dict[str, Any], home: Path) -> float:
    """Median tokens/s of the loop in a process of its own, as the job's worker is."""
    command = [sys.executable, "-m", "bench.ray_overhead", "bare", json.dumps(settings | {"cache_dir": str(home)})]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return steady([float(line) for line in done.stdout.split()])


def print_bare(settings: dict[str, Any]) -> None:
    """The loop's rate at every log interval, a line each."""
    config = build_config(settings)
    inputs = prepare_inputs(config)
    trainer = Trainer(config, build_model(config, inputs.model), inputs.train, inputs.validation, pick_device(config))
    for event in trainer.run():
        if isinstance(event, Progress):
            print(event.tokens_per_second)


def ray_job(settings: dict[str, Any], home: Path, name: str) -> float:
    """Median tokens/s that the job logs to MLflow."""
    from mlflow import MlflowClient

    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    env = os.environ | {"GPT_FOUNDRY_HOME": str(home), "RAY_ADDRESS": "local"}
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "train_job/run.py", *flags, f"--name={name}"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    record = json.loads((home / "runs" / name / "run.json").read_text())
    points = MlflowClient(record["tracking_uri"]).get_metric_history(record["run_id"], "tokens_per_second")
    return steady([point.value for point in points])


def steady(rates: list[float]) -> float:
    """The median without the warm-up."""
    return statistics.median(rates[WARM_UP:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        print_bare(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
