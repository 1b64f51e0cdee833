"""Handles the lines of a chat: prompts, and commands that start with a slash.

An error is one line on the screen, and the chat continues.
"""

import getpass
import re
from collections.abc import Callable
from dataclasses import dataclass

from gptcore.errors import ConfigError, FoundryError, did_you_mean
from gptcore.home import expanded
from serve_app.chat.client import encodable
from serve_app.chat.saving import append, save
from serve_app.chat.session import Session, described
from serve_app.chat.terminal import harmless
from serve_app.chat.values import NOTHING, SHAPES, parameter, written

NAME_AND_VALUE = re.compile(r"\s*([\w-]*)[ =]?(.*)", re.DOTALL)
LEAVING = ("exit", "quit", "bye", ":q", ":quit", "exit()", "quit()")
"""Lines that end the chat like /quit. With a space in front, they are prompts."""


class ExitChat(Exception):
    """The user wants to leave the chat."""


class Chat(Session):
    """A chat whose lines may be commands."""

    def take(self, line: str) -> None:
        """Handle a line from the terminal. Raises ExitChat."""
        if line.rstrip().lower() in LEAVING:
            self.screen.note(f"left the chat; to send {line.rstrip()!r} as a prompt, put a space before it")
            raise ExitChat
        word, _, rest = line[1:].partition(" ")
        try:
            if line.startswith("/"):
                self._command(word, rest)
            elif line.strip():
                self.prompt(line)
        except FoundryError as error:
            self.screen.problem(error)

    @property
    def _kind(self) -> str:
        return "conversation" if self.values.replies else "text"

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
        """Switch to another model; what was said stays."""
        name = rest.strip()
        if name:
            if self.look() and name not in [entry.name for entry in self.listing]:
                raise self._no_model(name)
            self.model = name
            self._learn()
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
        """Show what was said, or set whether prompts continue it."""
        choice = rest.strip().lower()
        if choice in ("on", "off"):
            self.remembers = choice == "on"
            on = f"your next line is added to the {self._kind}"
            self.screen.note(on if self.remembers else "each line is an independent prompt")
        elif choice:
            raise ConfigError(f"history is {rest.strip()!r}; expected on, off or nothing")
        elif not self.conversation.turns:
            self.screen.note(f"the {self._kind} is empty")
        else:
            self._show_turns()

    def _show_turns(self) -> None:
        for turn in self.conversation.turns:
            if turn.opens and turn is not self.conversation.turns[0]:
                self.screen.note(f"--- a new {'conversation' if turn.replies else 'text'} ---")
            if turn.prompt:
                self.screen.line(f"> {turn.prompt}")
            self.screen.text(turn.answer)
            self.screen.end_line()
            if turn.ended:
                self.screen.note(f"({turn.ended})")
        if self.conversation.skipped:
            self.screen.note(f"the first {self.conversation.skipped} characters are no longer sent to the model")
        if self.conversation.dropped:
            self.screen.note(f"the first {self.conversation.dropped} messages are no longer sent to the model")

    def clear(self, rest: str) -> None:
        """Start a new text or conversation."""
        self.conversation.clear()
        self._unanswered = None
        self.screen.note(f"the {self._kind} is empty")

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
        """Write the text to a new file, or add the conversation to a file, whole or not at all."""
        if not rest.strip():
            raise ConfigError("expected /save FILE")
        path, turns = expanded(rest.strip()), self.conversation.turns
        if turns and not turns[-1].replies:
            save(path, harmless(self.conversation.whole()))
            self.screen.note(f"saved as {path}")
            return
        messages = self.conversation.messages(self.system, answered=True)
        if not messages:
            raise ConfigError(f"the {self._kind} is empty; there is nothing to save")
        append(path, messages)
        self.screen.note(f"saved as the last line of {path}")

    def instruct(self, rest: str) -> None:
        """Set the system prompt of the conversation, or show it."""
        text = encodable(rest.strip())
        entry = self._entry()
        if text.lower() in NOTHING:
            text = self.system = ""
        elif text and entry and entry.chat is False:
            raise self._no_system(entry)
        self.system = text or self.system
        self.screen.line(f"the system prompt is {written(self.system or None)}")

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
    "system": Command(Chat.instruct, "tell a model that chats how to answer; TEXT none: nothing", "[TEXT]"),
    "more": Command(Chat.more, "let the model continue its own text"),
    "retry": Command(Chat.retry, "try the last prompt again and replace its answer"),
    "undo": Command(Chat.undo, "remove the last prompt and its answer"),
    "clear": Command(Chat.clear, "start a new text or conversation"),
    "history": Command(Chat.history, "show what was said; off: make each line an independent prompt", "[on|off]"),
    "save": Command(
        Chat.save, "write the text to a new file; a conversation is added to FILE as a line of JSON", "FILE"
    ),
    "set": Command(Chat.set, "set a sampling parameter; VALUE default resets it", "NAME VALUE"),
    "settings": Command(Chat.settings, "show all parameters with their values and meaning"),
    "reset": Command(Chat.reset, "reset one parameter, or all", "[NAME]"),
    "model": Command(Chat.choose, "switch to another model; what was said stays", "[NAME]"),
    "models": Command(Chat.models, "list the service's models"),
    "key": Command(Chat.key, "enter an API key, hidden"),
    "quit": Command(Chat.leave, "leave the chat, like exit and Ctrl-D"),
}
SHORT = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit", "continue": "more", "parameters": "settings"}
