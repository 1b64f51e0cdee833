"""`docs/images/temperature_effect.png` and `docs/images/decoding_strategies.png`: what the demo's model predicts.

python -m docs.pictures.decoding
"""

from docs.pictures import IMAGES, trained_run
from train_job.figures import main as draw


def main() -> None:
    """Draws the pictures that every run draws of its own model, from the run of `make demo`."""
    package = trained_run("demo", "train_job/run.py", "--name", "demo") / "package"
    draw([str(package), "--prompt", "The", "--out", str(IMAGES)])


if __name__ == "__main__":
    main()
