"""`docs/images/loss_curve.png`: what a run leaves as `figures/loss_curve.png`, with a title that says which run.

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
