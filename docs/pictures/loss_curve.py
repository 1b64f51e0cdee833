"""`docs/images/loss_curve.png`: the `figures/loss_curve.png` of a run, with a title that names the run.

python -m docs.pictures.loss_curve
"""

from docs.pictures import IMAGES, ROOT, trained_run
from train_job.figures import loss_curve
from train_job.session.history import History


def main() -> None:
    """Draws the history of the pictures' run."""
    history = History(trained_run() / "history.jsonl")
    path = IMAGES / "loss_curve.png"
    loss_curve(history.rows, path, title="Preset quick on tiny Shakespeare")
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
