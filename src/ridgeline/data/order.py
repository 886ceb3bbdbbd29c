"""Which sample comes when: a pure, closed-form function of (seed, sample index, sizes, weights).

Samples come in periods of 10,000. In each period every corpus has an exact number of slots, and a
seeded permutation says which slots. The j-th sample of a corpus (counted over all periods) is of
its epoch j // n, at a position that a seeded permutation of 0 … n − 1, new in every epoch, gives.
So nothing is stored, sample 1,000,000,000 is found as fast as sample 0, and no window is seen twice
before its corpus has been seen once.

All randomness is splitmix64 of our own, because numpy does not promise that the streams of its
generators stay the same from version to version (NEP 19).

B samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ridgeline.data.indexed import Int64s
from ridgeline.errors import DataError

UInt64s = npt.NDArray[np.uint64]

PERIOD = 10_000
# Patarin (2004) needs 5 rounds against any attacker; we only need a good shuffle.
ROUNDS = 6

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: UInt64s) -> UInt64s:
    """splitmix64's output function: a bijection of 64-bit numbers that looks random.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014); constants of
    Vigna's public-domain splitmix64.c.
    """
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64s = values ^ (values >> np.uint64(31))
    return mixed


def key_of(seed: int, name: str) -> np.uint64:
    """A 64-bit key of a seed and a name: a corpus keeps its order whatever stands beside it."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def permute(positions_B: UInt64s, sizes_B: UInt64s, keys_B: UInt64s) -> Int64s:
    """Where `positions` go in the permutations of 0 … size − 1 that the keys choose.

    A generalised Feistel network on a × b ≥ size, a = ⌈√size⌉, b = ⌈size / a⌉, with cycle walking:
    what lands at size or above goes through again until it lands below (Black, Rogaway: Ciphers
    with arbitrary finite domains, 2002). a·b − size < a, so that is rarely needed.
    """
    a_B = np.ceil(np.sqrt(sizes_B.astype(np.float64))).astype(np.uint64)
    b_B = (sizes_B + a_B - np.uint64(1)) // a_B
    result_B = _feistel(positions_B, a_B, b_B, keys_B)
    while (beyond := np.flatnonzero(result_B >= sizes_B)).size:
        result_B[beyond] = _feistel(result_B[beyond], a_B[beyond], b_B[beyond], keys_B[beyond])
    return result_B.astype(np.int64)


def _feistel(values_B: UInt64s, a_B: UInt64s, b_B: UInt64s, keys_B: UInt64s) -> UInt64s:
    left_B, right_B = values_B // b_B, values_B % b_B
    for number in range(ROUNDS):
        round_keys_B = keys_B + np.full(1, number, np.uint64) * _GOLDEN
        if number % 2:
            right_B = (right_B + mix(left_B + round_keys_B) % b_B) % b_B
        else:
            left_B = (left_B + mix(right_B + round_keys_B) % a_B) % a_B
    merged_B: UInt64s = left_B * b_B + right_B
    return merged_B


def counts_per_period(weights: Sequence[float]) -> list[int]:
    """How many of a period's samples each corpus gets: largest remainder, at least one each.

    Raises DataError when there are more corpora than samples in a period.
    """
    if not 1 <= len(weights) <= PERIOD:
        raise DataError(
            f"a mixture of {len(weights):,} corpora",
            f"each has at least 1 of the {PERIOD:,} samples of a period: 1 to {PERIOD:,} corpora",
            "merge corpora that share a purpose",
        )
    total = math.fsum(weights)
    quotas = [PERIOD * weight / total for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    while (missing := PERIOD - sum(counts)) != 0:
        # The corpus furthest below its share gains one; or, when the minimum of one gave out too
        # many, the one furthest above its share (and above the minimum) loses one.
        sign = 1 if missing > 0 else -1
        gaps = [
            sign * (quota - count) if sign > 0 or count > 1 else -math.inf
            for quota, count in zip(quotas, counts, strict=True)
        ]
        counts[gaps.index(max(gaps))] += sign
    return counts


@dataclass(frozen=True)
class Located:
    """Where samples lie: `corpora` [B], `epochs` [B] and `positions` [B] within their corpora."""

    corpora: Int64s
    epochs: Int64s
    positions: Int64s


class SampleOrder:
    """The order of samples of a mixture.

    `names`, `sizes` (samples per epoch, ≥ 1) and `weights` (> 0) say what is mixed. The order
    within a corpus depends on its name, its size, the counts per period and the seed.
    """

    def __init__(
        self, seed: int, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float]
    ) -> None:
        self.counts = counts_per_period(weights)
        self._sizes = np.array(sizes, np.int64)
        self._counts = np.array(self.counts, np.int64)
        self._corpus_keys = np.array([key_of(seed, name) for name in names], np.uint64)
        self._period_key = key_of(seed, "")
        self._period = lru_cache(maxsize=2)(self._compute_period)

    def locate(self, first_sample: int, count: int) -> Located:
        """Corpus, epoch and position of the samples `first_sample` … `first_sample + count − 1`."""
        numbers = np.arange(first_sample, first_sample + count)
        corpora_B, drawn_B = np.empty(count, np.int64), np.empty(count, np.int64)
        for period in range(first_sample // PERIOD, (first_sample + count - 1) // PERIOD + 1):
            rows = np.flatnonzero(numbers // PERIOD == period)
            corpora, ranks = self._period(period)
            slots = numbers[rows] % PERIOD
            corpora_B[rows] = corpora[slots]
            drawn_B[rows] = ranks[slots] + period * self._counts[corpora[slots]]
        sizes_B = self._sizes[corpora_B]
        epochs_B, positions_B = drawn_B // sizes_B, drawn_B % sizes_B
        keys_B = mix(self._corpus_keys[corpora_B] ^ mix(epochs_B.astype(np.uint64)))
        shuffled_B = permute(positions_B.astype(np.uint64), sizes_B.astype(np.uint64), keys_B)
        return Located(corpora_B, epochs_B, shuffled_B)

    def _compute_period(self, period: int) -> tuple[Int64s, Int64s]:
        """(corpus of each slot, how many slots of that corpus come before it), [PERIOD] each."""
        slots = np.arange(PERIOD, dtype=np.uint64)
        key = mix(mix(np.full(1, period, np.uint64)) ^ self._period_key)
        shuffled = np.argsort(mix(slots + key), kind="stable")
        corpora = np.repeat(np.arange(len(self.counts)), self.counts)[shuffled]
        ranks = np.empty(PERIOD, np.int64)
        firsts = np.cumsum(self._counts) - self._counts
        ranks[np.argsort(corpora, kind="stable")] = np.arange(PERIOD) - np.repeat(
            firsts, self.counts
        )
        return corpora, ranks
