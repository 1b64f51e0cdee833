"""Each slot has one owner and keeps its tokens when freed. A prompt finds the longest beginning that is held."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.engine.cache import WORTHWHILE, Match, SlotCache
from gptcore.errors import EngineError

NOTHING = Match(-1, 0, 0)


def text(*parts: tuple[int, int]) -> np.ndarray:
    """A prompt of runs: `(token, length)` each."""
    return np.concatenate([np.full(length, token, dtype=np.int32) for token, length in parts])


def occupy(cache: SlotCache, owner: str, prompt: np.ndarray, computed: int | None = None) -> int:
    """Takes a slot as the scheduler does, and computes the prompt or its first `computed` tokens."""
    place = cache.take(owner, prompt, cache.find(prompt))
    cache.advance(place.slot, len(prompt) if computed is None else computed)
    return place.slot


def leave(cache: SlotCache, owner: str, slot: int, prompt: np.ndarray, generated: tuple[int, ...] = ()) -> None:
    """Frees a slot whose sequence is computed up to its last token."""
    cache.release(owner, slot, len(prompt), [*prompt.tolist(), *generated], len(prompt) + max(len(generated) - 1, 0))


def test_a_slot_has_one_owner_and_only_the_owner_frees_it() -> None:
    cache = SlotCache(2, 64)
    a, b = occupy(cache, "a", text((1, 20))), occupy(cache, "b", text((2, 20)))
    assert (a != b, cache.free) == (True, 0)
    cache.check({"a": a, "b": b})
    with pytest.raises(EngineError, match="'c' was to have a slot, and all 2 are taken"):
        cache.take("c", text((3, 20)), NOTHING)
    with pytest.raises(EngineError, match="'a' gives back slot 1, which belongs to 'b'"):
        leave(cache, "a", b, text((2, 20)))
    leave(cache, "b", b, text((2, 20)))
    with pytest.raises(EngineError, match="'b' gives back slot 1, which belongs to None"):
        leave(cache, "b", b, text((2, 20)))
    cache.check({"a": a})


def test_the_least_recently_used_slot_is_taken_first() -> None:
    cache = SlotCache(3, 64)
    slots = [occupy(cache, name, text((i, 20))) for i, name in enumerate("abc")]
    for i in (1, 0, 2):
        leave(cache, "abc"[i], slots[i], text((i, 20)))
    taken = [occupy(cache, f"new {i}", text((10 + i, 20))) for i in range(3)]
    assert taken == [slots[1], slots[0], slots[2]]


def test_a_freed_slot_is_reused_in_place_by_a_prompt_with_the_same_beginning() -> None:
    cache = SlotCache(2, 64)
    prompt = text((1, 30))
    slot = occupy(cache, "a", prompt)
    leave(cache, "a", slot, prompt, generated=(5, 6, 7))
    longer = np.array([*prompt, 5, 6, 9, 9], dtype=np.int32)  # generated tokens count, up to the last one run
    match = cache.find(longer)
    assert match == Match(slot, 32, 32)
    place = cache.take("b", longer, match)
    assert (place.slot, place.length, place.source) == (slot, 32, None)


def test_a_prefix_is_copied_from_a_slot_in_use() -> None:
    cache = SlotCache(3, 64)
    prompt = text((1, 30))
    slot = occupy(cache, "a", prompt)
    match = cache.find(prompt)
    assert match == Match(slot, 29, 29)  # the last token is run anew
    place = cache.take("b", prompt, match)
    assert (place.slot != slot, place.length, place.source) == (True, 29, slot)


def test_a_free_slot_is_preferred_among_equal_matches() -> None:
    cache = SlotCache(2, 64)
    prompt = text((1, 30))
    a, b = occupy(cache, "a", prompt), occupy(cache, "b", prompt)
    leave(cache, "b", b, prompt)
    assert cache.find(prompt).slot == b != a


def test_only_computed_tokens_are_held_and_the_rest_of_a_prompt_is_promised() -> None:
    cache = SlotCache(2, 64)
    prompt = text((1, 40))
    slot = occupy(cache, "a", prompt, computed=24)
    assert cache.find(text((1, 50))) == Match(slot, 24, 40)
    cache.release("a", slot, 40, prompt.tolist(), 24)
    assert cache.find(text((1, 50))) == Match(slot, 24, 24)


def test_a_short_common_beginning_is_not_worth_a_slot() -> None:
    cache = SlotCache(2, 64)
    occupy(cache, "a", text((1, WORTHWHILE - 1), (2, 10)))
    assert cache.find(text((1, WORTHWHILE - 1), (3, 10))).length == 0
    occupy(cache, "b", text((7, WORTHWHILE), (2, 10)))
    assert cache.find(text((7, WORTHWHILE), (3, 10))).length == WORTHWHILE


def test_a_slot_taken_for_another_prompt_forgets_the_old_one() -> None:
    cache = SlotCache(1, 64)
    old, new = text((1, 50)), text((1, 20), (2, 10))
    leave(cache, "a", occupy(cache, "a", old), old)
    leave(cache, "b", occupy(cache, "b", new), new, generated=(2, 2))
    assert cache.find(old).length == 20
    assert cache.find(text((1, 20), (2, 11), (1, 20))).length == 31  # the old 1s are still behind it
    leave(cache, "c", occupy(cache, "c", text((3, 20))), text((3, 20)))
    assert cache.find(old).length == 0


def test_without_an_invariant_runner_only_whole_chunks_of_prompts_are_reused() -> None:
    cache = SlotCache(2, 128, invariant=False, granularity=16)
    prompt = text((1, 40))
    slot = occupy(cache, "a", prompt)
    assert cache.find(text((1, 41))) == Match(slot, 32, 32)
    leave(cache, "a", slot, prompt, generated=(1,) * 30)  # the same tokens, but decoded: in another way
    assert cache.find(text((1, 100))) == Match(slot, 32, 32)
    assert cache.find(text((1, 32))) == Match(slot, 16, 16)  # 31 may be reused


def test_reuse_can_be_turned_off() -> None:
    cache = SlotCache(2, 64, reuse=False)
    prompt = text((1, 30))
    leave(cache, "a", occupy(cache, "a", prompt), prompt)
    assert cache.find(prompt) == NOTHING


def test_the_check_finds_a_leaked_and_a_shared_slot() -> None:
    cache = SlotCache(2, 64)
    slot = occupy(cache, "a", text((1, 20)))
    cache.check({"a": slot})
    with pytest.raises(EngineError, match="'a', 0"):
        cache.check({})
    with pytest.raises(EngineError, match="'b', 0"):
        cache.check({"a": slot, "b": slot})
    cache._free[slot] = None
    with pytest.raises(EngineError, match=r"\[0\] are neither free nor taken, or both"):
        cache.check({"a": slot})


@given(
    held=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=6),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=40),
    granularity=st.sampled_from([1, 4, 16, 20]),
)
def test_the_longest_match_is_found(held: list[list[int]], prompt: list[int], granularity: int) -> None:
    cache = SlotCache(len(held), 40, granularity=granularity)
    rows = [np.array([1] * 15 + tokens, dtype=np.int32)[:40] for tokens in held]
    wanted = np.array([1] * 15 + prompt, dtype=np.int32)[:40]
    for slot, row in enumerate(rows):
        cache.take(str(slot), row, NOTHING)
        cache.advance(slot, len(row))

    def common(row: np.ndarray) -> int:
        length = 0
        while length < min(len(row), len(wanted) - 1) and row[length] == wanted[length]:
            length += 1
        return length // granularity * granularity

    best = max(common(row) for row in rows)
    match = cache.find(wanted)
    assert match.length == (best if best >= WORTHWHILE else 0)
    if match.length:
        assert common(rows[match.slot]) == best


def test_a_long_prompt_is_looked_up_in_many_slots_without_a_python_loop() -> None:
    cache = SlotCache(64, 1024)
    for slot in range(64):
        occupy(cache, str(slot), text((1, 900), (2 + slot, 100)))
    prompt = text((1, 900), (40, 124))
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        assert cache.find(prompt) == Match(38, 1000, 1000)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.002  # a loop over 64,000 tokens takes longer; this takes a tenth of it
