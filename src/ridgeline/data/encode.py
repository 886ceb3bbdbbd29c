"""Text to shards of tokens, in parallel processes, with the same bytes for any number of them.

A worker reads and tokenizes a chunk; the main process takes the chunks in order, drops duplicates
and writes. A document is held out of training when a hash of its text and the seed falls below the
wanted fraction: so the same text is on the same side in every corpus, and stays there when
documents are added.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ridgeline.data.indexed import IndexedShard, ShardWriter, Tokens, token_dtype
from ridgeline.data.manifest import CorpusRecord, Segment
from ridgeline.data.sources import Chunk, read_documents
from ridgeline.data.tokenizer import load_tokenizer
from ridgeline.errors import DataError, SourceError

# Longer documents are tokenized in pieces, since the tokenizer needs about 120 bytes per token.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens: what every worker is told."""

    tokenizer: Path
    sha256: str
    vocab: int
    end_of_document: int
    seed: int
    held_out_fraction: float


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a chunk: tokens one after another, and per document the number of tokens,
    of UTF-8 bytes, a hash of the text, and whether it is held out."""

    tokens: Tokens
    lengths: list[int]
    text_bytes: list[int]
    digests: list[bytes]
    held_out: list[bool]
    skipped: Counter[str]


def encode_chunk(chunk: Chunk, encoding: Encoding) -> EncodedChunk:
    """Read and tokenize one chunk; what a worker does."""
    tokenizer = _tokenizer(encoding.tokenizer, encoding.sha256)
    key = (encoding.seed % 2**64).to_bytes(8, "little")
    threshold = encoding.held_out_fraction * 2.0**64
    dtype = token_dtype(encoding.vocab)
    encoded = EncodedChunk(np.empty(0, dtype), [], [], [], [], Counter())
    parts = [encoded.tokens]
    for text in read_documents(chunk, encoded.skipped):
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        place = hashlib.blake2b(digest, key=key, digest_size=8).digest()
        ids = [
            token
            for piece in _pieces(text)
            for token in tokenizer.encode(piece, add_special_tokens=False).ids
        ]
        ids.append(encoding.end_of_document)
        parts.append(np.array(ids, dtype))
        encoded.lengths.append(len(ids))
        encoded.text_bytes.append(len(data))
        encoded.digests.append(digest)
        encoded.held_out.append(int.from_bytes(place, "little") < threshold)
    return EncodedChunk(
        np.concatenate(parts), encoded.lengths, encoded.text_bytes,
        encoded.digests, encoded.held_out, encoded.skipped,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    """Read once per process; `sha256` keeps another file of the same name apart."""
    tokenizer = load_tokenizer(path)
    # Text that spells out a special token is text: it must not end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at a line's end where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        newline = text.rfind("\n", start + 1, start + PIECE_CHARACTERS)
        stop = newline if newline > 0 else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


@contextmanager
def chunk_encoder(workers: int) -> Iterator[ChunkEncoder]:
    """Processes that encode chunks; none for one worker."""
    if workers == 1:
        yield ChunkEncoder(None, 1)
        return
    # spawn: a fork would copy the tokenizer library's threads in mid-air, and a fork server would
    # outlive this and serve the training workers without torch preloaded.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    ) as pool:
        try:
            yield ChunkEncoder(pool, workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenizes died",
                "the system ended it, as it does when memory runs out",
                f"data.workers = {max(workers // 2, 1)}",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the main process is killed: nothing else would wake an idle worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class ChunkEncoder:
    """Encodes chunks, in order, a few ahead of what is taken."""

    def __init__(self, pool: ProcessPoolExecutor | None, workers: int) -> None:
        self._pool = pool
        self._ahead = 3 * workers

    def encode(self, chunks: Sequence[Chunk], encoding: Encoding) -> Iterator[EncodedChunk]:
        """The encoded chunks, in the order of the chunks."""
        if self._pool is None:
            yield from (encode_chunk(chunk, encoding) for chunk in chunks)
            return
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(self._pool.submit(encode_chunk, chunk, encoding))
            if len(waiting) == self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class SplitWriter:
    """One split of a corpus as shards `name.00000`, `name.00001` … of at most `shard_tokens`."""

    def __init__(self, folder: Path, name: str, encoding: Encoding, shard_tokens: int) -> None:
        self._folder = folder
        self._name = name
        self._dtype = token_dtype(encoding.vocab)
        self._shard_tokens = shard_tokens
        self._writer: ShardWriter | None = None
        self.segments: list[Segment] = []

    def add(self, document: Tokens) -> None:
        """Append a document; one larger than a shard goes on in the next."""
        for start in range(0, len(document), self._shard_tokens):
            part = document[start : start + self._shard_tokens]
            if self._writer and self._writer.tokens + len(part) > self._shard_tokens:
                self.finish()
            if self._writer is None:
                prefix = self._folder / f"{self._name}.{len(self.segments):05}"
                self._writer = ShardWriter(prefix, self._dtype)
            self._writer.add(part)

    def finish(self) -> None:
        """Commit the shard being written."""
        if self._writer:
            self._writer.commit()
            name, tokens = self._writer.prefix.name, self._writer.tokens
            self.segments.append(Segment(shard=name, start=0, stop=tokens))
            self._writer = None

    def abandon(self) -> None:
        """Close and remove the shard being written, if any."""
        if self._writer:
            self._writer.abandon()


def write_corpus(
    name: str,
    encoded: Iterator[EncodedChunk],
    skipped: Counter[str],
    encoding: Encoding,
    folder: Path,
    shard_tokens: int,
) -> CorpusRecord:
    """Write the shards of one corpus into `folder`.

    Documents seen before in this corpus are dropped; that takes about 100 bytes of memory each.
    Raises SourceError when no text is left.
    """
    seen: set[bytes] = set()
    duplicates = size = tokens = 0
    skipped = Counter(skipped)
    digest = hashlib.blake2b(digest_size=32)
    with ExitStack() as on_exit:
        splits = []
        for split in ("train", "held_out"):
            splits.append(SplitWriter(folder, f"{name}.{split}", encoding, shard_tokens))
            on_exit.callback(splits[-1].abandon)
        for chunk in encoded:
            skipped += chunk.skipped
            documents = np.split(chunk.tokens, np.cumsum(chunk.lengths, dtype=np.int64))[:-1]
            for document, document_bytes, text_digest, is_held_out in zip(
                documents, chunk.text_bytes, chunk.digests, chunk.held_out, strict=True
            ):
                if text_digest in seen:
                    duplicates += 1
                    continue
                seen.add(text_digest)
                size += document_bytes
                tokens += len(document)
                digest.update(document.tobytes())
                splits[is_held_out].add(document)
        for writer in splits:
            writer.finish()
    if not seen:
        said = ", ".join(f"{count:,} {why}" for why, count in skipped.items())
        raise SourceError(
            f"corpus {name!r}",
            f"its sources hold no text ({said or 'no documents'})",
            "files of UTF-8 text or .jsonl; Megatron shards are named by their .idx",
        )
    train, held_out = (tuple(split.segments) for split in splits)
    by_document = _is_about(encoding.held_out_fraction, held_out, tokens)
    if not by_document:
        train, held_out = split_tail(folder, train + held_out, encoding.held_out_fraction)
    return CorpusRecord(
        name=name,
        documents=len(seen),
        bytes=size,
        tokens=tokens,
        duplicates=duplicates,
        skipped=dict(skipped),
        held_out_by="document" if by_document else "tail",
        digest=digest.hexdigest(),
        train=train,
        held_out=held_out,
    )


def _is_about(fraction: float, held_out: tuple[Segment, ...], tokens: int) -> bool:
    """Whether the held-out part is within a factor of 4 of what was wanted; a corpus of a few
    documents can miss it by far, up to all or nothing."""
    share = sum(segment.tokens for segment in held_out) / tokens
    return fraction / 4 <= share <= min(fraction * 4, 0.6)


def split_tail(
    folder: Path, segments: Sequence[Segment], fraction: float
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Cut segments, which are whole shards, into training and the last `fraction` of the tokens.

    The cut is at the nearest start of a document, unless that would change the held-out part by
    more than half.
    """
    total = sum(segment.tokens for segment in segments)
    wanted = math.ceil(total * fraction)
    cut = total - wanted
    first = 0
    for segment in segments:
        if first <= cut < first + segment.tokens:
            starts = first + IndexedShard.open(folder / segment.shard).document_starts()
            near = int(starts[np.argmin(np.abs(starts - cut))]) if starts.size else cut
            cut = near if near > 0 and abs(near - cut) <= wanted / 2 else cut
            break
        first += segment.tokens
    train, held_out = [], []
    first = 0
    for segment in segments:
        middle = min(max(cut - first, 0), segment.tokens)
        if middle:
            train.append(segment.model_copy(update={"stop": middle}))
        if middle < segment.tokens:
            held_out.append(segment.model_copy(update={"start": middle}))
        first += segment.tokens
    return tuple(train), tuple(held_out)
