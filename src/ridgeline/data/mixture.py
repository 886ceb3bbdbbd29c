"""A mixture of corpora as batches of samples, in the order that order.py gives.

A sample is a window of S + 1 tokens: S inputs and, shifted by one, S targets. Window q of a corpus
covers its tokens [q·S, q·S + S], so that each token but the first is a target in one window; the
last (tokens − 1) mod S, less than one window, are in none.

B samples, S tokens per sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ridgeline.data.indexed import Int64s
from ridgeline.data.manifest import CorpusRecord, Manifest, open_segments, read_manifest
from ridgeline.data.order import PERIOD, SampleOrder
from ridgeline.data.stream import TokenStream, check_tokens, evenly, shard_mapper
from ridgeline.data.tokenizer import check_vocab
from ridgeline.errors import DataError, nearest
from ridgeline.run import Corpus


@dataclass(frozen=True)
class MixedCorpus:
    """A corpus in a mixture. `share`: its exact part of the samples; `samples`: per epoch."""

    name: str
    weight: float
    share: float
    tokens: int
    samples: int
    held_out_tokens: int
    held_out_samples: int


class Mixture:
    """Opened by `open_mixture`. `fingerprint` identifies data and weights, for run folders."""

    def __init__(
        self,
        manifest: Manifest,
        corpora: Sequence[Corpus],
        train: Sequence[TokenStream],
        held_out: Sequence[TokenStream],
        sequence: int,
        seed: int,
        vocab: int,
    ) -> None:
        self.manifest = manifest
        self.sequence = sequence
        self.vocab = vocab
        self._train = train
        self._held_out = {corpus.name: part for corpus, part in zip(corpora, held_out, strict=True)}
        names = [corpus.name for corpus in corpora]
        weights = [corpus.weight for corpus in corpora]
        self._order = SampleOrder(
            seed, names, [stream.windows(sequence) for stream in train], weights
        )
        self.corpora = tuple(
            MixedCorpus(
                name=corpus.name,
                weight=corpus.weight,
                share=count / PERIOD,
                tokens=stream.tokens,
                samples=stream.windows(sequence),
                held_out_tokens=kept.tokens,
                held_out_samples=kept.windows(sequence),
            )
            for corpus, count, stream, kept in zip(
                corpora, self._order.counts, train, held_out, strict=True
            )
        )
        mixed = f"{manifest.digest()} {[(c.name, c.weight) for c in corpora]}"
        self.fingerprint = hashlib.sha256(mixed.encode()).hexdigest()

    def batch(self, first_sample: int, count: int) -> Int64s:
        """Samples `first_sample` … `first_sample + count − 1` as token ids, [count, sequence + 1].

        Raises ShardError for a token that the model's vocabulary does not have.
        """
        located = self._order.locate(first_sample, count)
        batch_BS = np.empty((count, self.sequence + 1), np.int64)
        for number in np.unique(located.corpora).tolist():
            rows = np.flatnonzero(located.corpora == number)
            windows_BS = np.empty((len(rows), self.sequence + 1), np.int64)
            self._train[number].read_windows(located.positions[rows], self.sequence, windows_BS)
            check_tokens(windows_BS, self.vocab, self.corpora[number].name)
            batch_BS[rows] = windows_BS
        return batch_BS

    def held_out(self, name: str, limit: int | None = None) -> Int64s:
        """At most `limit` held-out samples of a corpus, evenly spread, [samples, sequence + 1].

        Raises DataError when its held-out part is shorter than one sample.
        """
        if name not in self._held_out:
            raise DataError(
                f"held-out samples of {name!r}",
                "the mixture has no such corpus",
                nearest(name, self._held_out),
            )
        stream = self._held_out[name]
        if not stream.windows(self.sequence):
            raise DataError(
                f"held-out samples of {name!r}",
                f"one sample is {self.sequence:,} + 1 tokens, and {stream.tokens:,} are held out",
                f"a sequence of at most {max(stream.tokens - 1, 1):,}, "
                "a larger data.held_out_fraction, or more text",
            )
        windows = evenly(stream.windows(self.sequence), limit)
        windows_BS = np.empty((len(windows), self.sequence + 1), np.int64)
        stream.read_windows(windows, self.sequence, windows_BS)
        check_tokens(windows_BS, self.vocab, name)
        return windows_BS

    def epochs(self, samples: int) -> dict[str, float]:
        """How often `samples` of the mixture go through each corpus."""
        return {corpus.name: samples * corpus.share / corpus.samples for corpus in self.corpora}


def open_mixture(
    folder: Path,
    corpora: Sequence[Corpus],
    sequence: int,
    seed: int,
    vocab: int,
    fewest_samples: int = 1,
) -> Mixture:
    """Open prepared data as samples of `sequence` + 1 tokens, for a model of `vocab` entries.

    Opens every shard's index and checks all sizes; reads no token. Raises DataError for a corpus
    that is not in the folder or has fewer than `fewest_samples` (a global batch) samples,
    TokenizerError for a vocabulary that is larger than the model's, ShardError for shards that are
    not as the manifest says.
    """
    manifest = read_manifest(folder)
    if manifest.tokenizer:
        check_vocab(manifest.tokenizer.vocab, vocab, f"the tokenizer of {folder}")
    records = {record.name: record for record in manifest.corpora}
    mapper = shard_mapper()
    train, held_out = [], []
    for corpus in corpora:
        if corpus.name not in records:
            raise DataError(
                f"corpus {corpus.name!r}",
                f"the prepared data in {folder} does not hold it",
                f"{nearest(corpus.name, records)}; or ridgeline data prepare RUN.toml",
            )
        record = records[corpus.name]
        train.append(open_segments(folder, record.train, mapper))
        held_out.append(open_segments(folder, record.held_out, mapper))
        _check_size(record, train[-1], sequence, fewest_samples)
    return Mixture(manifest, corpora, train, held_out, sequence, seed, vocab)


def _check_size(
    record: CorpusRecord, stream: TokenStream, sequence: int, fewest_samples: int
) -> None:
    """A corpus must have at least `fewest_samples` samples, so that a batch never repeats one."""
    samples = stream.windows(sequence)
    needed = max(fewest_samples, 1)
    if samples < needed:
        fitting = math.floor((stream.tokens - 1) / needed)
        raise DataError(
            f"corpus {record.name!r} of {stream.tokens:,} training tokens",
            f"{needed:,} sample{'s' if needed > 1 else ''} (one global batch) of {sequence:,} "
            f"tokens and 1 more need {needed * sequence + 1:,}",
            f"a sequence of at most {fitting:,}, a smaller batch, or more text"
            if fitting >= 1
            else "more text",
        )
