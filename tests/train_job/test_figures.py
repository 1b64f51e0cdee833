"""Claims about train_job.figures: the pictures are there, and show what they were given."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import image
from matplotlib.axes import Axes

from gptcore.tokenizer import load_tokenizer
from train_job import figures

HISTORY = [
    {"step": 1, "tokens": 1000, "epoch": 0.5, "train_loss": 5.0},
    {"step": 2, "tokens": 2000, "epoch": 1.0, "train_loss": math.nan, "val_loss": 4.0},
    {"step": 3, "tokens": 4000, "epoch": 2.0, "train_loss": 3.0, "val_loss": 3.5},
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every picture drawn in a test."""
    from matplotlib.figure import Figure

    axes: list[Axes] = []
    add_subplot = Figure.add_subplot

    def remembered(self, *args, **kwargs):
        axes.append(add_subplot(self, *args, **kwargs))
        return axes[-1]

    monkeypatch.setattr(Figure, "add_subplot", remembered)
    return axes


def is_picture(path: Path) -> bool:
    pixels = image.imread(path)
    return pixels.shape[0] > 300 and pixels.std() > 0.01


def test_the_loss_curve_has_tokens_below_and_epochs_above(tmp_path: Path, drawn: list[Axes]):
    figures.loss_curve(HISTORY, tmp_path / "loss.png")
    assert is_picture(tmp_path / "loss.png")
    train, val = drawn[0].lines
    assert [list(line) for line in zip(train.get_xdata(), train.get_ydata(), strict=True)] == [[1000, 5.0], [4000, 3.0]]
    assert list(val.get_ydata()) == [4.0, 3.5]
    (above,) = drawn[0].child_axes
    assert above.get_xlabel() == "epochs"
    assert above.get_xlim() == pytest.approx([x / 2000 for x in drawn[0].get_xlim()])


def test_a_run_without_a_single_point_still_gets_its_picture(tmp_path: Path):
    figures.loss_curve([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_low_temperature_sharpens_and_high_temperature_flattens(tmp_path: Path, drawn: list[Axes]):
    tokenizer = load_tokenizer("bytes", None)
    logits = torch.randn(320, generator=torch.Generator().manual_seed(0))
    figures.temperature_effect(logits, tokenizer, tmp_path / "temperature.png", prompt="$10 for a " * 9)
    assert is_picture(tmp_path / "temperature.png")
    cold, neutral, hot = ([bar.get_height() for bar in bars] for bars in drawn[0].containers)
    assert cold[0] > neutral[0] > hot[0]
    assert neutral == sorted(neutral, reverse=True)
    expected = logits[: tokenizer.vocab_size].softmax(0).max()
    assert neutral[0] == pytest.approx(float(expected))


def test_tokens_that_are_no_text_are_labelled_by_their_bytes(tmp_path: Path, drawn: list[Axes]):
    tokenizer = load_tokenizer("bytes", None)
    logits = torch.full((tokenizer.vocab_size,), -9.0)
    for rank, raw in enumerate((b"a", b"\xff", b"$", b"\n")):
        logits[tokenizer.encoding.encode_single_token(raw)] = 5.0 - rank
    logits[tokenizer.eot] = 0.5
    figures.temperature_effect(logits, tokenizer, tmp_path / "t.png", top=5)
    labels = [label.get_text() for label in drawn[0].get_xticklabels()]
    assert labels == ["'a'", "ff", "'$'", r"'\n'", "'<|endoftext|>'"]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (12_000, "12K"), (1.5e6, "1.5M"), (2e9, "2B")])
def test_counts_are_short(value: float, text: str):
    assert figures.short_count(value) == text


def test_importing_figures_does_not_import_matplotlib():
    code = "import sys, train_job.figures; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
