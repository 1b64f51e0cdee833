"""The docs' pictures, each made by the module of its name: a real run, a real service, a real browser.

`make pictures` makes all of them again. The runs that they show are trained when first needed and kept at home under
`.cache/pictures`: preset `quick` on tiny Shakespeare, the demo's run, and the included sweep.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

from gptcore.home import home
from train_job.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
RUN = "shakespeare"


def environment() -> dict[str, str]:
    """The environment of child processes: their own home, registry and Ray, and default settings."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("GPT_FOUNDRY_")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPT_", "MLFLOW_"))} | ours
    return kept | {"GPT_FOUNDRY_HOME": str(home() / ".cache" / "pictures"), "RAY_ADDRESS": "local"}


def trained_run(name: str = RUN, *command: str) -> Path:
    """The folder of the finished run. Raises CalledProcessError if the job fails; its output is shown.

    `command` makes the run. The default is the pictures' run on tiny Shakespeare.
    """
    env = environment()
    folder = Path(env["GPT_FOUNDRY_HOME"]) / "runs" / name
    script, *flags = command or ("train_job/run.py", "--name", name, "--data", "shakespeare")
    if not any((folder / last).exists() for last in ("outcome.json", "trials.json")):  # a run's, a sweep's
        how = ["--resume", name] if any(folder.glob("*.yaml")) else flags
        subprocess.run([sys.executable, script, *how], cwd=ROOT, env=env, check=True)
    return folder


def keep(png: bytes, name: str) -> Path:
    """Writes a screenshot to `docs/images/NAME.png` in 256 colours, which takes a third of the bytes."""
    from PIL import Image

    path = IMAGES / f"{name}.png"
    with Image.open(io.BytesIO(png)) as picture, written_whole(path) as file:
        # k-means moves the chosen colours to those of the pixels, so a large plain area keeps its exact colour
        few = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
        few.save(file, format="png", optimize=True)
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size // 1000} kB")
    return path
