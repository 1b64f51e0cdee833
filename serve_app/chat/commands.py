"""Handles the lines of a chat: prompts, and commands that start with a slash.

An error is one line on the screen, and the chat continues.
"""

import getpass
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptcore.errors import ConfigError, FoundryError, did_you_mean
from gptcore.files import write_file
from gptcore.home import expanded
from serve_app.chat.asking import ChatAnswer, ask
from serve_app.chat.client import ModelEntry, Service, ServiceError, Unreachable, encodable
from serve_app.chat.conversation import Conversation, Turn
from serve_app.chat.terminal import Screen, harmless
from serve_app.chat.values import SHAPES, Values, parameter

NAME_AND_VALUE = re.compile(r"\s*([\w-]*)[ =]?(.*)", re.DOTALL)
STATES = {"unloaded": "loads on first use", "loading": "loading", "failed": "cannot be used"}


LEAVING = ("exit", "quit", "bye", ":q", ":quit", "exit()", "quit()")
"""Lines that end the chat like /quit. With a space in front, they are prompts."""


class ExitChat(Exception):
    """The user wants to leave the chat."""


@dataclass
class Chat:
    """One chat. `patience`: how many seconds to wait for an unreachable service."""

    service: Service
    screen: Screen
    values: Values
    patience: float
    remembers: bool
    """Whether a prompt continues the text so far."""
    model: str | None = None
    """The chosen model; None: the service's default."""

    def __post_init__(self) -> None:
        self.conversation = Conversation()
        self.listing: list[ModelEntry] = []
        self._answerer: tuple[str | None, str] | None = None
        self._unanswered: Turn | None = None

    # --- prompts ---

    def take(self, line: str) -> None:
        """Handle a line from the terminal. Raises ExitChat."""
        if line.rstrip().lower() in LEAVING:
            self.screen.note(f"left the chat; to send {line.rstrip()!r} as a prompt, put a space before it")
            raise ExitChat
        if not line.startswith("/"):
            if line.strip():
                self.prompt(line)
            return
        word, _, rest = line[1:].partition(" ")
        try:
            self._command(word, rest)
        except FoundryError as error:
            self.screen.problem(error)

    def prompt(self, line: str) -> ChatAnswer:
        """Append `line` to the text and let the model continue."""
        opens = not self.remembers or not self.conversation.turns
        return self._answer(self.conversation.added(encodable(line), opens), opens)

    def _answer(self, said: str, opens: bool) -> ChatAnswer:
        before = "" if opens else self.conversation.text
        answer = self._ask(before + said, len(said))
        turn = Turn(said, answer.text, opens, answer.cut_short)
        if answer.begun:
            self.conversation.add(turn)
        self._unanswered = None if answer.begun else turn
        self.screen.end_line()
        if answer.problem:
            self.screen.problem(answer.problem)
        if self.screen.interactive:
            self._comment(answer)
        return answer

    def _ask(self, text: str, newest: int) -> ChatAnswer:
        """Send as much of the text as fits; less, if the service says that it is too long."""
        entry = self._entry()
        if entry and entry.state in ("unloaded", "loading") and self.screen.interactive:
            self.screen.note(f"{entry.name} is loading; this may take a while")
        body = self.values.body() | ({"model": self.model} if self.model else {})
        wanted, context = self.values.value("max_new_tokens"), entry.context_length if entry else None
        if newest == len(text):
            self.conversation.skipped = 0
        while True:
            skipped = self.conversation.skipped
            sent = self.conversation.fit(text, newest, context, wanted)
            if self.conversation.skipped > skipped:
                self._say_cut(context)
            answer = ask(self.service, body | {"prompt": sent}, self.screen.text, self._tell, self.patience)
            long = isinstance(answer.problem, ServiceError) and answer.problem.param == "prompt"
            if not long or not self.conversation.cut(text, newest):
                break
            self._say_cut(context)
        if answer.total_tokens:
            self.conversation.measure(sent + answer.text, answer.total_tokens)
        return answer

    def _tell(self, text: str) -> None:
        self.screen.note(f"{text}, Ctrl-C stops" if self.screen.interactive else text)

    def _say_cut(self, context: int | None) -> None:
        limit = f"the model's context of {context} tokens" if context else "the model's context"
        self.screen.note(
            f"the text is longer than {limit}: its first {self.conversation.skipped} characters are left out"
        )

    def _comment(self, answer: ChatAnswer) -> None:
        if not answer.begun:
            if answer.problem:
                self._hint(answer.problem)
            else:
                self.screen.note(f"{answer.end or 'no answer came'}; /retry tries again")
            return
        answerer = (self.model, answer.label)
        if self._answerer and self._answerer[0] == self.model and self._answerer != answerer:
            self.screen.news(f"{answer.label} answers now; the previous answer came from {self._answerer[1]}")
        self._answerer = answerer
        self.screen.note(answer.figures())
        known = {(entry.name, entry.version) for entry in self.listing}
        if (answer.model, answer.version) not in known and not answer.problem:
            self.look(quietly=True)

    # --- models ---

    def look(self, quietly: bool = False) -> bool:
        """Update the list of models; return whether that worked. Shows an error unless `quietly`."""
        try:
            self.listing = self.service.models()
        except FoundryError as error:
            if not quietly:
                self.screen.problem(error)
                if isinstance(error, Unreachable):
                    self.screen.note("the first prompt tries again")
                self._hint(error)
            return False
        return True

    def greet(self) -> None:
        """Show the model and the most important commands."""
        asked = self.look()
        entry = self._entry()
        if asked and self.model and not entry:
            self.screen.problem(self._no_model(self.model))
            self.model = None
            entry = self._entry()
        self.screen.news(f"GPT Foundry chat{f' with {described(entry)}' if entry else ''}")
        self.screen.note(
            "The model continues a text: write the beginning, and it goes on. Your next line is added to the text."
        )
        self.screen.note("/help lists the commands, Ctrl-C stops an answer, exit or Ctrl-D leaves.")

    def _entry(self) -> ModelEntry | None:
        """The chosen model in the list of models."""
        wanted = [entry for entry in self.listing if (entry.name == self.model if self.model else entry.default)]
        return wanted[0] if wanted else None

    def _no_model(self, name: str) -> ConfigError:
        names = [entry.name for entry in self.listing]
        return ConfigError(f"there is no model {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")

    def _hint(self, error: FoundryError) -> None:
        if isinstance(error, ServiceError) and error.status == 401 and self.screen.interactive:
            self.screen.note("enter a key with /key, then /retry")

    # --- commands ---

    def words(self) -> list[str]:
        """The words that Tab completes."""
        names = [entry.name for entry in self.listing]
        return [f"/{word}" for word in [*COMMANDS, *SHAPES]] + list(SHAPES) + names

    def _command(self, word: str, rest: str) -> None:
        word = word.lower()
        command = COMMANDS.get(SHORT.get(word, word))
        if command:
            command.run(self, rest)
            return
        if word.replace("-", "_") not in SHAPES:
            known = [f"/{name}" for name in [*COMMANDS, *SHORT, *SHAPES] if len(name) > 1]
            near = (
                did_you_mean(f"/{word}", known)
                or " /help lists them; to start a prompt with a slash, put a space before it."
            )
            raise ConfigError(f"there is no command '/{word}'.{near}")
        self.set(f"{word} {rest}")

    def set(self, rest: str) -> None:
        """Set a parameter from `NAME VALUE`, or show it."""
        name, text = NAME_AND_VALUE.fullmatch(rest).groups()  # type: ignore[union-attr]  # matches any text
        if not name:
            raise ConfigError("expected /set NAME VALUE; /settings lists the names")
        name = parameter(name)
        if text:
            self.values.set(name, text)
        self.screen.line(self.values.row(name))

    def settings(self, rest: str) -> None:
        """Show every parameter with its value and default."""
        rows = self.values.table()
        names, values = (max(len(row[column]) for row in rows) for column in range(2))
        for name, value, about in rows:
            self.screen.line(f"{name:{names}}  {value:{values}}  {about}")

    def reset(self, rest: str) -> None:
        """Reset one parameter, or all."""
        if rest.strip():
            self.values.set(rest, "default")
            self.screen.line(self.values.row(parameter(rest)))
        else:
            self.values.reset()
            self.screen.note("all settings are back to their defaults")

    def choose(self, rest: str) -> None:
        """Switch to another model; the text stays."""
        name = rest.strip()
        if name:
            if self.look() and name not in [entry.name for entry in self.listing]:
                raise self._no_model(name)
            self.model = name
            self.conversation.forget_measure()
        elif not self.listing:
            self.look()
        entry = self._entry()
        self.screen.line(described(entry) if entry else self.model or "the service's default model")

    def models(self, rest: str) -> None:
        """Show the service's models."""
        if self.look():
            for entry in self.listing:
                mark = "*" if entry == self._entry() else " "
                self.screen.line(f"{mark} {described(entry)}{f' · {entry.error}' if entry.error else ''}")

    def history(self, rest: str) -> None:
        """Show the text so far, or set whether prompts continue it."""
        choice = rest.strip().lower()
        if choice in ("on", "off"):
            self.remembers = choice == "on"
            self.screen.note(
                "your next line is added to the text" if self.remembers else "each line is an independent prompt"
            )
        elif choice:
            raise ConfigError(f"history is {rest.strip()!r}; expected on, off or nothing")
        elif not self.conversation.turns:
            self.screen.note("the text is empty")
        else:
            self._show_turns()

    def _show_turns(self) -> None:
        for turn in self.conversation.turns:
            if turn.opens and turn is not self.conversation.turns[0]:
                self.screen.note("--- a new text ---")
            if turn.prompt:
                self.screen.line(f"> {turn.prompt.removeprefix(chr(10))}")
            self.screen.text(turn.answer)
            self.screen.end_line()
            if turn.ended:
                self.screen.note(f"({turn.ended})")
        if self.conversation.skipped:
            self.screen.note(f"the first {self.conversation.skipped} characters are no longer sent to the model")

    def clear(self, rest: str) -> None:
        """Start a new text."""
        self.conversation.clear()
        self._unanswered = None
        self.screen.note("the text is empty")

    def undo(self, rest: str) -> None:
        """Remove the last prompt and its answer."""
        turn = self.conversation.undo()
        if turn is None:
            self.screen.note("there is nothing to undo")
        else:
            self.screen.note(f"removed: {turn.prompt.strip() or 'the text added by /more'}")

    def retry(self, rest: str) -> None:
        """Try the last prompt again; the old answer stays if no new one comes."""
        old = None if self._unanswered else self.conversation.undo()
        turn = self._unanswered or old
        if turn is None:
            raise ConfigError("there is no prompt to retry yet; write one")
        if turn.answer and self.values.is_set("seed"):
            self.screen.note("the seed is set, so the text may be the same; /seed none uses a new one each time")
        answer = self._answer(turn.prompt, turn.opens)
        if old and not answer.begun:
            self.conversation.add(old)
            self._unanswered = None
            self.screen.note("the previous answer stays")

    def more(self, rest: str) -> None:
        """Let the model continue its own text."""
        if not self.conversation.text:
            raise ConfigError("there is no text to continue yet; write its beginning")
        self._answer("", opens=False)

    def save(self, rest: str) -> None:
        """Write the text to a new file, whole or not at all."""
        if not rest.strip():
            raise ConfigError("expected /save FILE")
        path = expanded(rest.strip())
        if not self.conversation.turns:
            raise ConfigError("the text is empty; there is nothing to save")
        save(path, harmless(self.conversation.whole()))
        self.screen.note(f"saved as {path}")

    def key(self, rest: str) -> None:
        """Ask for an API key, without showing or storing it."""
        if rest:
            raise ConfigError("a key on this line would be stored in the history; type /key alone")
        try:
            key = getpass.getpass("API key: ")
        except EOFError:
            self.screen.note("the key is unchanged")
            return
        self.service.use_key(key.strip())
        if self.look():
            self.screen.note("the service accepts this key")

    def help(self, rest: str) -> None:
        """List the commands."""
        width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            self.screen.line(f"{f'/{name} {command.usage}':{width}}  {command.help}")
        self.screen.line(f"{'/temperature 0.7':{width}}  short for /set temperature 0.7; also for {', '.join(SHAPES)}")
        self.screen.note(
            "A line that ends in \\ continues on the next line. Put a space before a prompt that starts with a slash, "
            f"and before {', '.join(LEAVING[:-1])} or {LEAVING[-1]} alone, which would leave the chat."
        )

    def leave(self, rest: str) -> None:
        """Leave the chat."""
        raise ExitChat


@dataclass(frozen=True)
class Command:
    """One slash command."""

    run: Callable[[Chat, str], None]
    help: str
    usage: str = ""


COMMANDS = {
    "help": Command(Chat.help, "this list"),
    "more": Command(Chat.more, "let the model continue its own text"),
    "retry": Command(Chat.retry, "try the last prompt again and replace its answer"),
    "undo": Command(Chat.undo, "remove the last prompt and its answer"),
    "clear": Command(Chat.clear, "start a new text"),
    "history": Command(Chat.history, "show the text; off: make each line an independent prompt", "[on|off]"),
    "save": Command(Chat.save, "write the text to a new file", "FILE"),
    "set": Command(Chat.set, "set a sampling parameter; VALUE default resets it", "NAME VALUE"),
    "settings": Command(Chat.settings, "show all parameters with their values and meaning"),
    "reset": Command(Chat.reset, "reset one parameter, or all", "[NAME]"),
    "model": Command(Chat.choose, "switch to another model; the text stays", "[NAME]"),
    "models": Command(Chat.models, "list the service's models"),
    "key": Command(Chat.key, "enter an API key, hidden"),
    "quit": Command(Chat.leave, "leave the chat, like exit and Ctrl-D"),
}
SHORT = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit", "continue": "more", "parameters": "settings"}


def described(entry: ModelEntry) -> str:
    """A model in one line, as in the playground."""
    parts = [
        f"{entry.name} version {entry.version}" if entry.version else entry.name,
        STATES.get(entry.state, ""),
        f"{entry.bits_per_byte:.3f} bits/byte" if entry.bits_per_byte is not None else "",
        f"{entry.parameters / 1e6:.1f} M parameters" if entry.parameters else "",
        f"context {entry.context_length}" if entry.context_length else "",
    ]
    return " · ".join(part for part in parts if part)


def save(path: Path, text: str) -> None:
    """Write a new file, whole or not at all. Raises ConfigError."""
    try:
        if path.exists():
            raise ConfigError(f"{path} exists; expected the name of a new file")
        write_file(path, text.encode(errors="replace"))
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(path)!r} cannot be written: {str(reason).lower()}") from None
