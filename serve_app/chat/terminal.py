"""Keyboard and screen: line editing with a history, and output without terminal control characters.

All output goes through `Screen`, which replaces control characters in whatever the model, the service or a file sends.
`Keyboard` uses readline: arrow keys, Ctrl-R, Tab for commands, multi-line pastes. Without readline, lines are plain.
The history is kept between sessions in the user's state folder, readable by the user only.
"""

import contextlib
import os
import re
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

from gptcore.errors import ConfigError
from gptcore.files import write_file
from gptcore.home import expanded

PROMPT, FURTHER = "> ", ". "
REMEMBERED_LINES = 1000
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters (C0, C1 and DEL) except tab and newline."""
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def harmless(text: str) -> str:
    """`text` with U+FFFD for every control character; carriage returns, as in Windows files, are removed."""
    return CONTROLS.sub("\ufffd", text.replace("\r", ""))


class Screen:
    """The output. At a terminal everything goes to stdout; otherwise stdout gets answers only, and stderr the rest."""

    def __init__(self, interactive: bool, out: TextIO | None = None, aside: TextIO | None = None) -> None:
        self.interactive = interactive
        self._out = out or sys.stdout
        self._aside = self._out if interactive else (aside or sys.stderr)
        self._styled = interactive and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        self._within_line = False

    def text(self, piece: str) -> None:
        """Write a piece of an answer at once."""
        if piece := harmless(piece):
            self._out.write(piece)
            self._out.flush()
            self._within_line = not piece.endswith("\n")

    def end_line(self) -> None:
        """Start a new line unless at the start of one."""
        if self._within_line:
            self._out.write("\n")
            self._out.flush()
            self._within_line = False

    def line(self, text: str = "") -> None:
        """Write the output of a command."""
        self._say(text)

    def note(self, text: str) -> None:
        """Write a hint."""
        self._say(text, DIM)

    def news(self, text: str) -> None:
        """Write something important."""
        self._say(text, BOLD)

    def problem(self, text: object) -> None:
        """Write an error, on one line."""
        self._say(f"error: {' '.join(str(text).split())}")

    def _say(self, text: str, style: str = "") -> None:
        self.end_line()
        text = harmless(text)
        self._aside.write(f"{style}{text}{PLAIN}\n" if self._styled and style else f"{text}\n")
        self._aside.flush()


class Keyboard:
    """Reads lines. `words` returns the words that Tab completes."""

    def __init__(self, words: Callable[[], Sequence[str]]) -> None:
        self._words = words
        self._readline: ModuleType | None = None
        self._file: Path | None = None
        with contextlib.suppress(ImportError):  # not every Python has it
            import readline  # changes input() and writes to some terminals, so only import it for interactive use

            self._readline, self._file = readline, history_file()
            self._set_up(readline)

    def line(self) -> str:
        """Read a line; one that ends in a backslash continues on the next, unless Ctrl-D ends it.

        Raises EOFError and KeyboardInterrupt.
        """
        line = input(PROMPT)
        while line.endswith("\\"):
            try:
                line = f"{line[:-1]}\n{input(FURTHER)}"
            except EOFError:
                print()
                line = line.rstrip("\\")
        self._remember(line)
        return line

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)
        readline.set_history_length(REMEMBERED_LINES)
        readline.set_completer_delims(" ")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        if os.environ.get("TERM") != "dumb":
            # So that a paste is one prompt; Python turns it off.
            readline.parse_and_bind("set enable-bracketed-paste on")
        for line in remembered(self._file) if self._file else ():
            readline.add_history(line)

    def _remember(self, line: str) -> None:
        if not self._readline or not line.strip():
            return
        count = self._readline.get_current_history_length()
        if count and self._readline.get_history_item(count) == line:
            return
        self._readline.add_history(line)
        if self._file:
            remember(self._file, line)

    def _complete(self, begun: str, state: int) -> str | None:
        if not self._readline or not self._readline.get_line_buffer().startswith("/"):
            return None
        fitting = [word for word in self._words() if word.startswith(begun)]
        return f"{fitting[state]} " if state < len(fitting) else None


@contextlib.contextmanager
def echo_off() -> Iterator[None]:
    """Hide keys typed within the block; the next read gets them.

    A shell restores the echo itself when the chat is suspended.
    """
    before = termios.tcgetattr(sys.stdin)
    try:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:3], before[3] & ~termios.ECHO, *before[4:]])
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


# --- The history: lines in a file; one that ends in a backslash continues on the next, as at the prompt


def history_file() -> Path | None:
    """The history file, readable by its owner only; None if it cannot be created."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = (Path(state) if os.path.isabs(state) else expanded("~/.local/state")) / "gpt-foundry"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "chat-history"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        path.chmod(0o600)
    except (ConfigError, OSError):
        return None
    return path


def remembered(path: Path) -> list[str]:
    """The newest lines of the history, oldest first; shortens the file if it has many more."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
        entries = [harmless(entry.replace("\\\n", "\n")) for entry in re.split(r"(?<!\\)\n", text) if entry]
        kept = entries[-REMEMBERED_LINES:]
        if len(entries) > 2 * len(kept):
            write_file(path, b"".join(map(_written, kept)), mode=0o600)
    except OSError:
        return []
    return kept


def remember(path: Path, line: str) -> None:
    """Append a line to the history, if the disk allows."""
    with contextlib.suppress(OSError), path.open("ab") as file:
        file.write(_written(line))


def _written(line: str) -> bytes:
    return line.replace("\n", "\\\n").encode("utf-8", "replace") + b"\n"
