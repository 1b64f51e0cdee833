"""The token stream of conversations: messages go in, one 32-bit word per token comes out.

A word is an id with two flags: whether the assistant has to write the token, and whether a conversation begins with it.
"""

from collections.abc import Callable

import numpy as np

from gptcore.chat import chat_template
from gptcore.errors import ConfigError, CorpusError, PackageError
from gptcore.tokenizer import Tokenizer
from train_job.data.conversations import Messages, answer_bytes

WORD = "<u4"
ANSWER, FIRST = np.uint32(1 << 31), np.uint32(1 << 30)
ID = np.uint32((1 << 30) - 1)


class ConversationWords:
    """Turns conversations into words, and counts them. Raises PackageError for a tokenizer without a chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = chat_template(tokenizer)
        if template is None:
            raise PackageError("it has no chat template, so it only continues text")
        self._template = template
        self.counts = {"num_tokens": 0, "num_bytes": 0, "num_documents": 0, "num_answered": 0}

    def of(self, messages: Messages, place: Callable[[], str]) -> bytes:
        """The words of a conversation. Raises CorpusError, with its place, if the template refuses it."""
        try:
            ids, answered = self._template.answers(messages)
        except ConfigError as error:
            raise CorpusError(f"{place()}: {error}") from None
        words = np.array(ids, dtype=WORD) | np.where(answered, ANSWER, np.uint32(0)).astype(WORD)
        words[:1] |= FIRST
        self.counts["num_tokens"] += len(ids)
        self.counts["num_bytes"] += answer_bytes(messages)
        self.counts["num_documents"] += 1
        self.counts["num_answered"] += sum(answered[1:])
        return words.tobytes()
