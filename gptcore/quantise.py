"""Writes a package with weights of 8 or 4 bits, on the command line.

    python -m gptcore.quantise PACKAGE_OR_URI OUT --weights int4 --text FILE

They are rounded as `GPT_WEIGHTS` does when a model is loaded. With a text, those of 4 bits are chosen by what the
network multiplies them with on it (`gptcore.calibration`). docs/package.md has the layout.
"""

import codecs
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from gptcore.calibration import improved, input_squares
from gptcore.cli import Parser
from gptcore.engine.native import quantise
from gptcore.errors import ConfigError, FoundryError, PackageError, did_you_mean, excerpt
from gptcore.hf_format import is_transposed, published_config, quantised_bits
from gptcore.hub import KINDS, resolve
from gptcore.package import BASE_TYPE, Package, open_package, write_package
from gptcore.progress import doing
from gptcore.quantised import BITS, SCALES, description, stored_shapes, to_stored
from gptcore.weights import WEIGHTS, by_outputs

TEXT_BYTES = 1 << 18
"""As much of a text is read."""


def quantise_package(package: Package, out: Path, weights: str, text: str = "") -> Package:
    """Writes `package` at `out` with its matrices in `weights`, int8 or int4, and opens it.

    With `text`, int4's values are chosen by it. It appears whole or not at all. Raises ConfigError for `weights` and
    `text`, PackageError for a package that cannot be quantised or written, and NativeUnavailable without a compiler.
    """
    if weights not in BITS:
        raise ConfigError(
            f"--weights is {excerpt(weights)}; expected {' or '.join(BITS)}.{did_you_mean(weights, BITS)}"
        )
    if text and weights != "int4":
        raise ConfigError(f"--text chooses values of int4, but --weights is {weights}; leave out --text")
    if package.weights:
        raise PackageError(f"{package.path} stores {package.weights} already; take the package that it was made from")
    if os.path.lexists(out):
        raise PackageError(f"{out} exists; choose another folder")
    if not out.absolute().parent.is_dir():
        raise PackageError(f"{out} cannot be written: there is no folder {out.parent}")
    config, shapes = package.config, list[tuple[str, tuple[int, ...], str]]()
    bits = dict[str, int]()
    for name, stored in package.places().items():
        if number := quantised_bits(config, name, stored.shape, weights):
            bits[name] = number
            shapes += stored_shapes(name, by_outputs(name, stored.shape), number)
        else:
            shapes.append((name, stored.shape, stored.dtype))
    squares = input_squares(package, text) if text else {}
    info = {
        "training": package.info.get("training", {}),
        "weights": {**description(weights), "chosen_by": "activations" if text else "weights"},
    }
    raw = {
        **published_config(config),
        "model_type": f"{config.family} in GPT Foundry's {weights}, which only gptcore opens",
        BASE_TYPE: config.family,
    }
    target = Package(out.absolute(), config, package.tokenizer, info)
    with doing(f"quantising {len(bits)} matrices"):
        return write_package(target, raw, shapes, _quantised(package, bits, squares))


def _quantised(
    package: Package, bits: Mapping[str, int], squares: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor to store; only one is in memory."""
    for name, tensor in package.published_tensors(dtype=None):
        if name not in bits:
            yield name, tensor
            continue
        matrix = tensor.t() if is_transposed(name) else tensor
        made = quantise(matrix, bits[name])
        if bits[name] == 4 and name in squares:
            made = improved(matrix, made, squares[name])
        yield name, to_stored(made.values, bits[name])
        yield name + SCALES, made.scales


def read_text(file: Path) -> str:
    """The beginning of a text. Raises ConfigError if it is empty, or not text."""
    try:
        with file.open("rb") as stream:
            text = codecs.getincrementaldecoder("utf-8")().decode(stream.read(TEXT_BYTES))
    except OSError as error:
        raise ConfigError(f"--text {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {file} is not UTF-8: expected a text") from error
    if not text.strip():
        raise ConfigError(f"--text {file} is empty")
    return text


def main(argv: list[str] | None = None) -> int:
    """Writes the package and returns the exit code."""
    parser = Parser(prog="python -m gptcore.quantise", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="PACKAGE_OR_URI", help=KINDS)
    parser.add_argument("out", type=Path, metavar="OUT", help="the new package's folder")
    parser.add_argument("--weights", required=True, metavar="KIND", help=" or ".join(BITS))
    parser.add_argument("--text", type=Path, metavar="FILE", help="choose int4's values by how this text uses them")
    try:
        given = parser.parse_args(argv)
        text = read_text(given.text) if given.text else ""
        made = quantise_package(open_package(resolve(given.model)), given.out, given.weights, text)
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.out}: {(made.path / WEIGHTS).stat().st_size / 1e6:,.1f} MB of weights, {given.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
