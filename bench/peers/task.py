"""The task of a turn of `bench.decode` and its result, as data that is sent between processes."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeTask:
    """The task of one turn: continue `batch` prompts greedily by `new_tokens` each. No token ends a text."""

    package: str
    """Folder of the model package."""
    scratch: str
    """Folder where a contestant may store the weights in its own format."""
    batch: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    vocab_size: int
    device: str = "cpu"

    def prompts(self) -> list[list[int]]:
        """`batch` prompts of `prompt_tokens` ids each, the same on every call."""
        chooser = random.Random(0)
        return [[chooser.randrange(self.vocab_size - 1) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True)
class DecodeTurn:
    """The result of one turn. Decoding begins once every sequence has its first token."""

    prompt_seconds: float
    decode_seconds: float
    tokens: list[list[int]]
    """The continuation of each prompt."""
    decoded: int
    """How many of the tokens were generated in `decode_seconds`."""
    kernel_seconds: float | None = None
    """Of `decode_seconds`, those in the engine's native kernel; None if it has none."""

    @property
    def decode_rate(self) -> float:
        """Tokens per second while decoding, all sequences together."""
        return self.decoded / self.decode_seconds

    @property
    def whole_rate(self) -> float:
        """Tokens per second from when the prompts arrive to the last token."""
        return sum(map(len, self.tokens)) / (self.prompt_seconds + self.decode_seconds)
