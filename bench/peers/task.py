"""What every decoder does in a turn of `bench.decode`, and what comes of it: data that travels between processes."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeTask:
    """What everyone does in a turn: continue `batch` prompts greedily by `new_tokens` each, ends of text included."""

    package: str
    """Folder of the model package."""
    scratch: str
    """Folder where a contestant may keep its own form of the weights."""
    batch: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    vocab_size: int
    device: str = "cpu"

    def prompts(self) -> list[list[int]]:
        """`batch` prompts of `prompt_tokens` ids each, the same ones every time."""
        chooser = random.Random(0)
        return [[chooser.randrange(self.vocab_size - 1) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True)
class DecodeTurn:
    """One turn. The prompts are behind once every sequence has its first token; what follows is decoding."""

    prompt_seconds: float
    decode_seconds: float
    tokens: list[list[int]]
    """The continuation of each prompt."""
    decoded: int
    """How many of the tokens were made in `decode_seconds`."""

    @property
    def decode_rate(self) -> float:
        """Tokens per second while decoding, all sequences together."""
        return self.decoded / self.decode_seconds

    @property
    def whole_rate(self) -> float:
        """Tokens per second from the prompts' arrival to the last token."""
        return sum(map(len, self.tokens)) / (self.prompt_seconds + self.decode_seconds)
