"""What a model reaches without context: the bar that a trained one must clear.

unigram entropy   H = −Σ_v p(v) ln p(v), p the token shares of the weighted training mixture:
                  the loss of the best model that looks at nothing.
bigram loss       mean of −ln p(v | u) over held-out pairs of neighbours (u, v), p a bigram model
                  with interpolated Kneser-Ney smoothing: the loss of a good model that looks at one
                  token. Over a mixture: the weighted mean of the corpora's means.

Both in nats per token. V vocabulary, N pairs of neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ridgeline.data.indexed import Int64s
from ridgeline.data.manifest import Baselines
from ridgeline.data.stream import TokenStream, check_tokens, evenly

Float64s = npt.NDArray[np.float64]

TRAINING_TOKENS = 20_000_000
HELD_OUT_TOKENS = 1_000_000
_BLOCK = 4096


@dataclass(frozen=True)
class KneserNeyBigram:
    """An interpolated Kneser-Ney bigram model.

        p(v | u) = max(c(u v) − D, 0) / c(u) + D · N₊(u ·) / c(u) · q(v)
        q(v)     = max(N₊(· v) − E, 0) / N₊(· ·) + E · |{w: N₊(· w) > 0}| / N₊(· ·) / V

    c counts pairs, N₊ counts different pairs, and D = n₁ / (n₁ + 2 n₂), n₁ and n₂ being how many
    pairs were seen once and twice; E the same, of N₊(· v). After a u never seen, p = q. Chen,
    Goodman: An empirical study of smoothing techniques (1998), §2.7 and eq. 26; Ney, Essen, Kneser
    (1994) for D. The uniform last step gives tokens never seen a probability above 0.
    """

    vocab: int
    pairs: Int64s  # u · V + v of every pair seen, ascending, without repeats
    discounted: Float64s  # max(c(u v) − D, 0) / c(u) of each of `pairs`
    backoff: Float64s  # D · N₊(u ·) / c(u); 1 where u was never seen
    continuation: Float64s

    @classmethod
    def fit(cls, first_N: Int64s, second_N: Int64s, vocab: int) -> KneserNeyBigram:
        """Count the pairs (first, second), ids below `vocab`."""
        pairs, counts = np.unique(first_N * vocab + second_N, return_counts=True)
        discount = _discount(counts)
        u, v = pairs // vocab, pairs % vocab
        total_V = np.bincount(u, counts, vocab)
        followers_V = np.bincount(u, minlength=vocab)
        backoff = np.where(total_V > 0, discount * followers_V / np.maximum(total_V, 1), 1.0)
        preceders_V = np.bincount(v, minlength=vocab)
        second_discount = _discount(preceders_V[preceders_V > 0])
        spread = second_discount * np.count_nonzero(preceders_V) / vocab
        continuation = (np.maximum(preceders_V - second_discount, 0) + spread) / len(pairs)
        return cls(vocab, pairs, (counts - discount) / total_V[u], backoff, continuation)

    def probability(self, first_N: Int64s, second_N: Int64s) -> Float64s:
        """p(second | first) of each pair, [N]."""
        wanted = first_N * self.vocab + second_N
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == wanted, self.discounted[at], 0.0)
        p_N: Float64s = seen + self.backoff[first_N] * self.continuation[second_N]
        return p_N


def _discount(counts: npt.NDArray[np.integer]) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    # Without a single count of one the formula says that nothing new is ever met; we keep half.
    return once / (once + 2 * twice) if once else 0.5


def unigram_entropy(shares_V: Float64s) -> float:
    """−Σ p ln p of token shares that sum to 1, in nats."""
    p = shares_V[shares_V > 0]
    return float(-(p * np.log(p)).sum())


def measure_baselines(
    train: Mapping[str, TokenStream],
    held_out: Mapping[str, TokenStream],
    weights: Mapping[str, float],
    vocab: int,
) -> Baselines:
    """Baselines of a mixture, from streams by corpus and weights.

    Training tokens are a sample of the mixture of at most 20 million, without repeats: of each
    corpus its share of them, or the whole corpus, evenly spread. Held-out: 1 million per corpus.
    """
    total = sum(weights.values())
    shares_V = np.zeros(vocab)
    first, second = [], []
    for name, weight in weights.items():
        before_N, after_N = _pairs(name, train[name], int(TRAINING_TOKENS * weight / total), vocab)
        shares_V += weight / total * np.bincount(after_N, minlength=vocab) / len(after_N)
        first.append(before_N)
        second.append(after_N)
    bigram = KneserNeyBigram.fit(np.concatenate(first), np.concatenate(second), vocab)
    losses = {}
    for name in weights:
        pairs = _pairs(name, held_out[name], HELD_OUT_TOKENS, vocab)
        losses[name] = float(-np.log(bigram.probability(*pairs)).mean())
    return Baselines(
        weights=dict(weights),
        training_tokens=sum(len(part) for part in second),
        unigram_entropy=unigram_entropy(shares_V),
        bigram_held_out_loss=sum(weights[name] / total * losses[name] for name in weights),
        bigram_held_out_loss_by_corpus=losses,
    )


def _pairs(name: str, stream: TokenStream, limit: int, vocab: int) -> tuple[Int64s, Int64s]:
    """Neighbours (u, v) of a stream, about `limit` of them, in evenly spread blocks.

    Raises ShardError for a token that the vocabulary does not have.
    """
    block = min(_BLOCK, stream.tokens - 1)
    blocks = evenly(stream.windows(block), max(limit // block, 1))
    windows = np.empty((len(blocks), block + 1), np.int64)
    stream.read_windows(blocks, block, windows)
    check_tokens(windows, vocab, name)
    return windows[:, :-1].ravel(), windows[:, 1:].ravel()
