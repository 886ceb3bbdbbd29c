"""Megatron's indexed token format: `prefix.bin` holds tokens, `prefix.idx` says where each lies.

    prefix.idx, little-endian                                        bytes
      magic "MMIDIDX\\0\\0"                                            9
      version, always 1                                 uint64         8
      dtype code of the tokens                          uint8          1
      number of sequences, S                            uint64         8
      number of document indices, D = documents + 1     uint64         8
      length of each sequence, in tokens                int32        4 S
      first byte of each sequence in prefix.bin         int64        8 S
      sequence at which each document starts, then S    int64        8 D
      mode of each sequence (multimodal files only)     int8           S

Source of the layout and of the dtype codes: megatron-core 0.16.1,
`megatron/core/datasets/indexed_dataset.py` (NVIDIA), whose reader our files are tested with.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.errors import ShardError

Tokens = npt.NDArray[Any]
"""A one-dimensional array of token ids, in the integer type of their shard."""
Int64s = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# uint16 ends at 65,535; Megatron keeps 35 ids free below it, and so must we to be read alike.
UINT16_VOCAB_LIMIT = 65_500

_DTYPE_OF_CODE = {
    code: np.dtype(name)
    for code, name in {
        1: "uint8", 2: "int8", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2",
    }.items()
}  # fmt: skip
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}


def token_dtype(vocab: int) -> np.dtype[Any]:
    """The type that Megatron stores tokens of a `vocab`-entry vocabulary in: uint16 or int32."""
    return np.dtype("<u2") if vocab < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def shard_prefix(path: str | Path) -> Path:
    """`data/text` from `data/text`, `data/text.idx` or `data/text.bin`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path


def with_ending(prefix: Path, ending: str) -> Path:
    """`prefix` + `.bin` or `.idx`; a prefix may itself hold dots, so with_suffix would cut it."""
    return prefix.with_name(prefix.name + ending)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that maps cache cheaply
class IndexedShard:
    """An opened pair of `.bin` and `.idx`. Opening reads 46 bytes of the .idx, none of the .bin."""

    prefix: Path
    dtype: np.dtype[Any]
    tokens: int
    sequences: int
    documents: int

    @classmethod
    def open(cls, prefix: str | Path) -> IndexedShard:
        """Open and check sizes.

        Raises ShardError for a file that is missing, truncated, foreign, of another version or
        token type, or a .bin whose size is not what the .idx says.
        """
        prefix = shard_prefix(prefix)
        index, tokens = with_ending(prefix, ".idx"), with_ending(prefix, ".bin")
        try:
            index_bytes, token_bytes = index.stat().st_size, tokens.stat().st_size
            with index.open("rb") as file:
                dtype, sequences, document_indices = _read_header(index, file.read(HEADER.size))
                _check_index_size(index, index_bytes, sequences, document_indices)
                end = _last_sequence_end(file.fileno(), sequences, dtype.itemsize)
        except OSError as error:
            raise ShardError(
                f"shard {prefix}",
                f"a shard is a pair of readable files, .idx and .bin: {error}",
                "give the path without its ending, or with .idx, of a complete pair",
            ) from error
        if token_bytes != end:
            raise ShardError(
                f"shard {tokens} holds {token_bytes:,} bytes",
                f"its index says that the last sequence ends at byte {end:,} "
                f"({end // dtype.itemsize:,} tokens × {dtype.itemsize} bytes)",
                "copy the .bin again, or prepare the data again",
            )
        return cls(prefix, dtype, end // dtype.itemsize, sequences, max(document_indices - 1, 0))

    def map_tokens(self) -> Tokens:
        """A new read-only memory map of all tokens, [tokens]; it holds a file open while it lives.

        A plain array over the map: slices of a np.memmap cost five times as much.
        """
        if self.tokens == 0:
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(with_ending(self.prefix, ".bin"), self.dtype, mode="r"))

    def document_starts(self) -> Int64s:
        """The first token of each document, [documents], ascending; reads the .idx."""
        if self.documents == 0:
            return np.empty(0, np.int64)
        index = np.memmap(with_ending(self.prefix, ".idx"), np.uint8, mode="r")
        pointers_at = HEADER.size + 4 * self.sequences
        pointers = index[pointers_at:][: 8 * self.sequences].view("<i8")
        indices_at = pointers_at + 8 * self.sequences
        first_sequences = index[indices_at:][: 8 * self.documents].view("<i8")
        # An empty document at the very end starts where no sequence does.
        ends = np.append(pointers, self.tokens * self.dtype.itemsize)
        starts: Int64s = ends[first_sequences] // self.dtype.itemsize
        return starts


class ShardWriter:
    """Writes one shard; `with` commits it by rename, and an error inside leaves nothing behind.

        with ShardWriter(prefix, token_dtype(vocab)) as shard:
            shard.add(tokens)  # one document

    The files appear under their names only when complete, the .idx last.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.tokens = 0
        self._lengths: list[int] = []
        self._partial = with_ending(prefix, ".bin.partial")
        self._file = self._partial.open("wb")

    def add(self, document: Tokens) -> None:
        """Append one document of token ids, [tokens]."""
        self._file.write(document.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(len(document))
        self.tokens += len(document)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abandon()

    def commit(self) -> None:
        """Flush both files to the disk and give them their names."""
        index = with_ending(self.prefix, ".idx.partial")
        count = len(self._lengths)
        lengths = np.array(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])[:count]
        with index.open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, _CODE_OF_DTYPE[self.dtype], count, count + 1))
            file.write(lengths.tobytes())
            file.write(pointers.tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(with_ending(self.prefix, ".bin"))
        index.replace(with_ending(self.prefix, ".idx"))

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _read_header(index: Path, header: bytes) -> tuple[np.dtype[Any], int, int]:
    """(token type, number of sequences, number of document indices) of an .idx header."""
    if header[: len(MAGIC)] != MAGIC:
        raise ShardError(
            f"shard index {index}",
            f"a Megatron index starts with {MAGIC!r}, this one with {header[: len(MAGIC)]!r}",
            "name a .idx file that Megatron, NeMo, GPT-NeoX or `ridgeline data prepare` wrote",
        )
    if len(header) < HEADER.size:
        raise ShardError(
            f"shard index {index} holds {len(header)} bytes",
            f"its header alone has {HEADER.size} bytes: the file is truncated",
            "copy the .idx again, or prepare the data again",
        )
    _, version, code, sequences, document_indices = HEADER.unpack(header)
    if version != VERSION:
        raise ShardError(
            f"shard index {index} is of version {version}",
            f"version {VERSION} is the only one there is",
            "write it again with Megatron's tools or `ridgeline data prepare`",
        )
    dtype = _DTYPE_OF_CODE.get(code)
    if dtype is None or dtype.kind not in "iu":
        known = ", ".join(f"{c} {d.name}" for c, d in _DTYPE_OF_CODE.items() if d.kind in "iu")
        raise ShardError(
            f"shard index {index} has the token type code {code}",
            f"tokens are integers: {known}",
            "write it again with Megatron's tools or `ridgeline data prepare`",
        )
    return dtype, sequences, document_indices


def _check_index_size(index: Path, size: int, sequences: int, document_indices: int) -> None:
    """An .idx must be exactly as long as its counts say, with or without sequence modes."""
    expected = HEADER.size + 12 * sequences + 8 * document_indices
    if size not in (expected, expected + sequences):
        raise ShardError(
            f"shard index {index} holds {size:,} bytes",
            f"{HEADER.size} + 12 × {sequences:,} sequences + 8 × {document_indices:,} document "
            f"indices = {expected:,} bytes",
            "copy the .idx again, or prepare the data again",
        )


def _last_sequence_end(file: int, sequences: int, itemsize: int) -> int:
    """The byte of the .bin at which its last sequence ends."""
    if sequences == 0:
        return 0
    lengths_at, pointers_at = HEADER.size, HEADER.size + 4 * sequences
    (length,) = struct.unpack("<i", os.pread(file, 4, lengths_at + 4 * (sequences - 1)))
    (pointer,) = struct.unpack("<q", os.pread(file, 8, pointers_at + 8 * (sequences - 1)))
    end: int = pointer + length * itemsize
    return end
