"""Shards in Megatron's format: round trips, known bytes, damage, and Megatron's own reader."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data.indexed import (
    IndexedShard,
    ShardWriter,
    shard_prefix,
    token_dtype,
    with_ending,
)
from ridgeline.errors import ShardError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def written(prefix: Path, documents: list[list[int]], vocab: int = 1000) -> Path:
    with ShardWriter(prefix, token_dtype(vocab)) as shard:
        for document in documents:
            shard.add(np.array(document, np.int64))
    return prefix


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 60_000), max_size=20), max_size=20),
    vocab=st.sampled_from([60_001, 128_000]),
)
def test_documents_come_back_as_written(documents: list[list[int]], vocab: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = IndexedShard.open(written(Path(folder, "a.b"), documents, vocab))
        tokens, starts = shard.map_tokens(), shard.document_starts()
        assert shard.tokens == len(tokens) == sum(map(len, documents))
        assert shard.documents == shard.sequences == len(documents)
        ends = [*starts[1:].tolist(), shard.tokens]
        assert [tokens[a:b].tolist() for a, b in zip(starts, ends, strict=False)] == documents


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    # Laid out by hand after megatron-core 0.16.1, indexed_dataset.py, _IndexWriter.write.
    prefix = written(tmp_path / "shard", DOCUMENTS)
    assert (tmp_path / "shard.bin").read_bytes() == struct.pack("<8H", 1, 2, 3, 4, 5, 6, 7, 8)
    assert with_ending(prefix, ".idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)
        + struct.pack("<3i", 3, 1, 4)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


def test_the_token_type_follows_megatrons_rule() -> None:
    # megatron-core 0.16.1: DType.optimal_dtype, `cardinality < 65500`.
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


@pytest.mark.parametrize("ending", ["", ".idx", ".bin"])
def test_a_shard_is_named_by_its_prefix_or_either_file(tmp_path: Path, ending: str) -> None:
    written(tmp_path / "shard.v2", DOCUMENTS)
    assert shard_prefix(tmp_path / f"shard.v2{ending}") == tmp_path / "shard.v2"
    assert IndexedShard.open(f"{tmp_path}/shard.v2{ending}").tokens == 8


def test_documents_of_several_sequences_and_modes_are_read(tmp_path: Path) -> None:
    # Two documents, of two sequences and one; a multimodal file ends with a mode per sequence.
    (tmp_path / "s.bin").write_bytes(struct.pack("<6i", *range(6)))
    (tmp_path / "s.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, 3, 3)
        + struct.pack("<3i3q3q3b", 1, 2, 3, 0, 4, 12, 0, 2, 3, 0, 1, 0)
    )
    shard = IndexedShard.open(tmp_path / "s")
    assert (shard.documents, shard.sequences, shard.tokens) == (2, 3, 6)
    assert shard.document_starts().tolist() == [0, 3]


def test_opening_reads_none_of_the_tokens(tmp_path: Path) -> None:
    # A sparse .bin of 4 TB opens at once.
    sequences = 1000
    length = 2**30
    (tmp_path / "s.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, sequences, sequences + 1)
        + np.full(sequences, length, "<i4").tobytes()
        + (np.arange(sequences, dtype="<i8") * length * 4).tobytes()
        + np.arange(sequences + 1, dtype="<i8").tobytes()
    )
    (tmp_path / "s.bin").touch()
    os.truncate(tmp_path / "s.bin", sequences * length * 4)
    shard = IndexedShard.open(tmp_path / "s")
    assert shard.tokens == sequences * length
    assert shard.map_tokens()[-3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ending", "damage", "said"),
    [
        (".bin", lambda data: data[:-2], r"14 bytes\n.*byte 16 \(8 tokens × 2 bytes\)"),
        (".bin", lambda data: data + b"xx", r"18 bytes\n.*byte 16"),
        (".idx", lambda data: data[:-1], r"34 \+ 12 × 3 sequences \+ 8 × 4 .* = 102 bytes"),
        (".idx", lambda data: data[:20], r"20 bytes\n.*34 bytes"),
        (".idx", lambda data: b"", "starts with"),
        (".idx", lambda data: b"{" + data[1:], "starts with"),
        (".idx", lambda data: data[:9] + b"\x02" + data[10:], "version 2"),
        (".idx", lambda data: data[:17] + b"\x07" + data[18:], "code 7\n.*integers"),
        (".idx", lambda data: data[:17] + b"\x63" + data[18:], "code 99\n"),
    ],
)
def test_damage_is_named(tmp_path: Path, ending: str, damage: object, said: str) -> None:
    path = with_ending(written(tmp_path / "shard", DOCUMENTS), ending)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ShardError, match=said):
        IndexedShard.open(tmp_path / "shard")


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_half_a_pair_is_refused(tmp_path: Path, missing: str) -> None:
    with_ending(written(tmp_path / "shard", DOCUMENTS), missing).unlink()
    with pytest.raises(ShardError, match=rf"shard\{missing}"):
        IndexedShard.open(tmp_path / "shard")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "s", token_dtype(9)) as shard:
        shard.add(np.array([1]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_its_name_before_all_is_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", token_dtype(9)) as shard:
        shard.add(np.array([1]))
        assert {path.name for path in tmp_path.iterdir()} == {"s.bin.partial"}
    assert {path.name for path in tmp_path.iterdir()} == {"s.bin", "s.idx"}


def test_megatron_core_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for vocab in (1000, 128_000):
        prefix = written(tmp_path / f"ours{vocab}", DOCUMENTS, vocab)
        dataset = megatron.IndexedDataset(str(prefix))
        assert [dataset[at].tolist() for at in range(len(dataset))] == DOCUMENTS
        assert dataset.document_indices.tolist() == [0, 1, 2, 3]

        theirs = tmp_path / f"theirs{vocab}"
        dtype = megatron.DType.optimal_dtype(vocab)
        builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for document in DOCUMENTS:
            builder.add_document(document, [len(document)])
        builder.finalize(f"{theirs}.idx")
        assert with_ending(theirs, ".idx").read_bytes() == with_ending(prefix, ".idx").read_bytes()
        assert IndexedShard.open(theirs).map_tokens().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
