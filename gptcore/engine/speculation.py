"""Guesses a sequence's next tokens from its own earlier ones, so that one step can compute several. No torch here.

Text repeats itself: an answer quotes the question, and code its names. Where the last tokens have occurred before,
those that followed them there are a draft (prompt lookup decoding, Saxena 2023). The engine runs the draft together
with the last token, samples every row as it would have anyway, and keeps what agrees. So a wrong draft costs time and
changes no text.

How long a draft may be follows from how many tokens in a row have agreed with what they followed: after n of them, the
next one agrees with a chance of about n / (n + 1) (Laplace's rule of succession). `Lookup` counts them whether or not
there was a draft, so a sequence that does not repeat itself costs nothing but the lookup.
"""

from collections.abc import Sequence as Tokens
from typing import Self

MATCH = 3
"""Tokens that must have occurred before, in this order, for a draft."""
LONGEST = 15
"""Most tokens of a draft."""
ROW_COST = 0.5
"""See `Speculation.row_cost`: with AVX2 alone, where arithmetic soon is the limit."""
ROW_COSTS = {"native amx-bf16": 0.05, "native avx512-bf16": 0.15}
"""The same for runners with faster products."""
QUANTISED_ROW_COST = 2.0
"""With weights of 8 or 4 bits, which a step reads in less time; measured with AVX2."""


class Lookup:
    """The places of one sequence's n-grams, and which of its earlier tokens it is following."""

    __slots__ = ("_next", "_places", "_seen", "_tokens", "agreed")

    def __init__(self, tokens: Tokens[int]) -> None:
        """`tokens` are the sequence's own list, to which the engine appends."""
        self.agreed = 0
        """How many tokens in a row were the same as those that they follow; 0: they follow none."""
        self._tokens = tokens
        self._seen = MATCH - 1  # tokens that were looked up
        self._next = 0  # the place of the next token, if it agrees
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence

    def catch_up(self) -> int:
        """Look up the tokens that were appended since the last call; return `agreed`. Takes a microsecond each."""
        tokens, end = self._tokens, self._seen
        while end < len(tokens):
            end += 1
            latest = tuple(tokens[end - MATCH : end])
            if self.agreed and tokens[self._next] == latest[-1]:
                self._next += 1
                self.agreed += 1
            elif place := self._places.get(latest):
                self._next, self.agreed = place, MATCH
            else:
                self.agreed = 0
            self._places[latest] = end
        self._seen = end
        return self.agreed

    def draft(self, length: int) -> list[int]:
        """The `length` tokens that are likely next. If fewer follow the earlier place, the text is a loop of these."""
        follow = list(self._tokens[self._next : self._next + length])
        return follow if len(follow) == length else (follow * -(-length // len(follow)))[:length]


class Speculation:
    """How many draft tokens each sequence of a step gets."""

    def __init__(self, row_cost: float = ROW_COST) -> None:
        self.row_cost = row_cost
        """The time of one more token in a step, over the time that a step takes whatever is in it (reading weights)."""

    @classmethod
    def on(cls, runner: str, weights: str) -> Self:
        """With the row cost of a runner, by its name, and of the kind of its quantised weights, if they are."""
        return cls(QUANTISED_ROW_COST if weights else ROW_COSTS.get(runner, ROW_COST))

    def lengths(self, agreed: Tokens[int]) -> list[int]:
        """The lengths of the drafts of sequences that decode together, of which so many tokens have agreed.

        A token more pays if its chance of agreeing exceeds the tokens' share of a step's time. So a draft may have
        agreed / (row_cost × sequences) tokens; half of that, since text ends more suddenly than Laplace's rule says.
        Drafts make a step at most twice as long, for the sake of the sequences that have none.
        """
        batch = len(agreed)
        each = 2 * self.row_cost * batch
        lengths = [min(LONGEST, int(count / each)) for count in agreed]
        most = int(batch + 1 / self.row_cost) if batch > 1 else LONGEST
        if sum(lengths) > most:
            share = max(1, most // sum(length > 0 for length in lengths))
            lengths = [min(share, length) for length in lengths]
        return lengths
