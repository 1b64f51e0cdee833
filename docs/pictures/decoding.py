"""`docs/images/temperature_effect.png` and `docs/images/decoding_strategies.png`: the odds of the demo's own model.

python -m docs.pictures.decoding
"""

from docs.pictures import IMAGES, trained_run
from train_job.figures import main as draw


def main() -> None:
    """Draws what every run draws of its own model, from a run that `make demo` would have made."""
    package = trained_run("demo", "train_job/run.py", "--name", "demo") / "package"
    draw([str(package), "--prompt", "The", "--out", str(IMAGES)])


if __name__ == "__main__":
    main()
