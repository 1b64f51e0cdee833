"""A continuation of a prompt, on the command line.

    python -m gptcore.generate PACKAGE_OR_URI --prompt "Once upon a time"

In: the name of a package (see gptcore.hub) and how to sample. Out: prompt and continuation, as they come. An error is
one line on stderr and exit code 2.
"""

import argparse
import io
import re
import signal
import sys
from typing import NoReturn

from gptcore.errors import ConfigError, FoundryError, did_you_mean
from gptcore.hub import KINDS, resolve
from gptcore.package import open_package
from gptcore.sampling import SamplingParams, stream_text

DESCRIPTION = """Continue a text.

examples:
  python -m gptcore.generate runs/demo/package --prompt "The"
  python -m gptcore.generate models:/gpt@champion --prompt "The" --temperature 0.7 --seed 1
  python -m gptcore.generate hf:openai-community/gpt2 --prompt "Once upon a time" --greedy"""


class Parser(argparse.ArgumentParser):
    """argparse, with our kind of error: one line, and the nearest flag for one that does not exist."""

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        raise ConfigError(message + (f".{did_you_mean(flag[1], self._option_string_actions)}" if flag else ""))


def parse_arguments(argv: list[str] | None) -> tuple[str, str, SamplingParams]:
    """Model name, prompt and sampling parameters. Raises ConfigError."""
    default = SamplingParams()  # POST /generate and the chat have the same defaults
    parser = Parser(
        prog="python -m gptcore.generate",
        usage="%(prog)s PACKAGE_OR_URI [--prompt TEXT] [--FLAG VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="PACKAGE_OR_URI", help=KINDS)
    parser.add_argument("--prompt", default="", help="text to continue; none: begin a document")
    parser.add_argument(
        "--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N", help="tokens (%(default)s)"
    )
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    heat.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        metavar="T",
        help="below 1 safer, above 1 wilder (%(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, default=default.top_k, metavar="K", help="of the K likeliest tokens; 0: all"
    )
    parser.add_argument(
        "--top-p", type=float, default=default.top_p, metavar="P", help="of the likeliest that hold P; 1: all"
    )
    parser.add_argument(
        "--min-p", type=float, default=default.min_p, metavar="P", help="P times as likely as the likeliest; 0: all"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=default.repetition_penalty,
        metavar="R",
        help="above 1: less so; 1: off",
    )
    for name in ("presence", "frequency"):
        parser.add_argument(f"--{name}-penalty", type=float, default=0.0, metavar="P", help="-2 to 2; 0: off")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends before it; may be repeated")
    parser.add_argument("--seed", type=int, help="the same seed and prompt give the same text")
    a = parser.parse_args(argv)
    params = SamplingParams(
        a.max_new_tokens,
        0.0 if a.greedy else a.temperature,
        a.top_k,
        a.top_p,
        a.seed,
        a.min_p,
        a.repetition_penalty,
        a.presence_penalty,
        a.frequency_penalty,
        tuple(a.stop),
    )
    return a.model, a.prompt, params


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        name, prompt, params = parse_arguments(argv)
        package = open_package(resolve(name))
        pieces = stream_text(package.load_model(), package.tokenizer, prompt, params)
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows the rest
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
