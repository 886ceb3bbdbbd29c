"""Windows over pieces of many shards equal windows over one array."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data.indexed import IndexedShard, ShardWriter, token_dtype
from ridgeline.data.stream import TokenStream, check_tokens, evenly, shard_mapper
from ridgeline.errors import ShardError


@settings(max_examples=40, deadline=None)
@given(data=st.data(), sequence=st.integers(1, 12))
def test_windows_equal_those_of_one_array(data: st.DataObject, sequence: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    cuts = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in sizes]
    whole: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        pieces = []
        for number, (size, (start, stop)) in enumerate(zip(sizes, cuts, strict=True)):
            tokens = np.arange(100 * number, 100 * number + size)
            with ShardWriter(Path(folder, str(number)), token_dtype(1000)) as shard:
                shard.add(tokens)
            pieces.append((IndexedShard.open(Path(folder, str(number))), start, stop))
            whole += tokens[start:stop].tolist()
        stream = TokenStream(pieces, shard_mapper())
        count = stream.windows(sequence)
        assert count == max(len(whole) - 1, 0) // sequence
        order = np.array(data.draw(st.permutations(range(count))), np.int64)
        windows = np.empty((count, sequence + 1), np.int64)
        stream.read_windows(order, sequence, windows)
        expected = [whole[q * sequence : q * sequence + sequence + 1] for q in order]
        assert windows.tolist() == expected


def test_every_token_but_the_first_and_a_rest_is_a_target_once(
    tmp_path: Path, write_shard: Callable[[Path, list[list[int]]], Path]
) -> None:
    shard = IndexedShard.open(write_shard(tmp_path / "s", [list(range(100))]))
    stream = TokenStream([(shard, 0, 100)], shard_mapper())
    windows = np.empty((stream.windows(7), 8), np.int64)
    stream.read_windows(np.arange(14), 7, windows)
    assert windows[:, 1:].ravel().tolist() == list(range(1, 99))


@given(count=st.integers(0, 10_000), limit=st.integers(1, 200))
def test_evenly_spread_numbers_are_distinct_and_evenly_spread(count: int, limit: int) -> None:
    chosen = evenly(count, limit).tolist()
    assert len(chosen) == min(count, limit)
    assert all(0 <= number < count for number in chosen)
    gaps = [b - a for a, b in pairwise(chosen)]
    assert all(gap >= 1 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_token_outside_the_vocabulary_is_named() -> None:
    check_tokens(np.array([0, 99]), 100, "prose")
    with pytest.raises(ShardError, match=r"'prose' holds the token 100\n.*0 … 99\n.*vocab = 128"):
        check_tokens(np.array([0, 100]), 100, "prose")
    with pytest.raises(ShardError, match="token -1"):
        check_tokens(np.array([-1, 5]), 100, "prose")
