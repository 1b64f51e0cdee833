"""What a request has generated: its text as it grows, and where it ends. Every engine ends its sequences here."""

from gptcore.engine.interface import FinishReason, Request
from gptcore.text import TextStream
from gptcore.tokenizer import Tokenizer


class Continuation:
    """The generated part of one sequence."""

    def __init__(self, request: Request, tokenizer: Tokenizer, context_length: int) -> None:
        params = request.params
        self.ends = frozenset(params.stop_token_ids).union(() if params.ignore_eos else tokenizer.stops)
        """Tokens that end the sequence."""
        self.limit = min(params.max_new_tokens, context_length - len(request.prompt))
        """Most tokens to generate: as many as were requested, or as fit."""
        self.length = 0
        """Tokens generated so far."""
        self._text = TextStream(tokenizer, params.stop, begins=tokenizer.special.issuperset(request.prompt))

    def add(self, token: int) -> tuple[str, FinishReason | None]:
        """Add a token; return the text that is now certain, and why the sequence ends if it does."""
        self.length += 1
        if token in self.ends:
            return self._text.flush(), FinishReason.STOP
        text, reason = self._text.push(token), None
        if self.length >= self.limit:
            reason = FinishReason.LENGTH
            text += self._text.flush()
        return text, FinishReason.STOP if self._text.stopped else reason

    def flush(self) -> str:
        """The text that was held back, when no more tokens follow."""
        return self._text.flush()
