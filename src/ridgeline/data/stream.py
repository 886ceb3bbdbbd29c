"""One long stream of tokens over pieces of many shards, read by memory map.

B samples, S tokens per sample.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ridgeline.data.indexed import IndexedShard, Int64s, Tokens
from ridgeline.errors import ShardError

ShardMapper = Callable[[IndexedShard], Tokens]


def shard_mapper() -> ShardMapper:
    """A function that maps a shard's tokens and keeps the maps used last.

    Every map holds a file open: half of those this process may open are left to others.
    """
    most_open, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = None if most_open == resource.RLIM_INFINITY else max(most_open // 2, 1)
    return lru_cache(maxsize=limit)(IndexedShard.map_tokens)


class TokenStream:
    """The concatenation of token ranges (shard, start, stop), as if it were one array.

    `tokens` is its length. The shards are mapped when first read, through `mapper`, which streams
    that are read together share.
    """

    def __init__(
        self, pieces: Sequence[tuple[IndexedShard, int, int]], mapper: ShardMapper
    ) -> None:
        self._pieces = [piece for piece in pieces if piece[2] > piece[1]]
        lengths = [stop - start for _, start, stop in self._pieces]
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._map = mapper
        self.tokens = int(self._firsts[-1])

    def windows(self, sequence: int) -> int:
        """How many windows of `sequence` + 1 tokens there are, each sharing one with the next."""
        return max(self.tokens - 1, 0) // sequence

    def read_windows(self, windows_B: Int64s, sequence: int, out_BS: Int64s) -> None:
        """Fill `out_BS`, [B, sequence + 1], with windows w = tokens [w·sequence, w·sequence + S].

        A window may span any number of shards.
        """
        starts_B = windows_B * sequence
        pieces_B = np.searchsorted(self._firsts, starts_B, side="right") - 1
        for row, (start, piece) in enumerate(
            zip(starts_B.tolist(), pieces_B.tolist(), strict=True)
        ):
            done = 0
            while done <= sequence:
                shard, first, stop = self._pieces[piece]
                at = first + start + done - int(self._firsts[piece])
                taken = min(stop - at, sequence + 1 - done)
                out_BS[row, done : done + taken] = self._map(shard)[at : at + taken]
                done += taken
                piece += 1


def check_tokens(tokens: Int64s, vocab: int, corpus: str) -> None:
    """Raise ShardError when a token of a corpus is not one of the vocabulary's."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ShardError(
            f"corpus {corpus!r} holds the token {low if low < 0 else high:,}",
            f"the vocabulary is 0 … {vocab - 1:,}",
            "the shards of this tokenizer, or the tokenizer of these shards; or, without one, "
            f"model.vocab = {-(-(high + 1) // 64) * 64}",
        )


def evenly(count: int, limit: int | None) -> Int64s:
    """At most `limit` of the numbers 0 … count − 1, evenly spread; all of them without a limit."""
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * count // max(limit, 1)
