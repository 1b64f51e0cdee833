"""The docs' pictures, each made by the module of its name: a real run, a real service, a real browser.

`make pictures` makes all of them anew. What they show is trained when it is first asked for and kept at home under
`.cache/pictures`: preset `quick` on tiny Shakespeare, the demo's run, and the sweep that comes along.
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
    """For children that train or serve for a picture: a home, a registry and a Ray of their own, usual settings."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("GPT_FOUNDRY_")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPT_", "MLFLOW_"))} | ours
    return kept | {"GPT_FOUNDRY_HOME": str(home() / ".cache" / "pictures"), "RAY_ADDRESS": "local"}


def trained_run(name: str = RUN, *command: str) -> Path:
    """The folder of the finished run. Raises CalledProcessError, after what it printed, if the job fails.

    `command` is what makes it, by default the pictures' run on tiny Shakespeare.
    """
    env = environment()
    folder = Path(env["GPT_FOUNDRY_HOME"]) / "runs" / name
    script, *flags = command or ("train_job/run.py", "--name", name, "--data", "shakespeare")
    if not any((folder / last).exists() for last in ("outcome.json", "trials.json")):  # a run's, a sweep's
        how = ["--resume", name] if any(folder.glob("*.yaml")) else flags
        subprocess.run([sys.executable, script, *how], cwd=ROOT, env=env, check=True)
    return folder


def keep(png: bytes, name: str) -> Path:
    """Writes a picture of a screen to `docs/images/NAME.png` in 256 colours, a third of the bytes."""
    from PIL import Image

    path = IMAGES / f"{name}.png"
    with Image.open(io.BytesIO(png)) as picture, written_whole(path) as file:
        # k-means moves the colours chosen to where the pixels are: a large plain area keeps its own to the bit
        few = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
        few.save(file, format="png", optimize=True)
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size // 1000} kB")
    return path
