"""What a checkpoint costs a run: `python -m bench.checkpoint [--SETTING VALUE ...]`.

Trains the preset tiny (or what the settings say) with torch alone, saves after some steps, and prints how long a step
takes, how long the run stands still for a checkpoint, and how long the checkpoint takes to be written.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

from gptcore.devices import pick_device
from train_job.cli import parse_settings
from train_job.config import build_config
from train_job.data.inputs import build_model, prepare_inputs
from train_job.training.events import CheckpointDue, Progress
from train_job.training.loop import Trainer
from train_job.training.writer import CheckpointWriter

STEPS, EVERY = 25, 5


def main(argv: Sequence[str] | None = None) -> int:
    given = {"preset": "tiny", "data": "shakespeare", "log_interval": 1, "eval_interval": STEPS, "max_steps": STEPS}
    given |= {"checkpoint_interval": EVERY, "sample_tokens": 0, "name": "bench"}
    settings = parse_settings(sys.argv[1:] if argv is None else list(argv))
    with tempfile.TemporaryDirectory() as storage:
        config = build_config(given, settings, {"storage_path": storage})
        inputs = prepare_inputs(config)
        config = replace(inputs.config, val_fraction=config.val_fraction)
        device = pick_device(config.device)
        trainer = Trainer(config, build_model(config, inputs.model), inputs.train, inputs.validation, device)
        writer = CheckpointWriter(config, trainer.identity("bench"), "bench", print)
        steps: list[float] = []
        after: list[float] = []
        stopped: list[float] = []
        saved = False
        for event in trainer.run():
            if isinstance(event, Progress):
                (after if saved else steps).append(trainer.tokens_per_step / event.tokens_per_second)
                saved = False
            if isinstance(event, CheckpointDue) and event.step < STEPS:
                clock = time.perf_counter()
                writer.save(trainer)
                stopped.append(time.perf_counter() - clock)
                saved = True
        clock = time.perf_counter()
        writer.save(trainer)
        writer.wait()
        written = time.perf_counter() - clock
    figures = {
        "step_seconds": statistics.median(steps[1:]),
        "step_beside_writing_seconds": statistics.median(after),
        "run_stands_still_seconds": statistics.median(stopped[1:]),
        "written_after_seconds": written,
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.tensors().values())
    print(f"{config.preset}: a checkpoint of {size / 2**20:,.0f} MiB")
    for name, seconds in figures.items():
        print(f"  {name.removesuffix('_seconds').replace('_', ' '):32}{seconds * 1e3:8.0f} ms")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
