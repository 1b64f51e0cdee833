"""Keyboard and screen: lines in, with editing and a history of what was typed; text out that cannot steer a terminal.

`Screen` is the only way to the terminal. Whatever the model, the service or a file says, escape sequences lose their
first character on the way. `Keyboard` is readline's: arrow keys, Ctrl-R, Tab for commands, pastes of several lines; a
Python without readline has plain lines. What was typed is kept between sessions in the user's state folder, where
nobody else may read it.
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
"""C0 and C1 and DEL, without tab and newline: what a terminal takes for orders."""
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def harmless(text: str) -> str:
    """`text` with U+FFFD for every character that steers a terminal; carriage returns, as in Windows' files, vanish."""
    return CONTROLS.sub("\ufffd", text.replace("\r", ""))


class Screen:
    """Where answers, news and problems go. At a terminal all share it; else stdout has answers and nothing else."""

    def __init__(self, interactive: bool, out: TextIO | None = None, aside: TextIO | None = None) -> None:
        self.interactive = interactive
        self._out = out or sys.stdout
        self._aside = self._out if interactive else (aside or sys.stderr)
        self._styled = interactive and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        self._within_line = False

    def text(self, piece: str) -> None:
        """A piece of an answer, at once."""
        if piece := harmless(piece):
            self._out.write(piece)
            self._out.flush()
            self._within_line = not piece.endswith("\n")

    def end_line(self) -> None:
        """Goes to the beginning of a line, unless there."""
        if self._within_line:
            self._out.write("\n")
            self._out.flush()
            self._within_line = False

    def line(self, text: str = "") -> None:
        """Something that was asked for."""
        self._say(text)

    def note(self, text: str) -> None:
        """Something that it may help to know."""
        self._say(text, DIM)

    def news(self, text: str) -> None:
        """Something that is not to be missed."""
        self._say(text, BOLD)

    def problem(self, text: object) -> None:
        """What went wrong, on one line."""
        self._say(f"error: {' '.join(str(text).split())}")

    def _say(self, text: str, style: str = "") -> None:
        self.end_line()
        text = harmless(text)
        self._aside.write(f"{style}{text}{PLAIN}\n" if self._styled and style else f"{text}\n")
        self._aside.flush()


class Keyboard:
    """Lines as they are typed. `words` gives what Tab completes a line's beginning to."""

    def __init__(self, words: Callable[[], Sequence[str]]) -> None:
        self._words = words
        self._readline: ModuleType | None = None
        self._file: Path | None = None
        with contextlib.suppress(ImportError):  # not every Python has it
            import readline  # changes how input() works, and says things to some terminals: only for whoever types

            self._readline, self._file = readline, history_file()
            self._set_up(readline)

    def line(self) -> str:
        """The next line; one that ends in a backslash goes on in the next, unless Ctrl-D ends it there.

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
            readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off: a paste is one prompt
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
    """Keys that are typed meanwhile do not show in between; whoever reads a line next gets them.

    A shell puts the echo back for itself when the chat is suspended.
    """
    before = termios.tcgetattr(sys.stdin)
    try:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:3], before[3] & ~termios.ECHO, *before[4:]])
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


# --- what was typed before: lines in a file; one that ends in a backslash goes on in the next, as at the prompt


def history_file() -> Path | None:
    """Where it is kept, readable by its owner alone; None where it cannot be kept."""
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
    """The newest that was typed, in its order; the file is made shorter if it holds much more."""
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
    """Adds what was typed, if the disk takes it."""
    with contextlib.suppress(OSError), path.open("ab") as file:
        file.write(_written(line))


def _written(line: str) -> bytes:
    return line.replace("\n", "\\\n").encode("utf-8", "replace") + b"\n"
