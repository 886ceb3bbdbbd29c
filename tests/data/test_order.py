"""The order of samples: bijections, exact counts, and one answer however it is asked for."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data.order import PERIOD, SampleOrder, counts_per_period, key_of, mix, permute
from ridgeline.errors import DataError

weights_lists = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


def test_mix_is_splitmix64() -> None:
    # First outputs of Vigna's splitmix64.c for the seed 1234567 (rosettacode.org/wiki/
    # Pseudo-random_numbers/Splitmix64 lists them).
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * golden) % 2**64 for step in range(3)], np.uint64)
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    positions = np.arange(size, dtype=np.uint64)
    sizes, keys = np.full(size, size, np.uint64), np.full(size, key, np.uint64)
    assert sorted(permute(positions, sizes, keys).tolist()) == list(range(size))


@given(size=st.integers(2**40, 2**52), at=st.integers(0, 2**40 - 2), key=st.integers(0, 2**63))
def test_permute_stays_within_sizes_too_large_to_list(size: int, at: int, key: int) -> None:
    positions = np.array([at, at + 1], np.uint64)
    places = permute(positions, np.full(2, size, np.uint64), np.full(2, key, np.uint64))
    assert 0 <= places.min() <= places.max() < size
    assert places[0] != places[1]


def test_permute_shuffles() -> None:
    # Of 10,000 positions a random permutation keeps the order of half of all neighbours (± 50), and
    # has one fixed point on average.
    size = 10_000
    places = permute(
        np.arange(size, dtype=np.uint64),
        np.full(size, size, np.uint64),
        np.full(size, key_of(1, "code"), np.uint64),
    )
    assert abs(int((np.diff(places) > 0).sum()) - size // 2) < 200
    assert int((places == np.arange(size)).sum()) < 8
    assert abs(float(np.corrcoef(places, np.arange(size))[0, 1])) < 0.05


@given(weights=weights_lists)
def test_counts_fill_a_period_and_leave_nobody_out(weights: list[float]) -> None:
    counts = counts_per_period(weights)
    assert sum(counts) == PERIOD
    assert min(counts) >= 1
    quotas = [PERIOD * weight / sum(weights) for weight in weights]
    if min(quotas) >= 1:
        assert all(abs(c - q) < 1 for c, q in zip(counts, quotas, strict=True))


def test_counts_of_known_mixtures() -> None:
    assert counts_per_period([0.7, 0.3]) == [7000, 3000]
    assert counts_per_period([1, 1, 1]) == [3334, 3333, 3333]
    assert counts_per_period([1e9, 1]) == [9999, 1]


def test_more_corpora_than_samples_are_refused() -> None:
    assert counts_per_period([1.0] * PERIOD) == [1] * PERIOD
    with pytest.raises(DataError, match="1 to 10,000 corpora"):
        counts_per_period([1.0] * (PERIOD + 1))


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=4),
    seed=st.integers(0, 2**70),
    data=st.data(),
)
def test_each_epoch_of_a_corpus_takes_every_position_once(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(sizes), max_size=len(sizes)))
    order = SampleOrder(seed, [f"c{n}" for n in range(len(sizes))], sizes, weights)
    located = order.locate(0, 2 * PERIOD)
    for number, size in enumerate(sizes):
        mine = located.corpora == number
        assert mine[:PERIOD].sum() == mine[PERIOD:].sum() == order.counts[number]
        # In the order of time: an epoch ends before the next begins.
        epochs, positions = located.epochs[mine], located.positions[mine]
        assert epochs.tolist() == [j // size for j in range(len(epochs))]
        for epoch in range(len(positions) // size):
            part = positions[epoch * size : (epoch + 1) * size]
            assert len(np.unique(part)) == size
        assert 0 <= positions.min() <= positions.max() < size


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 10**12), data=st.data())
def test_any_split_into_batches_gives_the_same_samples(first: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 400))
    cut = data.draw(st.integers(0, count))
    arguments = (3, ["a", "b", "c"], [100, 7, 10**9], [5.0, 1.0, 2.0])
    whole = SampleOrder(*arguments).locate(first, count)
    order = SampleOrder(*arguments)
    end = order.locate(first + cut, count - cut)  # asked for before the beginning is
    begin = order.locate(first, cut)
    for name in ("corpora", "epochs", "positions"):
        halves = [getattr(begin, name), getattr(end, name)]
        assert np.concatenate(halves).tolist() == getattr(whole, name).tolist()


def test_a_far_sample_is_found_as_fast_as_the_first() -> None:
    order = SampleOrder(0, ["a", "b"], [10**9, 10**6], [1.0, 3.0])
    order.locate(0, 64)
    started = time.perf_counter()
    order.locate(10**12, 64)
    assert time.perf_counter() - started < 0.5


def test_seed_and_epoch_change_the_order() -> None:
    def epochs(seed: int) -> list[list[int]]:
        positions = SampleOrder(seed, ["a"], [5000], [1.0]).locate(0, 10_000).positions
        return [positions[:5000].tolist(), positions[5000:].tolist()]

    first, second = epochs(1)
    assert first != second
    assert epochs(2)[0] != first


def test_a_corpus_keeps_its_order_when_others_stand_before_it() -> None:
    def of_a(names: list[str]) -> list[int]:
        located = SampleOrder(1, names, [999] * len(names), [1.0] * len(names)).locate(0, PERIOD)
        positions: list[int] = located.positions[located.corpora == names.index("a")].tolist()
        return positions

    assert of_a(["a", "b"]) == of_a(["b", "a"])


def test_corpora_are_interleaved_in_a_period() -> None:
    located = SampleOrder(5, ["a", "b"], [10**6, 10**6], [1.0, 1.0]).locate(0, 1000)
    # 1,000 of 10,000 slots: 500 ± 15 (hypergeometric) are of each corpus.
    assert 400 < Counter(located.corpora.tolist())[0] < 600
