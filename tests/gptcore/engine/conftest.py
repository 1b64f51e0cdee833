"""A runner without a network, for engines whose every output is known beforehand."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.engine.engine import Engine
from gptcore.engine.interface import Chunk, FinishReason, Request, Stepped, TokenLogprob, Update
from gptcore.engine.settings import EngineSettings
from gptcore.package import Package
from gptcore.sampling import SamplingParams, SamplingState, next_tokens
from gptcore.tokenizer import Tokenizer

VOCAB, SPARE = 257, 7
"""The tokenizer's ids, and the rows behind them that a padded embedding has."""

CONTEXT = 128
PRIME = (1 << 61) - 1
ROWS = 4096


class FakeRunner:
    """A runner whose logits are a hash of the tokens that a slot really holds, in place of keys and values.

    A wrong slot, position, copy or reuse gives other logits, or raises if it reads what was never written. If not
    `invariant`, a position's hash also says whether prefill or a decode computed it, as rounding would.
    """

    name, note, weights = "fake", "", ""
    dtype, device, cache_bytes = torch.float32, torch.device("cpu"), 0
    vocab_size = VOCAB + SPARE

    def __init__(
        self, slots: int = 4, invariant: bool = True, granularity: int = 1, context_length: int = CONTEXT
    ) -> None:
        self.slots, self.context_length = slots, context_length
        self.invariant, self.reuse_granularity = invariant, granularity
        self.states: list[list[int]] = [[0] for _ in range(slots)]
        """Per slot, the hash of the first n tokens, for each n that it holds."""
        self.steps: list[Sequence[Chunk]] = []
        self.copied = 0
        self.closed = False
        generator = torch.Generator().manual_seed(1)
        self._logits = torch.randn(ROWS, VOCAB + SPARE, generator=generator) * 2
        self._logits[:, VOCAB:] = 99.0  # the spare ids would win, if they could

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        assert not self.closed
        assert len({chunk.slot for chunk in chunks}) == len(chunks), "a slot is in a step twice"
        self.steps.append(chunks)
        wanted: list[int] = []
        for chunk in chunks:
            self._run(chunk)
            wanted += self.states[chunk.slot][len(self.states[chunk.slot]) - chunk.wanted :]
        return self.logits(wanted)

    def logits(self, states: Iterable[int]) -> Tensor:
        return self._logits[torch.tensor([state % ROWS for state in states], dtype=torch.long)]

    def next_tokens(self, logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        return next_tokens(logits, rows)

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target
        assert length < len(self.states[source]), "copies what was never written"
        self.states[target] = self.states[source][: length + 1]
        self.copied += length

    def close(self) -> None:
        self.closed = True

    def follow(self, state: int, token: int, how: int = 0) -> int:
        """The hash of one more token; `how` it was computed matters only if not invariant."""
        return (state * 1_000_003 + token * 8 + 1 + (0 if self.invariant else how)) % PRIME

    def _run(self, chunk: Chunk) -> None:
        states = self.states[chunk.slot]
        assert 0 <= chunk.start < len(states), "reads what was never written"
        assert chunk.start + len(chunk.tokens) <= self.context_length, "writes past the context"
        assert 0 <= chunk.wanted <= len(chunk.tokens)
        del states[chunk.start + 1 :]
        g = self.reuse_granularity
        for begin in range(0, len(chunk.tokens), g):
            part = chunk.tokens[begin : begin + g]
            decode = len(part) == 1 and chunk.wanted > 0
            assert decode or (chunk.start + begin) % g == 0, "a chunk begins out of line"
            for token in part:
                states.append(self.follow(states[-1], token, how=1 + decode))


class ScriptedRunner(FakeRunner):
    """A runner that generates the bytes of `script`, then <|endoftext|>, whatever the prompt is."""

    def __init__(self, script: bytes, prompt_length: int = 1, slots: int = 4) -> None:
        super().__init__(slots)
        self.script, self.prompt_length = script, prompt_length

    def follow(self, state: int, token: int, how: int = 0) -> int:
        return state + 1  # the number of tokens

    def logits(self, states: Iterable[int]) -> Tensor:
        said = [state - self.prompt_length for state in states]
        tokens = [self.script[n] if 0 <= n < len(self.script) else VOCAB - 1 for n in said]
        rows = torch.zeros(len(tokens), VOCAB)
        rows[range(len(tokens)), tokens] = 50.0
        return rows


class Answer:
    """All of one request's updates together."""

    def __init__(self) -> None:
        self.updates: list[Update] = []

    def put(self, update: Update) -> bool:
        """Takes an update; true if it was the last."""
        assert not self.updates or self.updates[-1].finish_reason is None, "an update after the last"
        self.updates.append(update)
        assert update.generated_tokens == len(self.tokens)
        return update.finish_reason is not None

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.updates)

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for token in update.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for update in self.updates for entry in update.logprobs]

    @property
    def reason(self) -> FinishReason | None:
        return self.updates[-1].finish_reason

    @property
    def cached(self) -> int:
        return self.updates[-1].cached_tokens


def run(engine: Stepped, *requests: Request, steps: int = 100_000) -> dict[str, Answer]:
    """Adds `requests` and steps until all open ones have ended, or for so many `steps`."""
    for request in requests:
        engine.add(request)
    answers: dict[str, Answer] = {}
    for _ in range(steps):
        if not engine.busy:
            break
        for update in engine.step():
            answers.setdefault(update.request_id, Answer()).put(update)
    engine.check()
    return answers


def alone(runner: FakeRunner, prompt: Sequence[int], params: SamplingParams, eot: int = VOCAB - 1) -> list[int]:
    """What an invariant `runner`'s logits make of one prompt, without any engine; params.seed is set."""
    assert params.seed is not None
    state = 0
    for token in prompt:
        state = runner.follow(state, token)
    tokens = list(prompt)
    row = SamplingState(params, params.seed, tokens, len(prompt))
    while len(tokens) < min(len(prompt) + params.max_new_tokens, runner.context_length):
        tokens += next_tokens(runner.logits([state])[:, :VOCAB], [row])
        state = runner.follow(state, tokens[-1])
        if tokens[-1] == eot:
            break
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def fake_package(byte_tokenizer: Tokenizer) -> Package:
    """What an engine reads of a package beside its weights."""
    return Package(Path("fake"), ModelConfig(vocab_size=VOCAB + SPARE, context_length=CONTEXT), byte_tokenizer, {})


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(fake_package: Package) -> MakeEngine:
    """An engine on a runner, by default a fake one, with settings by name."""

    def make(runner: FakeRunner | None = None, **settings: int) -> Engine:
        return Engine(fake_package, EngineSettings(**settings), runner or FakeRunner())  # type: ignore[arg-type]

    return make
