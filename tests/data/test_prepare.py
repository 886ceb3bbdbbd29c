"""Preparing: what lands on disk, for any number of processes, and what never does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from ridgeline.data import encode
from ridgeline.data.encode import split_tail
from ridgeline.data.indexed import IndexedShard
from ridgeline.data.manifest import Manifest, Segment, read_manifest
from ridgeline.data.prepare import prepare, summary
from ridgeline.errors import DataError, ShardError, SourceError, TokenizerError
from ridgeline.run import Corpus, Data

VOCAB = 300
WriteJsonl = Callable[..., Path]
WriteShard = Callable[[Path, list[list[int]]], Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder: Path, segments: tuple[Segment, ...]) -> list[str]:
    """The documents of whole shards, as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = []
    for segment in segments:
        shard = IndexedShard.open(folder / segment.shard)
        tokens = shard.map_tokens().tolist()
        starts = [*shard.document_starts().tolist(), shard.tokens]
        for start, stop in pairwise(starts):
            assert tokens[stop - 1] == 0
            texts.append(tokenizer.decode(tokens[start : stop - 1], skip_special_tokens=False))
    return texts


def data_of(folder: Path, *corpora: Corpus, **settings: object) -> Data:
    return Data.model_validate({"folder": folder, "corpora": corpora, "workers": 1, **settings})


@pytest.fixture
def data(tmp_path: Path, write_jsonl: WriteJsonl) -> Data:
    write_jsonl(tmp_path / "text" / "a.jsonl", 150)
    write_jsonl(tmp_path / "text" / "b.jsonl", 50, seed=1)
    (tmp_path / "text" / "c.txt").write_text("A file: <|endoftext|> héllo 2024\n")
    corpus = Corpus(name="words", sources=(str(tmp_path / "text"),))
    return data_of(tmp_path / "prepared", corpus, held_out_fraction=0.1, shard_tokens=2000)


def source_texts(folder: Path) -> list[str]:
    lines = [
        json.loads(line)["text"]
        for name in ("a.jsonl", "b.jsonl")
        for line in (folder / name).read_text().splitlines()
    ]
    return [*lines, (folder / "c.txt").read_text()]


def test_every_document_lands_on_one_side_once(tmp_path: Path, data: Data) -> None:
    manifest = prepare(data, VOCAB, seed=1)
    (corpus,) = manifest.corpora
    train = documents_of(data.folder, corpus.train)
    held_out = documents_of(data.folder, corpus.held_out)
    texts = source_texts(tmp_path / "text")
    assert sorted(train + held_out) == sorted(texts)
    assert set(train).isdisjoint(held_out)
    assert 8 <= len(held_out) <= 36  # 10% of 201: 20 ± 4
    assert corpus.held_out_by == "document"
    assert corpus.documents == 201
    assert corpus.bytes == sum(len(text.encode()) for text in texts)
    assert corpus.tokens == sum(part.tokens for part in (*corpus.train, *corpus.held_out))
    assert len(corpus.train) > 2
    assert all(part.tokens <= 2000 for part in corpus.train)
    assert manifest == read_manifest(data.folder)


def test_the_bytes_do_not_depend_on_the_number_of_processes(data: Data) -> None:
    prepare(data, VOCAB, seed=1)
    other = data.folder.with_name("other")
    prepare(data.model_copy(update={"workers": 2, "folder": other}), VOCAB, seed=1)
    assert contents(other) == contents(data.folder)


def test_a_document_keeps_its_side_when_others_come(
    tmp_path: Path, data: Data, write_jsonl: WriteJsonl
) -> None:
    before = prepare(data, VOCAB, seed=1).corpora[0]
    held_out = documents_of(data.folder, before.held_out)
    write_jsonl(tmp_path / "text" / "0.jsonl", 60, seed=9)
    after = prepare(data, VOCAB, seed=1).corpora[0]
    assert after.documents == 261
    assert set(held_out) <= set(documents_of(data.folder, after.held_out))


def test_the_seed_moves_the_held_out_documents(data: Data) -> None:
    first = prepare(data, VOCAB, seed=1).corpora[0]
    one = documents_of(data.folder, first.held_out)
    second = prepare(data, VOCAB, seed=2).corpora[0]
    assert set(one) != set(documents_of(data.folder, second.held_out))


def test_duplicates_are_dropped_and_counted(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 60)
    source.write_text(source.read_text() * 2)
    corpora = [Corpus(name=name, sources=(str(source),)) for name in ("one", "two")]
    made = prepare(data_of(tmp_path / "p", *corpora, held_out_fraction=0.2), VOCAB, seed=0).corpora
    assert [(corpus.documents, corpus.duplicates) for corpus in made] == [(60, 60)] * 2
    # The same text is on the same side in every corpus.
    one, two = (documents_of(tmp_path / "p", corpus.held_out) for corpus in made)
    assert one == two


def test_a_recipe_that_did_not_change_is_up_to_date(tmp_path: Path, data: Data) -> None:
    def said(data: Data, seed: int = 1) -> str:
        output = io.StringIO()
        prepare(data, VOCAB, seed, Console(file=output))
        return output.getvalue()

    assert "tokenized" in said(data)
    inode = (data.folder / "manifest.json").stat().st_ino
    assert "up to date" in said(data)
    assert (data.folder / "manifest.json").stat().st_ino == inode
    assert "tokenized" in said(data, seed=2)
    assert "tokenized" in said(data.model_copy(update={"held_out_fraction": 0.2}))
    os.utime(tmp_path / "text" / "c.txt")
    assert "tokenized" in said(data)
    (data.folder / "words.train.00001.bin").write_bytes(b"")
    assert "0 bytes" in said(data)
    assert "up to date" in said(data)


def test_new_weights_measure_only_the_baselines(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    corpora = [
        Corpus(name=name, sources=(str(write_jsonl(tmp_path / f"{name}.jsonl", 80, seed)),))
        for seed, name in enumerate(("one", "two"))
    ]
    data = data_of(tmp_path / "p", *corpora)
    before = prepare(data, VOCAB, seed=0)
    inode = (data.folder / "one.train.00000.bin").stat().st_ino
    heavier = corpora[0].model_copy(update={"weight": 3.0})
    after = prepare(data.model_copy(update={"corpora": (heavier, corpora[1])}), VOCAB, seed=0)
    assert (data.folder / "one.train.00000.bin").stat().st_ino == inode
    assert before.baselines and after.baselines
    assert after.baselines.weights == {"one": 3.0, "two": 1.0}
    assert after.baselines.unigram_entropy != before.baselines.unigram_entropy
    assert after.digest() == before.digest()
    assert read_manifest(data.folder) == after


def test_a_corpus_of_one_document_holds_its_tail_out(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("To be, or not to be.\n" * 400)
    manifest = prepare(
        data_of(tmp_path / "p", Corpus(name="play", sources=(str(tmp_path / "play.txt"),))),
        VOCAB,
        seed=0,
    )
    (corpus,) = manifest.corpora
    assert corpus.held_out_by == "tail"
    (train,), (held_out,) = corpus.train, corpus.held_out
    assert train.shard == held_out.shard
    assert train.stop == held_out.start
    assert held_out.stop == corpus.tokens
    assert held_out.tokens == pytest.approx(0.02 * corpus.tokens, abs=1)
    assert any("its tail is held out" in line for line in summary(manifest))


def test_the_tail_is_cut_at_the_nearest_document(tmp_path: Path, write_shard: WriteShard) -> None:
    write_shard(tmp_path / "a", [[1] * 50])
    write_shard(tmp_path / "b", [[1] * 20, [2] * 23, [3] * 7])
    whole = [Segment(shard="a", start=0, stop=50), Segment(shard="b", start=0, stop=50)]
    # The last 8% start at token 92, a document at 93.
    assert split_tail(tmp_path, whole, 0.08) == (
        (whole[0], Segment(shard="b", start=0, stop=43)),
        (Segment(shard="b", start=43, stop=50),),
    )
    # The last 2% start at 98: the nearest document is too far.
    assert split_tail(tmp_path, whole, 0.02)[1] == (Segment(shard="b", start=48, stop=50),)
    assert split_tail(tmp_path, whole, 0.5) == ((whole[0],), (whole[1],))


def test_long_documents_are_tokenized_in_pieces_and_go_on_in_the_next_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 100)
    text = "a line of a long document\n" * 300 + "x" * 250 + "\n\nend"
    (tmp_path / "long.txt").write_text(text)
    corpus = Corpus(name="long", sources=(str(tmp_path / "long.txt"),))
    data = data_of(tmp_path / "p", corpus, shard_tokens=1024)
    made = prepare(data, VOCAB, seed=0).corpora[0]
    shards = sorted({part.shard for part in (*made.train, *made.held_out)})
    tokens = np.concatenate([IndexedShard.open(data.folder / s).map_tokens() for s in shards])
    assert len(shards) > 2
    assert len(tokens) == made.tokens
    tokenizer = Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=True) == text


def test_what_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path, data: Data) -> None:
    prepare(data, VOCAB, seed=1)
    before = contents(data.folder)
    (tmp_path / "text" / "d.jsonl").write_text('{"text": "fine"}\n{"broken')
    for workers in (1, 2):
        with pytest.raises(SourceError, match=r"d\.jsonl, line 2"):
            prepare(data.model_copy(update={"workers": workers}), VOCAB, seed=1)
    assert contents(data.folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"text", "prepared"}


def test_a_killed_process_leaves_what_the_next_removes(tmp_path: Path, data: Data) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    dead = tmp_path / f".prepared.{host}-{gone.pid}.partial"
    alive = tmp_path / f".prepared.{host}-{os.getppid()}.partial"
    for leftover in (dead, alive):
        leftover.mkdir()
    prepare(data, VOCAB, seed=1)
    assert not dead.exists()
    assert alive.exists()


def test_a_folder_with_other_things_in_it_is_not_replaced(data: Data) -> None:
    data.folder.mkdir()
    prepare(data, VOCAB, seed=1)
    (data.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"'thesis\.tex' in it is not of ours"):
        prepare(data, VOCAB, seed=2)
    (data.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="not of ours"):
        prepare(data, VOCAB, seed=2)
    assert (data.folder / "thesis.tex").exists()
    with pytest.raises(DataError, match="not of ours"):
        prepare(data.model_copy(update={"folder": data.folder / "thesis.tex"}), VOCAB, seed=2)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "image.png").write_bytes(b"\x89PNG\0")
    data = data_of(tmp_path / "p", Corpus(name="pictures", sources=(str(tmp_path / "text"),)))
    with pytest.raises(SourceError, match=r"'pictures'\n.*1 not UTF-8 text"):
        prepare(data, VOCAB, seed=0)
    assert not (tmp_path / "p").exists()
    with pytest.raises(DataError, match="without corpora"):
        prepare(data_of(tmp_path / "p"), VOCAB, seed=0)


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path: Path, data: Data) -> None:
    prepare(data, VOCAB, seed=1)
    given = tmp_path / "given.json"
    given.write_bytes((data.folder / "tokenizer.json").read_bytes())
    other = data.model_copy(update={"folder": tmp_path / "other", "tokenizer": given})
    manifest = prepare(other, 5000, seed=1)
    assert manifest.tokenizer and manifest.tokenizer.vocab == VOCAB
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == given.read_bytes()
    with pytest.raises(TokenizerError, match="300 > 299"):
        prepare(other, 299, seed=1)


class TestMegatronShards:
    """Existing shards are read where they lie."""

    @pytest.fixture
    def shards(self, tmp_path: Path, write_shard: WriteShard) -> Path:
        choose = np.random.RandomState(0)
        for name in ("a", "b"):
            documents = choose.randint(0, 300, (20, 50)).tolist()
            write_shard(tmp_path / "megatron" / name, documents)
        return tmp_path / "megatron"

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        (tmp_path / "megatron").mkdir(exist_ok=True)

    def made(self, tmp_path: Path, shards: Path, vocab: int = VOCAB) -> Manifest:
        corpus = Corpus(name="old", sources=(f"{shards}/*.idx",))
        return prepare(data_of(tmp_path / "p", corpus, held_out_fraction=0.05), vocab, seed=0)

    def test_they_are_referenced_and_their_tail_held_out(
        self, tmp_path: Path, shards: Path
    ) -> None:
        manifest = self.made(tmp_path, shards)
        (corpus,) = manifest.corpora
        assert (corpus.documents, corpus.tokens, corpus.bytes) == (40, 2000, None)
        a, b = str(shards / "a"), str(shards / "b")
        assert corpus.train == (
            Segment(shard=a, start=0, stop=1000),
            Segment(shard=b, start=0, stop=900),
        )
        assert corpus.held_out == (Segment(shard=b, start=900, stop=1000),)
        assert [path.name for path in (tmp_path / "p").iterdir()] == ["manifest.json"]
        assert "no tokenizer: the vocabulary of these shards is not checked" in summary(manifest)

    def test_a_vocabulary_they_do_not_fit_is_refused(self, tmp_path: Path, shards: Path) -> None:
        with pytest.raises(ShardError, match=r"'old' holds the token 299"):
            self.made(tmp_path, shards, vocab=299)
        assert not (tmp_path / "p").exists()

    def test_a_truncated_one_is_refused(self, tmp_path: Path, shards: Path) -> None:
        (shards / "b.bin").write_bytes((shards / "b.bin").read_bytes()[:-1])
        with pytest.raises(ShardError, match="1,999 bytes"):
            self.made(tmp_path, shards)

    def test_beside_text_they_need_their_tokenizer(
        self, tmp_path: Path, shards: Path, data: Data
    ) -> None:
        old = Corpus(name="old", sources=(str(shards / "a"),))
        both = data.model_copy(update={"corpora": (*data.corpora, old)})
        with pytest.raises(TokenizerError, match=r"data\.tokenizer ="):
            prepare(both, VOCAB, seed=0)
        prepare(data, VOCAB, seed=0)
        tokenizer = tmp_path / "given.json"
        (data.folder / "tokenizer.json").rename(tokenizer)
        manifest = prepare(both.model_copy(update={"tokenizer": tokenizer}), VOCAB, seed=0)
        assert [corpus.held_out_by for corpus in manifest.corpora] == ["document", "tail"]

    def test_a_corpus_is_not_both(self, tmp_path: Path, shards: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        mixed = Corpus(name="mixed", sources=(str(shards / "a"), str(tmp_path / "a.txt")))
        with pytest.raises(SourceError, match="one or the other"):
            prepare(data_of(tmp_path / "p", mixed), VOCAB, seed=0)
