"""A chat as it is led: lines that are prompts, and lines that begin with a slash and are commands.

In comes a line, out goes what the screen shows. What is wrong with it is told in one line, and the chat goes on.
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
from serve_app.chat.client import ModelEntry, Service, ServiceError, Unreachable, carriable
from serve_app.chat.conversation import Conversation, Turn
from serve_app.chat.terminal import Screen, harmless
from serve_app.chat.values import SHAPES, Values, parameter

NAME_AND_VALUE = re.compile(r"\s*([\w-]*)[ =]?(.*)", re.DOTALL)
STATES = {"unloaded": "loads on first use", "loading": "loading", "failed": "cannot be used"}


LEAVING = ("exit", "quit", "bye", ":q", ":quit", "exit()", "quit()")
"""Lines that end the chat as /quit does: whoever types one wants to go. Behind a space it is a prompt."""


class ExitChat(Exception):
    """The person wants to go."""


@dataclass
class Chat:
    """All that there is to a chat; `patience` is for how many seconds a service that is away is waited for."""

    service: Service
    screen: Screen
    values: Values
    patience: float
    remembers: bool
    """Whether a prompt goes on from what was written before."""
    model: str | None = None
    """The one asked for; None: the service's default."""

    def __post_init__(self) -> None:
        self.conversation = Conversation()
        self.listing: list[ModelEntry] = []
        self._answerer: tuple[str | None, str] | None = None
        self._unanswered: Turn | None = None

    # --- prompts ---

    def take(self, line: str) -> None:
        """Does what a line at the terminal asks for. Raises ExitChat."""
        if line.rstrip().lower() in LEAVING:
            self.screen.note(f"left the chat; to send the word {line.rstrip()!r} itself, put a space before it")
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
        """Puts `line` behind the text and has the model go on."""
        opens = not self.remembers or not self.conversation.turns
        return self._answer(self.conversation.added(carriable(line), opens), opens)

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
        """Sends as much of the text as fits; less, if the service says that it does not."""
        entry = self._entry()
        if entry and entry.state in ("unloaded", "loading") and self.screen.interactive:
            self.screen.note(f"{entry.name} is loaded first; this may take a while")
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
        holds = f"the {context} tokens that the model holds" if context else "what the model holds"
        self.screen.note(
            f"the text is longer than {holds}: its first {self.conversation.skipped} characters are left out"
        )

    def _comment(self, answer: ChatAnswer) -> None:
        if not answer.begun:
            if answer.problem:
                self._hint(answer.problem)
            else:
                self.screen.note(f"{answer.end or 'nothing came'}; /retry asks again")
            return
        answerer = (self.model, answer.label)
        if self._answerer and self._answerer[0] == self.model and self._answerer != answerer:
            self.screen.news(f"{answer.label} answers now; the answer before came from {self._answerer[1]}")
        self._answerer = answerer
        self.screen.note(answer.figures())
        known = {(entry.name, entry.version) for entry in self.listing}
        if (answer.model, answer.version) not in known and not answer.problem:
            self.look(quietly=True)

    # --- models ---

    def look(self, quietly: bool = False) -> bool:
        """Asks which models there are. Says what is wrong, unless `quietly`; whether it could be asked."""
        try:
            self.listing = self.service.models()
        except FoundryError as error:
            if not quietly:
                self.screen.problem(error)
                if isinstance(error, Unreachable):
                    self.screen.note("it is tried again with the first prompt")
                self._hint(error)
            return False
        return True

    def greet(self) -> None:
        """What one should know before the first line."""
        asked = self.look()
        entry = self._entry()
        if asked and self.model and not entry:
            self.screen.problem(self._no_model(self.model))
            self.model = None
            entry = self._entry()
        self.screen.news(f"GPT Foundry chat{f' with {described(entry)}' if entry else ''}")
        self.screen.note(
            "The model continues a text: write its beginning and it goes on; your next line is added to it."
        )
        self.screen.note("/help shows the commands, Ctrl-C stops an answer, exit or Ctrl-D leaves.")

    def _entry(self) -> ModelEntry | None:
        """The listing's entry of the model asked for."""
        wanted = [entry for entry in self.listing if (entry.name == self.model if self.model else entry.default)]
        return wanted[0] if wanted else None

    def _no_model(self, name: str) -> ConfigError:
        names = [entry.name for entry in self.listing]
        return ConfigError(f"there is no model {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")

    def _hint(self, error: FoundryError) -> None:
        if isinstance(error, ServiceError) and error.status == 401 and self.screen.interactive:
            self.screen.note("/key asks for a key, unseen; then /retry")

    # --- commands ---

    def words(self) -> list[str]:
        """What Tab completes to."""
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
                did_you_mean(f"/{word}", known) or " /help shows them; a prompt may begin with a slash behind a space."
            )
            raise ConfigError(f"there is no command '/{word}'.{near}")
        self.set(f"{word} {rest}")

    def set(self, rest: str) -> None:
        """`NAME VALUE`; without a value it is shown."""
        name, text = NAME_AND_VALUE.fullmatch(rest).groups()  # type: ignore[union-attr]  # it fits every text
        if not name:
            raise ConfigError("expected /set NAME VALUE; /settings shows the names")
        name = parameter(name)
        if text:
            self.values.set(name, text)
        self.screen.line(self.values.row(name))

    def settings(self, rest: str) -> None:
        """Every parameter, its value and its default."""
        rows = self.values.table()
        names, values = (max(len(row[column]) for row in rows) for column in range(2))
        for name, value, about in rows:
            self.screen.line(f"{name:{names}}  {value:{values}}  {about}")

    def reset(self, rest: str) -> None:
        """One parameter, or all, back to the default."""
        if rest.strip():
            self.values.set(rest, "default")
            self.screen.line(self.values.row(parameter(rest)))
        else:
            self.values.reset()
            self.screen.note("every setting has its default")

    def choose(self, rest: str) -> None:
        """Another model; the text stays."""
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
        """Every model of the service."""
        if self.look():
            for entry in self.listing:
                mark = "*" if entry == self._entry() else " "
                self.screen.line(f"{mark} {described(entry)}{f' · {entry.error}' if entry.error else ''}")

    def history(self, rest: str) -> None:
        """Shows what was written, or says whether it is remembered."""
        choice = rest.strip().lower()
        if choice in ("on", "off"):
            self.remembers = choice == "on"
            self.screen.note(
                "your next line is added to the text" if self.remembers else "each line is a prompt of its own"
            )
        elif choice:
            raise ConfigError(f"history is {rest.strip()!r}; expected on or off, or nothing to see it")
        elif not self.conversation.turns:
            self.screen.note("nothing was written yet")
        else:
            self._show_turns()

    def _show_turns(self) -> None:
        for turn in self.conversation.turns:
            if turn.opens and turn is not self.conversation.turns[0]:
                self.screen.note("--- a text of its own ---")
            if turn.prompt:
                self.screen.line(f"> {turn.prompt.removeprefix(chr(10))}")
            self.screen.text(turn.answer)
            self.screen.end_line()
            if turn.ended:
                self.screen.note(f"({turn.ended})")
        if self.conversation.skipped:
            self.screen.note(f"the model is no longer given the first {self.conversation.skipped} characters")

    def clear(self, rest: str) -> None:
        """A new text."""
        self.conversation.clear()
        self._unanswered = None
        self.screen.note("the text is empty")

    def undo(self, rest: str) -> None:
        """Takes back a prompt and its answer."""
        turn = self.conversation.undo()
        said = turn.prompt.strip() if turn else ""
        self.screen.note(f"taken back: {said or 'what was added without a prompt'}" if turn else "nothing to take back")

    def retry(self, rest: str) -> None:
        """The last prompt again, in place of its answer, which stays if no other comes."""
        old = None if self._unanswered else self.conversation.undo()
        turn = self._unanswered or old
        if turn is None:
            raise ConfigError("there is no prompt to try again yet; write one")
        if turn.answer and self.values.is_set("seed"):
            self.screen.note("the seed is set, so the same text may come again; /seed none draws another")
        answer = self._answer(turn.prompt, turn.opens)
        if old and not answer.begun:
            self.conversation.add(old)
            self._unanswered = None
            self.screen.note("the answer of before stays")

    def more(self, rest: str) -> None:
        """Has the model go on from its own text."""
        if not self.conversation.text:
            raise ConfigError("there is no text to go on from yet; write its beginning")
        self._answer("", opens=False)

    def save(self, rest: str) -> None:
        """The text as a file, which must be new: all of it appears, or nothing."""
        if not rest.strip():
            raise ConfigError("expected /save FILE")
        path = expanded(rest.strip())
        if not self.conversation.turns:
            raise ConfigError("nothing was written yet, so there is nothing to save")
        save(path, harmless(self.conversation.whole()))
        self.screen.note(f"saved as {path}")

    def key(self, rest: str) -> None:
        """Asks for an API key, which is not shown and not kept."""
        if rest:
            raise ConfigError("a key that is typed in the open is remembered with the lines; type /key alone")
        try:
            key = getpass.getpass("API key: ")
        except EOFError:
            self.screen.note("the key is as it was")
            return
        self.service.use_key(key.strip())
        if self.look():
            self.screen.note("the service takes this key")

    def help(self, rest: str) -> None:
        """Every command."""
        width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            self.screen.line(f"{f'/{name} {command.usage}':{width}}  {command.help}")
        self.screen.line(f"{'/temperature 0.7':{width}}  the same as /set temperature 0.7; so for {', '.join(SHAPES)}")
        self.screen.note(
            "A line that ends in \\ goes on in the next. A prompt that begins with a slash needs a space before it, "
            f"and so does one that is nothing but {', '.join(LEAVING[:-1])} or {LEAVING[-1]}: these leave."
        )

    def leave(self, rest: str) -> None:
        """Ends the chat."""
        raise ExitChat


@dataclass(frozen=True)
class Command:
    """What a word behind a slash does."""

    run: Callable[[Chat, str], None]
    help: str
    usage: str = ""


COMMANDS = {
    "help": Command(Chat.help, "this list"),
    "more": Command(Chat.more, "the model goes on from its own text"),
    "retry": Command(Chat.retry, "the last prompt again, in place of its answer"),
    "undo": Command(Chat.undo, "takes back the last prompt and its answer"),
    "clear": Command(Chat.clear, "begins a new text"),
    "history": Command(Chat.history, "what was written; off: each line is a prompt of its own", "[on|off]"),
    "save": Command(Chat.save, "writes the text into a new file", "FILE"),
    "set": Command(Chat.set, "a sampling parameter; VALUE default takes it back", "NAME VALUE"),
    "settings": Command(Chat.settings, "every parameter, its value and what it is for"),
    "reset": Command(Chat.reset, "one parameter, or all, back to the default", "[NAME]"),
    "model": Command(Chat.choose, "another model; the text stays", "[NAME]"),
    "models": Command(Chat.models, "the models of the service"),
    "key": Command(Chat.key, "asks for an API key, unseen"),
    "quit": Command(Chat.leave, "ends the chat, as exit and Ctrl-D do"),
}
SHORT = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit", "continue": "more", "parameters": "settings"}


def described(entry: ModelEntry) -> str:
    """A model in short, as the playground has it."""
    parts = [
        f"{entry.name} version {entry.version}" if entry.version else entry.name,
        STATES.get(entry.state, ""),
        f"{entry.bits_per_byte:.3f} bits/byte" if entry.bits_per_byte is not None else "",
        f"{entry.parameters / 1e6:.1f} M parameters" if entry.parameters else "",
        f"context {entry.context_length}" if entry.context_length else "",
    ]
    return " · ".join(part for part in parts if part)


def save(path: Path, text: str) -> None:
    """Writes a new file, beside its place first. Raises ConfigError."""
    try:
        if path.exists():
            raise ConfigError(f"{path} exists; expected the name of a new file")
        write_file(path, text.encode(errors="replace"))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(path)!r} cannot be written: {str(reason).lower()}") from None
