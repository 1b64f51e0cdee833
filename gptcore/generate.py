"""Continue a prompt, on the command line.

    python -m gptcore.generate PACKAGE_OR_URI --prompt "Once upon a time"

Takes the name of a package (see gptcore.hub) and sampling parameters; prints the prompt and its continuation as it is
generated. An error is one line on stderr and exit code 2.
"""

import argparse
import io
import signal
import sys
from collections.abc import Iterator

from gptcore.cli import Parser
from gptcore.engine.settings import CHOICES, EngineSettings
from gptcore.errors import FoundryError
from gptcore.hub import KINDS, resolve
from gptcore.package import Package, open_package
from gptcore.parameters import SAMPLING, Parameter, SamplingParams
from gptcore.sampling import stream_text

DESCRIPTION = """Continue a text.

examples:
  python -m gptcore.generate runs/demo/package --prompt "The"
  python -m gptcore.generate models:/gpt@champion --prompt "The" --temperature 0.7 --seed 1
  python -m gptcore.generate hf:openai-community/gpt2 --prompt "Once upon a time" --greedy"""
NOT_FLAGS = ("stop_token_ids", "ignore_eos", "logprobs")
"""Parameters that matter to programs only."""


def parse_arguments(argv: list[str] | None) -> tuple[str, str, SamplingParams, EngineSettings]:
    """Model name, prompt, sampling parameters, and settings that may quantise the weights. Raises ConfigError."""
    parser = Parser(
        prog="python -m gptcore.generate",
        usage="%(prog)s PACKAGE_OR_URI [--prompt TEXT] [--FLAG VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="PACKAGE_OR_URI", help=KINDS)
    parser.add_argument("--prompt", default="", help="text to continue; without it, the model begins a document")
    kinds = " or ".join(filter(None, CHOICES["weights"]))
    parser.add_argument("--weights", default="", metavar="KIND", help=f"quantise the matrices: {kinds} (on a CPU)")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    names = [name for name in SAMPLING if name not in NOT_FLAGS]
    for name in names:
        _add_flag(exclusive if name == "temperature" else parser, SAMPLING[name])
    given = parser.parse_args(argv)
    values = {name: getattr(given, name) for name in names}
    if given.greedy:
        values["temperature"] = 0.0
    return (
        given.model,
        given.prompt,
        SamplingParams(**values),
        EngineSettings(device="cpu", slots=1, weights=given.weights),
    )


def _add_flag(parser: argparse._ActionsContainer, parameter: Parameter) -> None:
    flag = f"--{parameter.name.replace('_', '-')}"
    help = parameter.help.replace("%", "%%")
    if parameter.several:
        more = " May be repeated."
        parser.add_argument(flag, action="append", type=parameter.type, default=[], metavar="VALUE", help=help + more)
    else:
        default = "" if parameter.default is None else " (%(default)s)"
        parser.add_argument(flag, type=parameter.type, default=parameter.default, metavar="VALUE", help=help + default)


def quantised_text(package: Package, prompt: str, params: SamplingParams, settings: EngineSettings) -> Iterator[str]:
    """The continuation by the engine, in pieces, with weights of 8 or 4 bits. Raises ConfigError."""
    from gptcore.engine import Engine, Request

    engine = Engine(package, settings)
    prompt_ids = tuple(package.tokenizer.encode_prompt(prompt))
    engine.add(Request("0", prompt_ids, params))

    def pieces() -> Iterator[str]:
        while engine.busy:
            yield from (update.text for update in engine.step())

    return pieces()


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        name, prompt, params, settings = parse_arguments(argv)
        package = open_package(resolve(name))
        if settings.weights or package.weights:
            pieces = quantised_text(package, prompt, params, settings)
        else:
            pieces = stream_text(package.load_model(), package.tokenizer, prompt, params)
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # on a terminal that is not UTF-8
    try:
        sys.stdout.write(prompt.encode(errors="replace").decode())
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command quietly
    sys.exit(main())
