"""The chat's command line: a conversation, or answers to piped prompts.

Exit codes: 0, success; 1, a prompt got no complete answer; 2, an invalid flag or setting; 130, Ctrl-C.
"""

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Iterable
from typing import NoReturn

from gptcore.cli import Parser
from gptcore.errors import ConfigError
from serve_app.chat.asking import is_temporary
from serve_app.chat.client import KEY_VARIABLE, Service, ServiceError, encodable
from serve_app.chat.commands import Chat, ExitChat
from serve_app.chat.terminal import Keyboard, Screen, echo_off
from serve_app.chat.values import SHAPES, Values, about, default, expected, read_all, written

URL = "http://127.0.0.1:8000"
PIPED_PATIENCE_SECONDS = 60.0
DESCRIPTION = """Chat with the models of a running service. Piped lines are answered one by one.

examples:
  python -m serve_app.chat
  python -m serve_app.chat --url http://127.0.0.1:8001 --temperature 0.7
  python -m serve_app.chat --prompt "Once upon a time" --max-new-tokens 50
  python -m serve_app.chat --model qwen --system "Answer in one word."
  python -m serve_app.chat < prompts.txt"""


class ChatParser(Parser):
    """The parser of every command, which also refuses an API key on the command line without repeating it."""

    def error(self, message: str) -> NoReturn:
        if re.search(r"unrecognized arguments: --(api-)?key\b", message):
            raise ConfigError(f"other users can read a key on the command line; set {KEY_VARIABLE} instead")
        super().error(message)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Values]:
    """The flags, and the sampling parameters among them. Raises ConfigError."""
    parser = ChatParser(
        prog="python -m serve_app.chat",
        usage="%(prog)s [--url URL] [--model NAME] [--FLAG VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The environment variable {KEY_VARIABLE} sets the API key.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", default=URL, help="the service's address (%(default)s)")
    parser.add_argument(
        "--model", type=encodable, metavar="NAME", help="one of the service's models (default: its default model)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this prompt and exit")
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        help="go on with the conversation or text at each line (default: yes at a terminal, no for piped input)",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="tell a model that chats how to answer")
    parser.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help=f"how long to wait for a service that is unreachable or busy "
        f"(default: until Ctrl-C at a terminal, {PIPED_PATIENCE_SECONDS:g} for piped input)",
    )
    sampling = parser.add_argument_group("sampling")
    for name, shape in SHAPES.items():
        boolean = shape.get("type") == "boolean"
        sampling.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            action="append",
            metavar="VALUE",
            help=f"{about(name)} Expected {expected(name)} ({written(default(name))})".replace("%", "%%"),
            nargs="?" if boolean else None,
            const="on" if boolean else None,
        )
    flags = parser.parse_args(argv)
    if flags.wait is not None and not flags.wait >= 0:
        raise ConfigError(f"--wait is {flags.wait:g}; expected a number of seconds of at least 0")
    if flags.prompt is not None and not flags.prompt.strip():
        raise ConfigError("--prompt is empty; expected the beginning of a text")
    values = Values()
    for name in SHAPES:
        if given := getattr(flags, name):
            values.set(name, read_all(name, given))
    return flags, values


def converse(chat: Chat) -> int:
    """Run a conversation at a terminal; return the exit code."""
    keyboard = Keyboard(chat.words)
    chat.greet()
    while True:
        try:
            line = keyboard.line()
        except EOFError:
            chat.screen.line()
            return 0
        except KeyboardInterrupt:
            chat.screen.line()
            chat.screen.note("to leave, type exit or /quit, or press Ctrl-D")
            continue
        try:
            with echo_off():
                chat.take(line)
        except ExitChat:
            return 0
        except KeyboardInterrupt:
            chat.screen.line()


def answer_each(chat: Chat, lines: Iterable[str]) -> int:
    """Answer the prompts one by one; return the exit code. Stops if the service is lost."""
    well = True
    for line in lines:
        if not line.strip():
            continue
        answer = chat.prompt(line)
        if answer.end == "stopped":
            return 130
        if isinstance(answer.problem, ConfigError):
            return 2
        well = well and answer.problem is None
        lost = isinstance(answer.problem, ServiceError) and answer.problem.status in (0, 401)
        if lost or is_temporary(answer.problem):
            return 1
    return 0 if well else 1


def run(flags: argparse.Namespace, values: Values) -> int:
    """Run the chat; return the exit code."""
    interactive = flags.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    patience = flags.wait if flags.wait is not None else (math.inf if interactive else PIPED_PATIENCE_SECONDS)
    remembers = interactive if flags.history is None else flags.history
    service = Service(flags.url, os.environ.get(KEY_VARIABLE, "").strip())
    chat = Chat(service, Screen(interactive), values, patience, remembers, flags.model, encodable(flags.system.strip()))
    try:
        if interactive:
            return converse(chat)
        if flags.prompt is not None:
            return answer_each(chat, [flags.prompt])
        return answer_each(chat, (line.rstrip("\r\n") for line in sys.stdin))
    finally:
        service.close()


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # invalid UTF-8 must not end the chat
    try:
        return run(*parse(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # writing output: the reader has closed it, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: the answer cannot be written: {str(error.strerror).lower()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
