"""Figures of a run: the loss curve, and how temperature and decoding strategies change the next token's odds.

In: the run's history, or one vector of logits. Out: PNG files. matplotlib is imported when a figure is drawn, and needs
no display. To draw the odds of a trained model:

    python -m train_job.figures PACKAGE_OR_URI --prompt "The" --out FOLDER
"""

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.cli import Parser
from gptcore.errors import ConfigError, FoundryError
from gptcore.hub import KINDS, resolve
from gptcore.package import Package, open_package
from gptcore.sampling import SamplingParams, filtered_probs
from gptcore.tokenizer import Tokenizer
from train_job.files import written_whole

INK, FAINT = "#2b2b33", "#d9d9e0"
COLOURS = ("#1f5fa8", "#e07b39", "#3b8f5a", "#8a4fa3")
STRATEGIES = {
    "greedy": SamplingParams(temperature=0),
    "top_k 5": SamplingParams(top_k=5),
    "top_p 0.5": SamplingParams(top_p=0.5),
    "min_p 0.2": SamplingParams(min_p=0.2),
}
"""The strategies that `decoding_strategies` draws."""
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "font.size": 10,
    "savefig.dpi": 130,
    "text.parse_math": False,  # a dollar sign in a token is not a formula
}


def loss_curve(history: Sequence[Mapping[str, float]], path: Path, title: str = "Loss") -> None:
    """Draws training and validation loss (nats/token) against tokens seen below and epochs above.

    A row of `history` has `tokens` and `epoch`, and `train_loss` or `val_loss` or both. Rows whose loss is not finite
    are left out.
    """
    with _figure(path, (7.5, 4.5)) as axes:
        for key, label, colour, marker in (
            ("train_loss", "training", COLOURS[0], ""),
            ("val_loss", "validation", COLOURS[1], "o"),
        ):
            rows = [row for row in history if math.isfinite(row.get(key, math.nan))]
            if not rows:
                continue
            tokens, losses = [row["tokens"] for row in rows], [row[key] for row in rows]
            ends = f"{label}, last {losses[-1]:.3f}"
            marker = marker if len(rows) > 1 else "o"  # a line through one point is invisible
            axes.plot(tokens, losses, color=colour, marker=marker, markersize=4, linewidth=1.6, label=ends)
        axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        if axes.lines:
            axes.legend()
        last = max(history, key=lambda row: row["tokens"], default={})
        if last.get("tokens"):
            axes.set_xlim(-0.02 * last["tokens"], 1.03 * last["tokens"])  # show the start even of a short run
        if last.get("epoch"):
            per_epoch = last["tokens"] / last["epoch"]
            above = axes.secondary_xaxis("top", functions=(lambda t: t / per_epoch, lambda e: e * per_epoch))
            above.set_xlabel("epochs")


def sweep_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], best: str, path: Path) -> None:
    """Draws each trial's bits per byte against steps, with its name; the `best` one in colour, in front."""
    with _figure(path, (7.5, 4.5)) as axes:
        for name, rows in curves.items():
            style: dict[str, Any] = dict(color=FAINT, zorder=1) if name != best else dict(color=COLOURS[1], zorder=3)
            steps, bits = [row["step"] for row in rows], [row["bits_per_byte"] for row in rows]
            axes.plot(steps, bits, marker="o", markersize=4, linewidth=1.6, label=f"{name}, the best", **style)
            if steps:
                axes.annotate(name, (steps[-1], bits[-1]), (4, 0), textcoords="offset points", fontsize=7, va="center")
        axes.set(xlabel="step", ylabel="bits per byte of the validation text", title="Trials")
        axes.legend(handles=[line for line in axes.lines if line.get_color() != FAINT])


def best_so_far(bits: Sequence[float], path: Path) -> None:
    """Draws each trial's result by number, and the best so far; nan for a failed trial."""
    best, numbers = math.inf, range(1, len(bits) + 1)
    until = [best := min(best, value) if math.isfinite(value) else best for value in bits]
    with _figure(path, (7.5, 4.5)) as axes:
        axes.plot(numbers, bits, "o", color=COLOURS[0], label="trial")
        axes.step(numbers, until, where="post", color=COLOURS[1], linewidth=1.6, label="best so far")
        axes.set(xlabel="trial", ylabel="bits per byte of the validation text", title="Best so far")
        axes.set_xticks(numbers)
        axes.legend()


def temperature_effect(
    logits: Tensor,
    tokenizer: Tokenizer,
    path: Path,
    temperatures: Sequence[float] = (0.1, 1.0, 5.0),
    top: int = 12,
    prompt: str = "",
) -> None:
    """Draws the probabilities of the `top` likeliest next tokens at each temperature, from logits (V,).

    The axis is logarithmic, so that small and large probabilities are both visible.
    """
    logits = logits.detach().cpu()[: tokenizer.vocab_size]
    top = min(top, len(logits))
    likeliest = _likeliest(logits, top)
    width = 0.8 / len(temperatures)
    with _figure(path, (8.5, 4.5)) as axes:
        for i, temperature in enumerate(temperatures):
            probabilities = filtered_probs(logits, SamplingParams(temperature=temperature))[likeliest]
            places = [j + (i - (len(temperatures) - 1) / 2) * width for j in range(top)]
            colour = COLOURS[i % len(COLOURS)]
            label = f"temperature {temperature:g}: these {top} hold {percent(float(probabilities.sum()))}"
            axes.bar(places, probabilities.tolist(), width, color=colour, label=label)
        _odds_axes([axes], len(logits))
        labels = [_label(tokenizer, int(token)) for token in likeliest]
        axes.set_xticks(range(top), labels, rotation=45, ha="right", rotation_mode="anchor")
        after = f" after {_shortened(prompt)!r}" if prompt else ""
        axes.set(ylabel="probability", title=f"The likeliest next tokens{after}")
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper right")


def decoding_strategies(logits: Tensor, tokenizer: Tokenizer, path: Path, top: int = 12, prompt: str = "") -> None:
    """Draws which of the `top` likeliest next tokens each strategy keeps, and with what odds, from logits (V,).

    The model's own odds are behind. Each title has the number of tokens kept, and their total odds. The axis is
    logarithmic, as in `temperature_effect`.
    """
    logits = logits.detach().cpu()[: tokenizer.vocab_size]
    top = min(top, len(logits))
    likeliest = _likeliest(logits, top)
    own = filtered_probs(logits, SamplingParams())
    with _sheet(path, (10, 6.2)) as figure:
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, (name, params), colour in zip(panels.flat, STRATEGIES.items(), COLOURS, strict=True):
            kept = filtered_probs(logits, params)
            count = int((kept > 0).sum())
            axes.bar(range(top), own[likeliest].tolist(), 0.8, color=FAINT, label="the model's own")
            axes.bar(range(top), kept[likeliest].tolist(), 0.5, color=colour, label="what is drawn from")
            held = percent(float(own[kept > 0].sum()))
            axes.set_title(f"{name}: {count:,} of {len(logits):,} kept, which held {held}", fontsize=10)
            axes.grid(visible=False, axis="x")
        _odds_axes(list(panels.flat), len(logits))
        for axes in panels.flat:
            axes.legend(loc="upper right", fontsize=8)
        for axes in panels[:, 0]:
            axes.set_ylabel("probability")
        labels = [_label(tokenizer, int(token)) for token in likeliest]
        for axes in panels[-1]:
            axes.set_xticks(range(top), labels, rotation=45, ha="right", rotation_mode="anchor")
        after = f" after {_shortened(prompt)!r}" if prompt else ""
        figure.suptitle(f"The next token{after}", x=0.01, ha="left", fontweight="bold")


@torch.inference_mode()
def draw_odds(package: Package, prompt: str, folder: Path) -> list[Path]:
    """Draws both figures of the odds for the token after `prompt` into `folder`; returns their paths."""
    tokens = package.tokenizer.encode_prompt(prompt)
    if len(tokens) > package.config.context_length:
        raise ConfigError(
            f"the prompt is {len(tokens)} tokens long; this model's context is {package.config.context_length}"
        )
    logits = package.load_model()(torch.tensor([tokens]))[0, -1]  # (V,)
    folder.mkdir(parents=True, exist_ok=True)
    temperature, strategies = folder / "temperature_effect.png", folder / "decoding_strategies.png"
    temperature_effect(logits, package.tokenizer, temperature, prompt=prompt)
    decoding_strategies(logits, package.tokenizer, strategies, prompt=prompt)
    return [temperature, strategies]


def _likeliest(logits: Tensor, top: int) -> Tensor:
    """Ids of the `top` likeliest tokens; equally likely ones by id, as in the sampler."""
    return logits.float().sort(descending=True, stable=True).indices[:top]


def percent(share: float) -> str:
    """0.4213 as "42%", 0.0042 as "0.42%": two significant digits; below 0.01% as "<0.01%"."""
    if share < 0.0001:
        return "<0.01%" if share > 0 else "0%"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _odds_axes(panels: Sequence[Any], tokens: int) -> None:
    """Sets a logarithmic axis for the odds of `tokens` tokens, with a line at uniform odds and room for a legend."""
    alike = 1 / tokens
    heights = [bar.get_height() for axes in panels for bars in axes.containers for bar in bars]
    low, high = alike / 10, max([*heights, alike])
    for axes in panels:
        line = f"all {tokens:,} as likely: {percent(alike)}"
        axes.axhline(alike, color=INK, linewidth=0.8, linestyle=":", label=line)
        axes.set_yscale("log")
        axes.set_ylim(low, high * (high / low) ** 0.45)
        axes.yaxis.set_major_formatter(lambda value, _: percent(value) if value <= 1 else "")
        axes.minorticks_off()


def short_count(value: float) -> str:
    """12_000 as "12K", short enough for an axis."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:g}"


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """One axes on a `_sheet`."""
    with _sheet(path, size) as figure:
        yield figure.add_subplot()


@contextmanager
def _sheet(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of `size` inches; written to `path` if the block succeeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with written_whole(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a token of any script may be a label
            figure.savefig(file, format="png")


def _label(tokenizer: Tokenizer, token: int) -> str:
    """A token's label under a bar: quoted text, or its bytes in hex."""
    try:
        text = tokenizer.decode_bytes([token]).decode()
    except UnicodeDecodeError:
        return tokenizer.decode_bytes([token]).hex(" ")
    return repr(text)


def _shortened(prompt: str, longest: int = 40) -> str:
    return prompt if len(prompt) <= longest else f"…{prompt[-longest:]}"


def main(argv: list[str] | None = None) -> int:
    """Draws a package's odds; returns the exit code."""
    parser = Parser(prog="python -m train_job.figures", description="Draw a model's next-token odds.")
    parser.add_argument("model", metavar="PACKAGE_OR_URI", help=KINDS)
    parser.add_argument("--prompt", default="The", help="text that the token comes after (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="FOLDER", help="(%(default)s)")
    try:
        asked = parser.parse_args(argv)
        for path in draw_odds(open_package(resolve(asked.model)), asked.prompt, asked.out):
            print(path)
    except (FoundryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
