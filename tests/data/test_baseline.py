"""Baselines: known entropies, a hand-counted bigram model, probabilities that sum to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data.baseline import KneserNeyBigram, measure_baselines, unigram_entropy
from ridgeline.data.indexed import IndexedShard
from ridgeline.data.stream import TokenStream, shard_mapper
from ridgeline.errors import ShardError


def test_entropies_of_known_distributions() -> None:
    assert unigram_entropy(np.full(8, 1 / 8)) == pytest.approx(math.log(8))
    assert unigram_entropy(np.array([0.5, 0.25, 0.25, 0])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([0.0, 1.0])) == 0


def test_a_bigram_model_counted_by_hand() -> None:
    # Tokens 0 1 0 1 0 2 of a vocabulary of 4. Pairs: 01 twice, 10 twice, 02 once.
    # n1 = 1, n2 = 2: D = 1/(1 + 4) = 1/5.
    # Different predecessors: of 0 one (1), of 1 one (0), of 2 one (0); three pairs in all.
    # n1 = 3, n2 = 0 of those: E = 3/3 = 1, so q is uniform: 1 · 3/3 · 1/4 = 1/4.
    tokens = np.array([0, 1, 0, 1, 0, 2])
    model = KneserNeyBigram.fit(tokens[:-1], tokens[1:], vocab=4)
    # c(0) = 3, followed by 2 kinds: back-off 1/5 · 2/3 = 2/15. c(1) = 2, by 1: 1/5 · 1/2 = 1/10.
    expected = {
        (0, 1): (2 - 1 / 5) / 3 + 2 / 15 / 4,
        (0, 2): (1 - 1 / 5) / 3 + 2 / 15 / 4,
        (0, 3): 2 / 15 / 4,
        (1, 0): (2 - 1 / 5) / 2 + 1 / 10 / 4,
        (1, 3): 1 / 10 / 4,
        (2, 0): 1 / 4,  # 2 was never followed by anything
        (3, 3): 1 / 4,
    }
    first, second = (np.array(part) for part in zip(*expected, strict=True))
    assert model.probability(first, second).tolist() == pytest.approx(list(expected.values()))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=2, max_size=300),
    vocab=st.integers(10, 14),
)
def test_probabilities_are_positive_and_sum_to_1(tokens: list[int], vocab: int) -> None:
    array = np.array(tokens)
    model = KneserNeyBigram.fit(array[:-1], array[1:], vocab)
    first, second = (axis.ravel() for axis in np.mgrid[:vocab, :vocab])
    p = model.probability(first, second).reshape(vocab, vocab)
    assert p.min() > 0
    assert p.sum(1).tolist() == pytest.approx([1.0] * vocab)


def test_baselines_of_a_mixture_are_weighted(
    tmp_path: Path, write_shard: Callable[[Path, list[list[int]]], Path]
) -> None:
    choose = np.random.RandomState(0)
    tokens = {"a": np.arange(5000) % 4, "b": choose.randint(4, 8, 5000)}
    mapper = shard_mapper()
    train, held_out = {}, {}
    for name, array in tokens.items():
        shard = IndexedShard.open(write_shard(tmp_path / name, [array.tolist()]))
        train[name] = TokenStream([(shard, 0, 4097)], mapper)
        held_out[name] = TokenStream([(shard, 4097, 5000)], mapper)
    measured = measure_baselines(train, held_out, {"a": 3.0, "b": 1.0}, vocab=8)
    # a is uniform on 4 tokens with share 3/4, b nearly so on 4 others with 1/4.
    mixed = 0.75 * math.log(4 / 0.75) + 0.25 * math.log(4 / 0.25)
    assert measured.unigram_entropy == pytest.approx(mixed, abs=1e-3)
    losses = measured.bigram_held_out_loss_by_corpus
    assert losses["a"] < 0.01  # a's next token follows from the last
    assert losses["b"] == pytest.approx(math.log(4), abs=0.02)  # b's does not
    mean = 0.75 * losses["a"] + 0.25 * losses["b"]
    assert measured.bigram_held_out_loss == pytest.approx(mean)
    assert measured.weights == {"a": 3.0, "b": 1.0}
    assert measured.training_tokens == 2 * 4096


def test_a_token_outside_the_vocabulary_is_refused(
    tmp_path: Path, write_shard: Callable[[Path, list[list[int]]], Path]
) -> None:
    shard = IndexedShard.open(write_shard(tmp_path / "a", [[1, 2, 9, 1, 2, 3]]))
    stream = {"a": TokenStream([(shard, 0, 6)], shard_mapper())}
    with pytest.raises(ShardError, match="token 9"):
        measure_baselines(stream, stream, {"a": 1.0}, vocab=9)
