"""Sources: order, what is skipped and counted, errors that say where."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.data import sources
from ridgeline.data.sources import (
    Chunk,
    chunks_of,
    find_files,
    fingerprint_of,
    megatron_prefixes,
    read_documents,
)
from ridgeline.errors import SourceError


def documents_of(
    named: Sequence[str | Path], text_field: str = "text"
) -> tuple[list[str], dict[str, int]]:
    files, skipped = find_files([str(source) for source in named])
    texts = [
        text for chunk in chunks_of(files, text_field) for text in read_documents(chunk, skipped)
    ]
    return texts, dict(skipped)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_folder_is_read_in_sorted_order_whatever_the_endings(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "sub/c", "sub/a.py", "Z.rst"):
        put(tmp_path / name, name)
    put(tmp_path / "c.jsonl", '{"text": "line 1"}\n\n{"text": "line 2"}')
    texts, skipped = documents_of([tmp_path])
    assert texts == ["Z.rst", "a.txt", "b.md", "line 1", "line 2", "sub/a.py", "sub/c"]
    assert skipped == {}


def test_what_is_no_text_in_a_folder_is_skipped_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "good.txt", "text")
    put(tmp_path / "latin.txt", b"caf\xe9")
    put(tmp_path / "zeros.bin", b"a\0b")
    put(tmp_path / "empty.txt", "")
    put(tmp_path / "empty.jsonl", '{"text": ""}\n')
    put(tmp_path / ".git" / "config", "hidden")
    put(tmp_path / ".hidden", "hidden")
    texts, skipped = documents_of([tmp_path])
    assert texts == ["text"]
    assert skipped == {"not UTF-8 text": 2, "empty": 2, "hidden": 2}


@pytest.mark.parametrize(
    ("content", "said"), [(b"caf\xe9!", "at byte 3"), (b"ab\0", "NUL byte at byte 2")]
)
def test_a_file_said_by_name_must_be_text(tmp_path: Path, content: bytes, said: str) -> None:
    path = put(tmp_path / "book.txt", content)
    with pytest.raises(SourceError, match=rf"book\.txt\n.*{said}"):
        documents_of([path])


def test_a_byte_order_mark_is_not_text_and_line_ends_stay(tmp_path: Path) -> None:
    assert documents_of([put(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo")])[0] == ["one\r\ntwo"]


def test_a_glob_is_sorted_and_each_file_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        put(tmp_path / name, name)
    texts, _ = documents_of([tmp_path / "*.txt", tmp_path / "a.txt", tmp_path])
    assert texts == ["a.txt", "b.txt", "c.md"]


def test_a_missing_source_names_the_nearest(tmp_path: Path) -> None:
    put(tmp_path / "books" / "a.txt", "a")
    with pytest.raises(SourceError, match=r"(?s)boks.*did you mean 'books'\?"):
        documents_of([tmp_path / "boks"])
    with pytest.raises(SourceError, match="names no file"):
        documents_of([tmp_path / "books" / "*.md"])
    (tmp_path / "void").mkdir()
    with pytest.raises(SourceError, match="names no file"):
        documents_of([tmp_path / "void"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": ', "one JSON object in UTF-8"),
        (b'{"text": "caf\xe9"}', "one JSON object in UTF-8"),
        (b'{"txt": "a"}', r"field 'text'\n.*text_field; did you mean 'txt'\?"),
        (b'["text"]', "object with the field 'text'"),
        (b'{"text": 3}', "a string, not int"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: bytes, said: str) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "fine"}\n' * 2 + line + b"\n")
    with pytest.raises(SourceError, match=rf"(?s)a\.jsonl, line 3\n.*{said}"):
        documents_of([path])


def test_the_text_field_is_the_corpus_own(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"content": "x", "text": "y"}\n')
    assert documents_of([path], "content")[0] == ["x"]


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=8).map(lambda text: text + "."), max_size=12),
    data=st.data(),
)
def test_chunks_cut_anywhere_lose_and_repeat_no_line(texts: list[str], data: st.DataObject) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    cuts = data.draw(st.lists(st.integers(1, max(len(content) - 1, 1)), max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder, "a.jsonl"), content)
        files, _ = find_files([str(path)])
        bounds = [0, *sorted(set(cuts)), len(content)]
        read = [
            text
            for start, stop in pairwise(bounds)
            if stop
            for text in read_documents(Chunk(tuple(files), "text", start, stop), Counter())
        ]
    assert read == texts


def test_chunks_gather_small_files_and_cut_large_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    for number in range(5):
        put(tmp_path / f"{number}.txt", "x" * 60)
    put(tmp_path / "5.jsonl", '{"text": "0123456789"}\n' * 20)
    chunks = list(chunks_of(find_files([str(tmp_path)])[0], "text"))
    assert [len(chunk.files) for chunk in chunks[:3]] == [2, 2, 1]
    assert [(chunk.start, chunk.stop) for chunk in chunks[3:]] == [
        (0, 100), (100, 200), (200, 300), (300, 400), (400, 460),
    ]  # fmt: skip


def test_a_touched_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "one")
    before = fingerprint_of(find_files([str(path)])[0])
    assert fingerprint_of(find_files([str(path)])[0]) == before
    put(path, "three")
    assert fingerprint_of(find_files([str(path)])[0]) != before


def test_megatron_shards_are_named_by_prefix_file_or_glob(tmp_path: Path) -> None:
    for name in ("b.idx", "b.bin", "a.v1.idx", "a.v1.bin", "notes.txt"):
        put(tmp_path / name, "")
    assert megatron_prefixes(f"{tmp_path}/a.v1") == [tmp_path / "a.v1"]
    assert megatron_prefixes(f"{tmp_path}/b.bin") == [tmp_path / "b"]
    assert megatron_prefixes(f"{tmp_path}/*.idx") == [tmp_path / "a.v1", tmp_path / "b"]
    assert megatron_prefixes(f"{tmp_path}/missing.idx") == [tmp_path / "missing"]
    assert megatron_prefixes(str(tmp_path)) == []
    assert megatron_prefixes(f"{tmp_path}/notes.txt") == []
