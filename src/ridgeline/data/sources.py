"""Sources of text: folders, files and globs, as documents in an order that never changes.

A .jsonl (or .ndjson) file holds one document per line, in one field; any other file is one
document, in UTF-8. Work is cut into chunks of about a megabyte that processes read on their own, so
that neither a folder of a million files nor a file of a terabyte is ever in memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ridgeline.data.indexed import shard_prefix, with_ending
from ridgeline.errors import SourceError, nearest

CHUNK_BYTES = 2**20
JSON_LINES = (".jsonl", ".ndjson")
# What a folder holds that is not text is skipped and counted under one of these.
NOT_TEXT = "not UTF-8 text"
EMPTY = "empty"
HIDDEN = "hidden"


@dataclass(frozen=True)
class SourceFile:
    """A file of text. `named`: said by its own name, so that it must be text."""

    path: Path
    bytes: int
    modified_ns: int
    named: bool


@dataclass(frozen=True)
class Chunk:
    """The documents that start within bytes [start, stop) of `files`' only .jsonl file, or whole
    text files (start and stop are then 0)."""

    files: tuple[SourceFile, ...]
    text_field: str
    start: int = 0
    stop: int = 0


def megatron_prefixes(source: str) -> list[Path]:
    """The Megatron shards that a source names (.idx or .bin files, a glob of such, or the prefix of
    a pair), absolute and sorted; none when it names text."""
    path = Path(source).expanduser()
    if path.suffix in (".idx", ".bin"):
        matches = [path] if path.exists() else [Path(match) for match in _glob(path)]
        return [shard_prefix(match).absolute() for match in matches or [path]]
    is_prefix = with_ending(path, ".idx").is_file() and not path.is_dir()
    return [path.absolute()] if is_prefix else []


def _glob(pattern: Path) -> list[str]:
    return sorted(glob.glob(str(pattern), recursive=True))  # noqa: PTH207 - may be absolute


def find_files(sources: Sequence[str]) -> tuple[list[SourceFile], Counter[str]]:
    """All files that the sources name, in order, each once; and how many hidden ones were left.

    Sources keep their order; within a folder or glob, files are sorted by path. Files and folders
    whose name starts with a dot belong to tools and are left out.
    Raises SourceError for a source that names nothing or cannot be read.
    """
    found: dict[Path, SourceFile] = {}
    skipped: Counter[str] = Counter()
    for source in sources:
        path = Path(source).expanduser()
        try:
            if path.is_dir():
                files = [(file, False) for file in _walk(path, skipped)]
            elif path.exists():
                files = [(path, True)]
            else:
                files = [(Path(match), False) for match in _glob(path) if Path(match).is_file()]
            for file, named in files:
                status = file.stat()
                found.setdefault(
                    file.absolute(), SourceFile(file, status.st_size, status.st_mtime_ns, named)
                )
        except OSError as error:
            raise SourceError(f"source {source!r}", f"it must be readable: {error}") from error
        if not files:
            raise SourceError(
                f"source {source!r}",
                "it names no file: a source is a folder, a file or a glob of text or .jsonl files, "
                "or the prefix of a Megatron shard",
                _nearest_neighbour(path),
            )
    return list(found.values()), skipped


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, onerror=fail):
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        skipped.update({HIDDEN: len(hidden)} if hidden else {})
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(at, name) for name in sorted(files) if not name.startswith("."))


def _nearest_neighbour(path: Path) -> str:
    """The name beside a missing path that is most like it."""
    parent = path.parent
    if not parent.is_dir():
        return f"an existing folder: {parent} is none"
    names = [entry.name for entry in parent.iterdir()][:1000]
    return f"in {parent}: {nearest(path.name, names)}" if names else f"{parent} is empty"


def fingerprint_of(files: Sequence[SourceFile]) -> str:
    """A hash of paths, sizes and times of change: equal when no source was touched."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path.absolute()}\0{file.bytes}\0{file.modified_ns}\n".encode())
    return digest.hexdigest()


def chunks_of(files: Sequence[SourceFile], text_field: str) -> Iterator[Chunk]:
    """Cut files into chunks of about CHUNK_BYTES, in order."""
    gathered: list[SourceFile] = []
    for file in files:
        if file.path.suffix.lower() in JSON_LINES:
            if gathered:
                yield Chunk(tuple(gathered), text_field)
                gathered = []
            for start in range(0, file.bytes, CHUNK_BYTES):
                yield Chunk((file,), text_field, start, min(start + CHUNK_BYTES, file.bytes))
        else:
            gathered.append(file)
            if sum(other.bytes for other in gathered) >= CHUNK_BYTES or len(gathered) == 1000:
                yield Chunk(tuple(gathered), text_field)
                gathered = []
    if gathered:
        yield Chunk(tuple(gathered), text_field)


def read_documents(chunk: Chunk, skipped: Counter[str]) -> Iterator[str]:
    """The documents of a chunk; what is no text, or empty, is counted in `skipped`.

    Raises SourceError for a file that cannot be read, a file said by name that is no text, and a
    line that is no JSON object with text in the chunk's field.
    """
    try:
        if chunk.stop:
            yield from _read_lines(chunk, skipped)
        else:
            yield from _read_texts(chunk.files, skipped)
    except OSError as error:
        raise SourceError("sources of text", f"they must be readable: {error}") from error


def _read_texts(files: Sequence[SourceFile], skipped: Counter[str]) -> Iterator[str]:
    for file in files:
        data = file.path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
            if "\0" in text:  # as git and grep tell binary from text
                raise UnicodeDecodeError(
                    "utf-8", data, data.index(0), data.index(0) + 1, "NUL byte"
                )
        except UnicodeDecodeError as error:
            if file.named:
                raise SourceError(
                    f"source {file.path}",
                    f"text is UTF-8 without NUL bytes: {error.reason} at byte {error.start:,}",
                    f"iconv -f latin1 -t utf-8 {file.path.name} > converted.txt, if it is text",
                ) from error
            skipped[NOT_TEXT] += 1
            continue
        if text:
            yield text
        else:
            skipped[EMPTY] += 1


def _read_lines(chunk: Chunk, skipped: Counter[str]) -> Iterator[str]:
    path = chunk.files[0].path
    with path.open("rb") as file:
        if chunk.start:
            # The line that holds byte start − 1 belongs to the chunk before.
            file.seek(chunk.start - 1)
            file.readline()
        while (at := file.tell()) < chunk.stop:
            line = file.readline()
            if not line:
                break
            if not line.strip():
                continue
            text = _text_of(line, chunk.text_field, path, at)
            if text:
                yield text
            else:
                skipped[EMPTY] += 1


def _text_of(line: bytes, text_field: str, path: Path, at: int) -> str:
    """The text of one line of JSON."""

    def fail(rule: str, remedy: str) -> SourceError:
        number = 1
        with path.open("rb") as file:
            while file.tell() < at:
                file.readline()
                number += 1
        return SourceError(f"source {path}, line {number:,}", rule, remedy)

    try:
        record = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # of which JSONDecodeError and UnicodeDecodeError are kinds
        raise fail(f"each line is one JSON object in UTF-8: {error}", "repair the line") from error
    if not isinstance(record, dict) or text_field not in record:
        keys = record.keys() if isinstance(record, dict) else ()
        raise fail(
            f"each line is an object with the field {text_field!r}",
            f"set the corpus' text_field; {nearest(text_field, keys)}"
            if keys
            else "repair the line",
        )
    text = record[text_field]
    try:
        if isinstance(text, str) and text.encode() is not None:
            return text
    except UnicodeEncodeError as error:
        raise fail(f"text is Unicode, and {error.reason}", "repair the line") from error
    raise fail(f"the field {text_field!r} is a string, not {type(text).__name__}", "set text_field")
