"""One chat with a service: sends prompts, shows the answers, and knows the service's models.

A model that chats answers the conversation, by OpenAI's route for it. Any other model continues a text. Before a model
is loaded nobody knows which of the two it does; then the chat tries the first, and the service's refusal tells.
"""

import secrets
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from gptcore.errors import ConfigError, FoundryError, did_you_mean
from serve_app.chat.asking import ChatAnswer, ask
from serve_app.chat.client import ModelEntry, Piece, Service, ServiceError, Unreachable, encodable
from serve_app.chat.conversation import Conversation, Turn
from serve_app.chat.terminal import Screen
from serve_app.chat.values import Values

STATES = {"unloaded": "loads on first use", "loading": "loading", "failed": "cannot be used"}
GREETINGS = {
    True: "The model answers what you write, and knows the conversation so far. /system TEXT tells it how to answer.",
    False: "The model continues a text: write the beginning, and it goes on. Your next line is added to the text.",
    None: "A model that chats answers what you write; any other model continues it as a text.",
}
"""By whether the model chats; None: nobody knows yet."""
CANNOT_CHAT = ("no_chat_template", "route_not_found")
"""Codes of a refusal after which the model is asked to continue a text. The second comes from an older service."""
SEED_BITS = 32
"""Length of a seed chosen here: events of a conversation do not say which one the service chose."""


@dataclass
class Session:
    """One chat. `patience`: how many seconds to wait for an unreachable service."""

    service: Service
    screen: Screen
    values: Values
    patience: float
    remembers: bool
    """Whether a prompt continues the conversation or the text so far."""
    model: str | None = None
    """The chosen model; None: the service's default."""
    system: str = ""
    """The system prompt of conversations."""

    def __post_init__(self) -> None:
        self.conversation = Conversation()
        self.listing: list[ModelEntry] = []
        self._answerer: tuple[str | None, str] | None = None
        self._unanswered: Turn | None = None

    # --- prompts ---

    def prompt(self, line: str) -> ChatAnswer:
        """Let the model answer `line`, or append it to the text and let the model continue."""
        return self._answer(encodable(line), opens=not self.remembers or not self.conversation.turns)

    def _answer(self, said: str, opens: bool) -> ChatAnswer:
        self._unanswered = Turn(said, "", opens)
        entry = self._entry()
        if entry and entry.state in ("unloaded", "loading") and self.screen.interactive:
            self.screen.note(f"{entry.name} is loading; this may take a while")
        answer = ask(lambda: self._pieces(said, opens), self.screen.text, self._tell, self.patience)
        if answer.begun:
            self.conversation.add(Turn(said, answer.text, opens, answer.cut_short, self.values.replies))
            self._unanswered = None
        self.screen.end_line()
        if answer.problem:
            self.screen.problem(answer.problem)
        if self.screen.interactive:
            self._comment(answer)
        return answer

    def _pieces(self, said: str, opens: bool) -> Generator[Piece, None, None]:
        """One attempt at an answer."""
        entry = self._entry()
        if entry is None or entry.chat is None:
            try:
                self.listing = self.service.models()
            except ServiceError:
                if self.system:
                    raise
            entry = self._entry()
        if entry and entry.chat is not False:
            try:
                yield from self._reply(entry, said, opens)
                return
            except ServiceError as error:
                if error.code not in CANNOT_CHAT:
                    raise
        if entry and self.system:
            raise self._no_system(entry)
        yield from self._continuation(entry, said, opens)

    def _reply(self, entry: ModelEntry, said: str, opens: bool) -> Generator[Piece, None, None]:
        """The answer to the conversation. The service leaves out the oldest turns if there is no room for all."""
        self.values.replies = True
        messages = self.conversation.messages(self.system, Turn(said, "", opens))
        body: dict[str, Any] = {"seed": secrets.randbits(SEED_BITS)} | self.values.body()
        body |= {"model": entry.name, "messages": messages, "truncate": "oldest"}
        if messages[-1]["role"] == "assistant":
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        with closing(self.service.reply(body)) as pieces:
            for piece in pieces:
                if piece.dropped > self.conversation.dropped:
                    self._say_cut("conversation", entry, f"{piece.dropped} messages")
                self.conversation.dropped = piece.dropped
                yield piece

    def _continuation(self, entry: ModelEntry | None, said: str, opens: bool) -> Generator[Piece, None, None]:
        """The continuation of as much of the text as fits; of less, if the service says that it is too long."""
        self.values.replies = False
        conversation = self.conversation
        newest = conversation.added(said, opens)
        text = newest if opens else conversation.text + newest
        body = self.values.body() | ({"model": self.model} if self.model else {})
        wanted, context = self.values.value("max_new_tokens"), entry.context_length if entry else None
        if text == newest:
            conversation.skipped = 0
        skipped = conversation.skipped
        while True:
            sent, answered = conversation.fit(text, len(newest), context, wanted), ""
            if conversation.skipped > skipped:
                skipped = conversation.skipped
                self._say_cut("text", entry, f"{skipped} characters")
            try:
                with closing(self.service.generate(body | {"prompt": sent})) as pieces:
                    for piece in pieces:
                        answered += piece.text
                        if piece.total_tokens:
                            conversation.measure(sent + answered, piece.total_tokens)
                        yield piece
                return
            except ServiceError as error:
                if error.param != "prompt" or not conversation.cut(text, len(newest)):
                    raise

    def _tell(self, text: str) -> None:
        self.screen.note(f"{text}, Ctrl-C stops" if self.screen.interactive else text)

    def _say_cut(self, what: str, entry: ModelEntry | None, left_out: str) -> None:
        context = entry.context_length if entry else None
        limit = f"the model's context of {context} tokens" if context else "the model's context"
        self.screen.note(f"the {what} is longer than {limit}: its first {left_out} are left out")

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
        self._learn()
        return True

    def greet(self) -> None:
        """Show the model and the most important commands."""
        asked = self.look()
        entry = self._entry()
        if asked and self.model and not entry:
            self.screen.problem(self._no_model(self.model))
            self.model = None
            entry = self._entry()
        if entry and entry.chat is False and self.system:
            self.screen.problem(self._no_system(entry))
            self.system = ""
        self._learn()
        self.screen.news(f"GPT Foundry chat{f' with {described(entry)}' if entry else ''}")
        self.screen.note(GREETINGS[entry.chat if entry else None])
        self.screen.note("/help lists the commands, Ctrl-C stops an answer, exit or Ctrl-D leaves.")

    def _learn(self) -> None:
        """Set what depends on whether the model chats."""
        entry = self._entry()
        self.values.replies = entry is not None and entry.chat is True

    def _entry(self) -> ModelEntry | None:
        """The chosen model in the list of models."""
        wanted = [entry for entry in self.listing if (entry.name == self.model if self.model else entry.default)]
        return wanted[0] if wanted else None

    def _no_model(self, name: str) -> ConfigError:
        names = [entry.name for entry in self.listing]
        return ConfigError(f"there is no model {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")

    def _no_system(self, entry: ModelEntry) -> ConfigError:
        able = [each.name for each in self.listing if each.chat]
        others = f"; models that chat: {', '.join(able)}" if able else ""
        why = "only continues text, so it takes no system prompt; leave it out, in a running chat with /system none"
        return ConfigError(f"{entry.name} {why}{others}")

    def _hint(self, error: FoundryError) -> None:
        if isinstance(error, ServiceError) and error.status == 401 and self.screen.interactive:
            self.screen.note("enter a key with /key, then /retry")


def described(entry: ModelEntry) -> str:
    """A model in one line, as in the playground."""
    parts = [
        f"{entry.name} version {entry.version}" if entry.version else entry.name,
        STATES.get(entry.state, ""),
        f"{entry.bits_per_byte:.3f} bits/byte" if entry.bits_per_byte is not None else "",
        f"{entry.parameters / 1e6:.1f} M parameters" if entry.parameters else "",
        f"context {entry.context_length}" if entry.context_length else "",
        "chats" if entry.chat else "",
    ]
    return " · ".join(part for part in parts if part)
