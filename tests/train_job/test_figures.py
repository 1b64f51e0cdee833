"""train_job.figures: the pictures exist and show their data."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import image
from matplotlib.axes import Axes

from gptcore.config import ModelConfig
from gptcore.model import GPT
from gptcore.package import save_package
from gptcore.tokenizer import load_tokenizer
from tests.refusals import one_error
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


def test_a_run_of_one_step_is_drawn_on_axes_that_begin_at_zero(tmp_path: Path, drawn: list[Axes]):
    row = {"step": 1, "tokens": 2048, "epoch": 0.02}
    figures.loss_curve([row | {"train_loss": 7.6}, row | {"val_loss": 7.5}], tmp_path / "loss.png")
    assert [line.get_marker() for line in drawn[0].lines] == ["o", "o"]
    low, high = drawn[0].get_xlim()
    assert low < 0 < 2048 < high


def test_a_fine_tuned_runs_curve_begins_with_its_parent(tmp_path: Path, drawn: list[Axes]):
    parent = {"step": 0, "tokens": 0, "epoch": 0.0, "val_loss": 6.0}
    figures.loss_curve([parent, *HISTORY], tmp_path / "loss.png")
    val = drawn[0].lines[1]
    assert [list(val.get_xdata()), list(val.get_ydata())] == [[0, 2000, 4000], [6.0, 4.0, 3.5]]
    assert drawn[0].get_xlim()[0] < 0, "its point is not cut off"


def test_a_run_without_any_point_still_gets_a_picture(tmp_path: Path):
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


def test_the_legend_says_how_much_probability_the_shown_tokens_have(tmp_path: Path, drawn: list[Axes]):
    logits = torch.full((257,), 0.0)
    logits[7] = math.log(256.0)  # half of all
    figures.temperature_effect(logits, load_tokenizer("bytes"), tmp_path / "t.png", temperatures=(1.0,), top=1)
    _, text = (entry.get_text() for entry in drawn[0].get_legend().get_texts())
    assert text == "temperature 1: these 1 hold 50%"


@pytest.mark.parametrize("strength", ["weak", "alike", "strong", "certain"])
def test_the_bars_are_visible_for_weak_and_strong_models(tmp_path: Path, drawn: list[Axes], strength: str):
    tokenizer = load_tokenizer("bytes")
    generator = torch.Generator().manual_seed(0)
    logits = {
        "weak": 0.2 * torch.randn(257, generator=generator),
        "alike": torch.zeros(257),
        "strong": 4 * torch.randn(257, generator=generator),
        "certain": torch.cat([torch.tensor([80.0]), torch.zeros(256)]),
    }[strength]
    figures.temperature_effect(logits, tokenizer, tmp_path / "t.png")
    figures.decoding_strategies(logits, tokenizer, tmp_path / "d.png")
    odds, panels = drawn[0], drawn[1:]
    for axes in drawn:
        low, high = axes.get_ylim()
        for bars in axes.containers:
            tallest = max(bar.get_height() for bar in bars)  # type: ignore[union-attr]
            assert math.log(tallest / low) > math.log(high / low) / 6, "it rises a sixth of the way"
            assert tallest < high
    assert len({axes.get_ylim() for axes in panels}) == 1, "the panels can be compared"
    legend = odds.get_legend()
    assert legend
    assert not any("hold 0%" in text.get_text() for text in legend.get_texts())


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1e-7, "<0.01%"), (0.0058, "0.58%"), (0.0249, "2.5%"), (0.55, "55%"), (1.0, "100%")],
)
def test_shares_are_printed_with_significant_digits(share: float, text: str):
    assert figures.percent(share) == text


def test_each_strategy_keeps_the_samplers_tokens_with_probabilities_that_sum_to_one(tmp_path: Path, drawn: list[Axes]):
    tokenizer = load_tokenizer("bytes")
    logits = torch.full((320,), -30.0)
    logits[:6] = torch.tensor([0.3, 0.25, 0.15, 0.15, 0.1, 0.05]).log()
    figures.decoding_strategies(logits, tokenizer, tmp_path / "d.png", prompt="$10 for a " * 9)
    assert is_picture(tmp_path / "d.png")
    panels = {axes.get_title("left").partition(":")[0]: axes for axes in drawn}
    assert panels.keys() == figures.STRATEGIES.keys()
    kept = {}
    for name, axes in panels.items():
        own, left = ([bar.get_height() for bar in bars] for bars in axes.containers)
        assert own[:6] == pytest.approx([0.3, 0.25, 0.15, 0.15, 0.1, 0.05])
        assert sum(left) == pytest.approx(1.0)
        kept[name] = sum(height > 0 for height in left)
        ratio = left[0] / left[1] if left[1] else math.inf
        assert ratio == pytest.approx(1.2) or kept[name] == 1
    assert kept == {"greedy": 1, "top_k 5": 5, "top_p 0.5": 2, "min_p 0.2": 5}
    assert panels["top_p 0.5"].get_title("left") == "top_p 0.5: 2 of 257 kept, which held 55%"


def test_the_command_draws_the_probabilities_of_a_package_or_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = ModelConfig(vocab_size=257, hidden_size=32, num_layers=1, num_heads=2, context_length=16)
    package = save_package(tmp_path / "p", config, GPT(config).state_dict(), load_tokenizer("bytes"), {})
    assert figures.main([str(package.path), "--prompt=The", f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [str(tmp_path / "out" / f"{name}.png") for name in ("temperature_effect", "decoding_strategies")]
    assert all(is_picture(Path(path)) for path in said)
    for wrong, message in (
        (["--prompt=" + "x" * 17], "17 tokens long; this model's context is 16"),
        (["--promt=x"], "Did you mean '--prompt'"),
    ):
        assert figures.main([str(package.path), *wrong]) == 2
        assert message in one_error(capsys.readouterr().err)


def test_tokens_that_are_not_text_are_labelled_with_their_bytes(tmp_path: Path, drawn: list[Axes]):
    tokenizer = load_tokenizer("bytes", None)
    logits = torch.full((tokenizer.vocab_size,), -9.0)
    for rank, raw in enumerate((b"a", b"\xff", b"$", b"\n")):
        logits[tokenizer.encoding.encode_single_token(raw)] = 5.0 - rank
    logits[tokenizer.eot] = 0.5
    figures.temperature_effect(logits, tokenizer, tmp_path / "t.png", top=5)
    labels = [label.get_text() for label in drawn[0].get_xticklabels()]
    assert labels == ["'a'", "ff", "'$'", r"'\n'", "'<|endoftext|>'"]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (12_000, "12K"), (1.5e6, "1.5M"), (2e9, "2B")])
def test_counts_are_printed_short(value: float, text: str):
    assert figures.short_count(value) == text


def test_importing_figures_does_not_import_matplotlib():
    code = "import sys, train_job.figures; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_trial_has_a_curve_and_the_best_is_highlighted(tmp_path: Path, drawn: list[Axes]):
    curves = {"01": [{"step": 20, "bits_per_byte": 3.0}], "02": [{"step": 20, "bits_per_byte": 2.0}], "03": []}
    figures.sweep_curves(curves, "02", tmp_path / "trials.png")
    assert is_picture(tmp_path / "trials.png")
    assert [list(line.get_ydata()) for line in drawn[0].lines] == [[3.0], [2.0], []]
    legend = drawn[0].get_legend()
    assert legend
    assert [text.get_text() for text in legend.get_texts()] == ["02, the best"]


def test_the_best_so_far_never_rises_and_skips_failed_trials(tmp_path: Path, drawn: list[Axes]):
    figures.best_so_far([math.inf, 2.0, 3.0, math.inf, 1.5], tmp_path / "best.png")
    assert is_picture(tmp_path / "best.png")
    assert list(drawn[0].lines[1].get_ydata()) == [math.inf, 2.0, 2.0, 2.0, 1.5]
