"""Mixtures: batches that do not depend on how they are asked for, and errors with arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ridgeline.data.mixture import Mixture, open_mixture
from ridgeline.data.prepare import prepare
from ridgeline.errors import DataError, ShardError, TokenizerError
from ridgeline.run import Corpus, Data

VOCAB = 300


@pytest.fixture
def corpora(tmp_path: Path, write_jsonl: Callable[..., Path]) -> tuple[Corpus, ...]:
    return tuple(
        Corpus(
            name=name, sources=(str(write_jsonl(tmp_path / f"{name}.jsonl", 150, at)),), weight=w
        )
        for at, (name, w) in enumerate({"code": 0.7, "prose": 0.3}.items())
    )


@pytest.fixture
def folder(tmp_path: Path, corpora: tuple[Corpus, ...]) -> Path:
    data = Data.model_validate(
        {
            "folder": tmp_path / "prepared",
            "corpora": corpora,
            "workers": 1,
            "shard_tokens": 2000,
            "held_out_fraction": 0.1,
        }
    )
    prepare(data, VOCAB, seed=0)
    return data.folder


def opened(folder: Path, corpora: tuple[Corpus, ...], sequence: int = 32, seed: int = 1) -> Mixture:
    return open_mixture(folder, corpora, sequence, seed, VOCAB)


def test_batches_split_anyhow_are_the_same_samples(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    mixture = opened(folder, corpora)
    whole = mixture.batch(9_990, 30)
    assert whole.shape == (30, 33)
    assert whole.dtype == np.int64
    fresh = opened(folder, corpora)
    parts = [fresh.batch(first, 5) for first in range(10_015, 9_985, -5)]
    assert np.array_equal(np.concatenate(parts[::-1]), whole)
    assert not np.array_equal(opened(folder, corpora, seed=2).batch(9_990, 30), whole)


def test_an_epoch_shows_every_window_of_a_corpus_once(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    only = (corpora[0],)
    mixture = opened(folder, only)
    (corpus,) = mixture.corpora
    seen = mixture.batch(0, corpus.samples)
    again = mixture.batch(corpus.samples, corpus.samples)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, again.tolist()))
    assert not np.array_equal(seen, again)
    assert corpus.samples == (corpus.tokens - 1) // 32
    assert mixture.epochs(3 * corpus.samples) == {"code": pytest.approx(3)}


def test_held_out_windows_are_no_training_windows(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    mixture = opened(folder, corpora)
    for corpus in mixture.corpora:
        held_out = mixture.held_out(corpus.name)
        assert held_out.shape == (corpus.held_out_samples, 33)
        assert corpus.held_out_samples == (corpus.held_out_tokens - 1) // 32
        few = mixture.held_out(corpus.name, limit=4)
        assert few.shape == (4, 33)
        assert {tuple(row) for row in few.tolist()} <= {tuple(row) for row in held_out.tolist()}
    train = {tuple(row) for row in mixture.batch(0, 2000).tolist()}
    held = {tuple(row) for row in mixture.held_out("code").tolist()}
    assert train.isdisjoint(held)


def test_shares_are_those_of_the_weights(folder: Path, corpora: tuple[Corpus, ...]) -> None:
    mixture = opened(folder, corpora)
    assert [corpus.share for corpus in mixture.corpora] == [0.7, 0.3]
    epochs = mixture.epochs(1000)
    assert epochs["code"] == pytest.approx(700 / mixture.corpora[0].samples)


def test_the_fingerprint_is_of_tokens_and_weights(
    tmp_path: Path, folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    before = opened(folder, corpora).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert opened(moved, corpora).fingerprint == before
    heavier = (corpora[0].model_copy(update={"weight": 0.8}), corpora[1])
    assert opened(moved, heavier).fingerprint != before
    Path(corpora[0].sources[0]).write_text('{"text": "other words"}\n' * 2)
    data = Data(folder=moved, corpora=corpora, workers=1)
    prepare(data, VOCAB, seed=0)
    assert opened(moved, corpora, sequence=1).fingerprint != before


def test_a_corpus_too_small_is_refused_with_the_arithmetic(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    tokens = opened(folder, corpora).corpora[0].tokens
    with pytest.raises(DataError, match=r"1 sample .*1,000,000 tokens and 1 more need 1,000,001"):
        opened(folder, corpora, sequence=1_000_000)
    with pytest.raises(DataError, match=r"5,000 samples \(one global batch\) of 32 tokens") as said:
        open_mixture(folder, corpora, 32, 0, VOCAB, fewest_samples=5_000)
    assert f"{5_000 * 32 + 1:,}" in said.value.rule
    fitting = (tokens - 1) // 100
    open_mixture(folder, corpora[:1], fitting, 0, VOCAB, fewest_samples=100)
    with pytest.raises(DataError, match=f"a sequence of at most {fitting},"):
        open_mixture(folder, corpora[:1], fitting + 1, 0, VOCAB, fewest_samples=100)


def test_too_little_held_out_is_refused_when_asked_for(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    tokens = opened(folder, corpora).corpora[0].held_out_tokens
    mixture = opened(folder, corpora, sequence=tokens)
    assert mixture.corpora[0].held_out_samples == 0
    with pytest.raises(DataError, match=rf"{tokens:,} \+ 1 tokens, and {tokens:,} are held out"):
        mixture.held_out("code")
    with pytest.raises(DataError, match="did you mean 'code'"):
        mixture.held_out("coda")


def test_an_unknown_corpus_names_the_nearest(folder: Path, corpora: tuple[Corpus, ...]) -> None:
    unknown = corpora[1].model_copy(update={"name": "pros"})
    with pytest.raises(DataError, match="did you mean 'prose'"):
        opened(folder, (unknown,))


def test_a_folder_that_is_not_prepared_is_refused(
    tmp_path: Path, folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    with pytest.raises(DataError, match=r"does not exist\n.*ridgeline data prepare"):
        opened(tmp_path / "missing", corpora)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ShardError, match="format 1"):
        opened(folder, corpora)


def test_a_vocabulary_beyond_the_models_is_refused(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    with pytest.raises(TokenizerError, match="300 > 299"):
        open_mixture(folder, corpora, 32, 0, 299)


def test_damaged_shards_are_refused(folder: Path, corpora: tuple[Corpus, ...]) -> None:
    shard = folder / "code.train.00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(ShardError, match=r"code\.train\.00000\.bin"):
        opened(folder, corpora)
    shard.write_bytes(b"\xff\xff" * (len(whole) // 2))
    with pytest.raises(ShardError, match="token 65,535"):
        opened(folder, corpora).batch(0, 500)


def test_a_shard_of_another_size_than_recorded_is_refused(
    folder: Path, corpora: tuple[Corpus, ...]
) -> None:
    for ending in (".bin", ".idx"):
        (folder / f"code.held_out.00000{ending}").replace(folder / f"code.train.00000{ending}")
    with pytest.raises(ShardError, match=r"manifest\.json says that its tokens 0 to"):
        opened(folder, (corpora[0],))
