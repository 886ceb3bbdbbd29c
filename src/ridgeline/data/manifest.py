"""manifest.json: what a folder of prepared data holds, and the recipe it was made by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ridgeline.data.indexed import IndexedShard
from ridgeline.data.stream import ShardMapper, TokenStream
from ridgeline.errors import DataError, ShardError

MANIFEST = "manifest.json"


class Record(BaseModel):
    """A table of the manifest: frozen, nothing unknown in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerRecord(Record):
    """The tokenizer of the shards. `file`: its name in the folder; `vocab`: its largest id + 1."""

    file: str
    sha256: str
    vocab: int
    end_of_document: int


class CorpusRecipe(Record):
    """Where a corpus came from. `fingerprint`: of all paths, sizes and times of change."""

    name: str
    sources: tuple[str, ...]
    text_field: str
    files: int
    bytes: int
    fingerprint: str


class Recipe(Record):
    """All that decides what the shards hold: an equal recipe means that nothing need be done."""

    vocab: int | None  # None where a given tokenizer decides
    tokenizer_sha256: str | None
    corpora: tuple[CorpusRecipe, ...]
    held_out_fraction: float
    shard_tokens: int
    seed: int


class Segment(Record):
    """Tokens [start, stop) of a shard; its prefix is relative to the folder, or absolute."""

    shard: str
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.stop - self.start


class CorpusRecord(Record):
    """One prepared corpus. `documents`, `bytes` (of UTF-8) and `tokens` count both splits, without
    the `duplicates`; bytes of Megatron shards are None, since they are not known.

    `held_out_by` says how the held-out part was chosen: by a hash of each document, or as the tail
    of the corpus where it has too few documents for that, or is made of Megatron shards.
    `digest` identifies the tokens (of Megatron shards: their indices).
    """

    name: str
    documents: int
    bytes: int | None
    tokens: int
    duplicates: int
    skipped: dict[str, int]
    held_out_by: Literal["document", "tail"]
    digest: str
    train: tuple[Segment, ...]
    held_out: tuple[Segment, ...]

    @property
    def held_out_tokens(self) -> int:
        """Tokens kept out of training."""
        return sum(segment.tokens for segment in self.held_out)


class Baselines(Record):
    """What a model without context reaches, in nats per token, for `weights`; see baseline.py.

    `training_tokens` were counted; the losses are over all held-out tokens, at most a million per
    corpus.
    """

    weights: dict[str, float]
    training_tokens: int
    unigram_entropy: float
    bigram_held_out_loss: float
    bigram_held_out_loss_by_corpus: dict[str, float]


class Manifest(Record):
    """The content of a folder of prepared data."""

    format: Literal[1]
    tokenizer: TokenizerRecord | None
    recipe: Recipe
    corpora: tuple[CorpusRecord, ...]
    baselines: Baselines | None

    def digest(self) -> str:
        """A hash of what the tokens are, wherever the folder lies and whenever it was written."""
        parts = [self.tokenizer.sha256 if self.tokenizer else "no tokenizer"]
        for corpus in self.corpora:
            train = [segment.tokens for segment in corpus.train]
            parts.append(f"{corpus.name} {corpus.digest} {corpus.held_out_by} {train}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of prepared data.

    Raises DataError when there is none, and ShardError when it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"prepared data in {folder}",
            f"it must hold {MANIFEST}, and {'does not' if folder.is_dir() else 'does not exist'}",
            "prepare it first: ridgeline data prepare RUN.toml",
        ) from error
    except (OSError, ValidationError) as error:
        raise ShardError(
            f"{path}",
            f"it must be a manifest of prepared data, of format 1: {error}",
            "prepare into another data.folder, or delete this one if it held prepared data",
        ) from error


def open_segments(folder: Path, segments: tuple[Segment, ...], mapper: ShardMapper) -> TokenStream:
    """The stream of tokens of segments. Raises ShardError for a shard that is not as recorded."""
    pieces = []
    for segment in segments:
        shard = IndexedShard.open(folder / segment.shard)
        if shard.tokens < segment.stop:
            raise ShardError(
                f"shard {shard.prefix} holds {shard.tokens:,} tokens",
                f"{MANIFEST} says that its tokens {segment.start:,} to {segment.stop:,} are used",
                "prepare the data again: ridgeline data prepare RUN.toml",
            )
        pieces.append((shard, segment.start, segment.stop))
    return TokenStream(pieces, mapper)
