"""Which tokens a step sees: a function of the seed and the step, for every world size."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import ConfigError, CorpusError
from gptcore.loss import IGNORE
from train_job.data.batches import Batches, permute, validation_batches
from train_job.data.shards import Shard, TokenSet

SEEDS = st.integers(-(2**63), 2**64)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory):
    """counting(n) is a stream of the tokens 0 .. n - 1, so that a token tells where it was read."""
    folder: Path = tmp_path_factory.mktemp("streams")

    def make(n: int) -> TokenSet:
        path = folder / f"{n}.bin"
        if not path.exists():
            np.arange(n, dtype="<u4").tofile(path)
        return TokenSet((Shard(str(path), n, n, 1),), (0,), "<u4", "counting")

    return make


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permutation_hits_every_index_once(size, seed):
    index = np.arange(size, dtype=np.uint64)
    image = permute(index, size, np.full(size, seed, dtype=np.uint64))
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_sends_an_index_to_every_place_equally_often():
    keys = np.arange(70_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for index in range(7):
        image = permute(np.full(len(keys), index, dtype=np.uint64), 7, keys)
        counts = np.bincount(image.astype(int), minlength=7)
        assert abs(counts - 10_000).max() < 500  # five standard deviations


def test_neighbours_in_an_epoch_are_not_neighbours_in_the_text(counting):
    starts = Batches(counting(100_001), context_length=10, batch_size=5_000, seed=0).window_starts(0)
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.05


@given(
    length=st.integers(6, 400),
    stride=st.integers(1, 12),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=SEEDS,
)
def test_an_epoch_visits_every_window_once_shifted_by_one_phase(counting, length, stride, batch_size, epoch, seed):
    batches = Batches(counting(length), context_length=5, batch_size=batch_size, seed=seed, stride=stride)
    first, last = epoch * batches.windows, (epoch + 1) * batches.windows
    steps = range(first // batch_size, -(-last // batch_size))
    starts = np.concatenate([batches.window_starts(step) for step in steps])
    starts = starts[first - steps[0] * batch_size :][: batches.windows]
    expected = [{(n * stride + phase) % (length - 5) for n in range(batches.windows)} for phase in range(stride)]
    assert set(starts.tolist()) in expected
    assert len(set(starts.tolist())) == batches.windows


@given(step=st.integers(0, 10**9), batch_size=st.integers(1, 40), world_size=st.integers(1, 40), seed=SEEDS)
def test_batch_is_the_same_for_every_world_size(counting, step, batch_size, world_size, seed):
    batches = Batches(counting(5000), context_length=16, batch_size=batch_size, seed=seed)
    x, y = batches.batch(step)
    parts = [batches.batch(step, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)
    sizes = [len(part[0]) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_targets_are_the_inputs_next_tokens(counting):
    batches = Batches(counting(1000), context_length=32, batch_size=4, seed=1)
    x, y = batches.batch(7)
    assert x.shape == y.shape == (4, 32)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert x.is_contiguous()
    assert y.is_contiguous()


def test_a_step_is_a_function_of_seed_and_step_alone(counting):
    def batches(seed):
        return Batches(counting(10_000), context_length=8, batch_size=16, seed=seed)

    once = batches(5)
    for step in range(100):
        once.batch(step)
    resumed = pickle.loads(pickle.dumps(batches(5)))
    assert torch.equal(once.batch(100)[0], resumed.batch(100)[0])
    assert not torch.equal(once.batch(100)[0], batches(6).batch(100)[0])


def test_epochs_differ_in_order_and_phase(counting):
    batches = Batches(counting(10_001), context_length=100, batch_size=100, seed=0)
    assert batches.steps_per_epoch == batches.windows / 100
    epochs = [
        np.concatenate([batches.window_starts(step) for step in range(100)])[n * batches.windows :][: batches.windows]
        for n in range(5)
    ]
    assert len({int(starts.min()) for starts in epochs}) > 1
    assert len({tuple((starts // 100).tolist()) for starts in epochs}) == 5


def test_batch_may_be_larger_than_an_epoch(counting):
    x, _ = Batches(counting(6), context_length=5, batch_size=64, seed=0).batch(0)
    assert torch.equal(x, torch.arange(5).expand(64, 5))


@given(length=st.integers(2, 300), T=st.integers(1, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 5))
def test_validation_targets_every_token_but_the_first_exactly_once(counting, length, T, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        for x, y in validation_batches(counting(length), T, batch_size, rank, world_size):
            assert x.shape == y.shape
            assert x.shape[1] == T
            assert len(x) <= batch_size
            real = y != IGNORE
            assert torch.equal(y[real], x[real] + 1)
            seen += y[real].tolist()
    assert seen == list(range(1, length))


def test_context_longer_than_the_text_names_the_longest_that_fits(counting):
    with pytest.raises(CorpusError, match=r"100 tokens.*context_length 128 \+ 1.*at most 99"):
        Batches(counting(100), context_length=128, batch_size=1, seed=0)
    assert Batches(counting(100), context_length=99, batch_size=1, seed=0).windows == 1


@pytest.mark.parametrize("name", ["context_length", "batch_size", "stride"])
def test_sizes_below_one_are_refused_by_name(counting, name):
    sizes = dict(context_length=8, batch_size=2, stride=8) | {name: 0}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Batches(counting(100), seed=0, **sizes)
