"""Text to tokenizer, shards and manifest: `ridgeline data prepare`.

Everything is written into a folder beside the wanted one, which it replaces when complete; so there
is never half a folder of data, and the old one serves until the new one is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ridgeline.data.baseline import measure_baselines
from ridgeline.data.encode import Encoding, chunk_encoder, split_tail, write_corpus
from ridgeline.data.indexed import IndexedShard, with_ending
from ridgeline.data.manifest import (
    MANIFEST,
    Baselines,
    CorpusRecipe,
    CorpusRecord,
    Manifest,
    Recipe,
    Segment,
    TokenizerRecord,
    open_segments,
    read_manifest,
)
from ridgeline.data.sources import (
    Chunk,
    SourceFile,
    chunks_of,
    find_files,
    fingerprint_of,
    megatron_prefixes,
)
from ridgeline.data.stream import shard_mapper
from ridgeline.data.tokenizer import (
    check_vocab,
    end_of_document_id,
    load_tokenizer,
    sample_texts,
    sha256_of,
    train_tokenizer,
    vocab_of,
)
from ridgeline.errors import DataError, ShardError, SourceError, TokenizerError
from ridgeline.processes import is_alive
from ridgeline.run import Corpus, Data

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Found:
    """What a corpus' sources name: files of text (and how many were left out), or Megatron shards
    and their files."""

    corpus: Corpus
    files: list[SourceFile]
    skipped: Counter[str]
    shards: list[IndexedShard]


def prepare(data: Data, vocab: int, seed: int, console: Console | None = None) -> Manifest:
    """Prepare `data.folder` for a model of `vocab` entries; returns its manifest.

    An existing folder made by the same recipe (sources untouched) is kept. The bytes written do not
    depend on `data.workers`. Starts processes by spawn, so a script that calls it with more than
    one worker needs `if __name__ == "__main__":`.
    Raises SourceError, TokenizerError or ShardError; and DataError for a folder that cannot be
    written or holds other things.
    """
    console = console or Console(quiet=True)
    folder = data.folder.expanduser().resolve()
    found = [_find(corpus) for corpus in data.corpora]
    _check_request(data, found)
    recipe = _recipe(data, vocab, seed, found)
    weights = {corpus.name: corpus.weight for corpus in data.corpora}
    manifest = _existing(folder, recipe, console)
    if manifest is None:
        with _replacing(folder) as partial:
            manifest = _make(partial, data, vocab, recipe, found, console)
            manifest = _with_baselines(partial, manifest, weights, vocab, console)
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    elif manifest.baselines is None or manifest.baselines.weights == weights:
        _say(console, f"{data.folder}: up to date")
    else:
        _say(console, f"{data.folder}: shards up to date, weights new")
        manifest = _with_baselines(folder, manifest, weights, vocab, console)
        partial_manifest = folder / f"{MANIFEST}.partial"
        partial_manifest.write_text(manifest.model_dump_json(indent=1))
        partial_manifest.replace(folder / MANIFEST)
    for line in summary(manifest):
        _say(console, line)
    return manifest


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(manifest: Manifest) -> list[str]:
    """What was prepared, a line per corpus and one for the baselines."""
    lines = []
    for corpus in manifest.corpora:
        size = (
            f"{corpus.bytes / 1e6:,.1f} MB  {corpus.bytes / max(corpus.tokens, 1):.2f} bytes/token"
            if corpus.bytes is not None
            else "Megatron shards, read in place"
        )
        notes = [f"{corpus.duplicates:,} duplicates dropped"] if corpus.duplicates else []
        notes += [f"{count:,} {why} skipped" for why, count in sorted(corpus.skipped.items())]
        if corpus.held_out_by == "tail" and corpus.bytes is not None:
            notes.append("too few documents to hold any out: its tail is held out")
        lines.append(
            f"{corpus.name}: {corpus.documents:,} documents  {corpus.tokens:,} tokens "
            f"({corpus.held_out_tokens:,} held out)  {size}"
            + (f"  [{', '.join(notes)}]" if notes else "")
        )
    if manifest.tokenizer is None:
        lines.append("no tokenizer: the vocabulary of these shards is not checked")
    if manifest.baselines:
        lines.append(
            f"to beat: unigram entropy {manifest.baselines.unigram_entropy:.3f}, held-out bigram "
            f"loss {manifest.baselines.bigram_held_out_loss:.3f} nats/token"
        )
    return lines


def _find(corpus: Corpus) -> Found:
    """Resolve a corpus' sources."""
    megatron = [megatron_prefixes(source) for source in corpus.sources]
    if all(megatron):
        prefixes = list(dict.fromkeys(prefix for part in megatron for prefix in part))
        shards = [IndexedShard.open(prefix) for prefix in prefixes]
        pairs = [str(with_ending(prefix, end)) for prefix in prefixes for end in (".idx", ".bin")]
        return Found(corpus, find_files(pairs)[0], Counter(), shards)
    if any(megatron):
        raise SourceError(
            f"corpus {corpus.name!r} mixes text and Megatron shards",
            "a corpus is one or the other",
            "two corpora, each with a weight of its own",
        )
    files, skipped = find_files(corpus.sources)
    return Found(corpus, files, skipped, [])


def _check_request(data: Data, found: Sequence[Found]) -> None:
    """There must be corpora, and Megatron shards beside text need their tokenizer."""
    if not found:
        raise DataError(
            "a run without corpora",
            "data.corpora names what it is trained on",
            '[[data.corpora]]  name = "text"  sources = ["folder/of/text"]',
        )
    shards = [each.corpus.name for each in found if each.shards]
    if shards and len(shards) < len(found) and data.tokenizer is None:
        raise TokenizerError(
            f"corpus {shards[0]!r} of Megatron shards beside corpora of text",
            "a tokenizer trained on the text would not fit the shards",
            "data.tokenizer = the tokenizer.json that the shards were made with",
        )


def _recipe(data: Data, vocab: int, seed: int, found: Sequence[Found]) -> Recipe:
    if data.tokenizer:
        given = load_tokenizer(data.tokenizer.expanduser())
        check_vocab(vocab_of(given), vocab, f"tokenizer {data.tokenizer}")
    return Recipe(
        vocab=None if data.tokenizer else vocab,
        tokenizer_sha256=sha256_of(data.tokenizer.expanduser()) if data.tokenizer else None,
        corpora=tuple(
            CorpusRecipe(
                name=each.corpus.name,
                sources=each.corpus.sources,
                text_field=each.corpus.text_field,
                files=len(each.files),
                bytes=sum(file.bytes for file in each.files),
                fingerprint=fingerprint_of(each.files),
            )
            for each in found
        ),
        held_out_fraction=data.held_out_fraction,
        shard_tokens=data.shard_tokens,
        seed=seed,
    )


def _existing(folder: Path, recipe: Recipe, console: Console) -> Manifest | None:
    """The manifest of `folder` if it was made by `recipe` and is whole; None to make it (again).

    Raises DataError for a folder with anything in it that we did not write: replacing the folder
    would delete it.
    """
    if not folder.exists():
        return None
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {folder.name}
    manifest = read_manifest(folder) if MANIFEST in present else None
    corpora = manifest.corpora if manifest else ()
    segments = [part for corpus in corpora for part in (*corpus.train, *corpus.held_out)]
    ours = {part.shard + ending for part in segments for ending in (".bin", ".idx")}
    ours |= {MANIFEST, f"{MANIFEST}.partial", TOKENIZER} if manifest else set()
    if strangers := sorted(present - ours):
        raise DataError(
            f"prepared data in {folder}",
            f"the folder is replaced as a whole, and {strangers[0]!r} in it is not of ours",
            "another data.folder, or move that away",
        )
    if manifest is None or manifest.recipe != recipe:
        return None
    try:
        if manifest.tokenizer and sha256_of(folder / TOKENIZER) != manifest.tokenizer.sha256:
            raise ShardError(f"{folder / TOKENIZER}", "it is not the one of the manifest")
        open_segments(folder, tuple(segments), shard_mapper())
    except (ShardError, OSError) as error:
        _say(console, f"{error}\nprepared again")
        return None
    return manifest


def _make(
    folder: Path,
    data: Data,
    vocab: int,
    recipe: Recipe,
    found: Sequence[Found],
    console: Console,
) -> Manifest:
    """Write tokenizer and shards into `folder`; the manifest is returned, without baselines."""
    chunks = {
        each.corpus.name: list(chunks_of(each.files, each.corpus.text_field))
        for each in found
        if not each.shards
    }
    text_chunks = [chunk for part in chunks.values() for chunk in part]
    tokenizer = _tokenizer(folder, data.tokenizer, vocab, text_chunks, console)
    workers = min(data.workers or len(os.sched_getaffinity(0)), max(len(text_chunks), 1))
    records = []
    started = time.monotonic()
    with chunk_encoder(workers) as encoder:
        for each in found:
            if each.shards:
                records.append(_reference(each, data.held_out_fraction))
                continue
            assert tokenizer is not None  # _check_request: text always has one
            encoding = Encoding(
                tokenizer=folder / TOKENIZER,
                sha256=tokenizer.sha256,
                vocab=tokenizer.vocab,
                end_of_document=tokenizer.end_of_document,
                seed=recipe.seed,
                held_out_fraction=data.held_out_fraction,
            )
            name = each.corpus.name
            encoded = track(
                encoder.encode(chunks[name], encoding),
                f"tokenize {name}",
                total=len(chunks[name]),
                console=console,
                disable=not console.is_terminal,
            )
            records.append(
                write_corpus(name, iter(encoded), each.skipped, encoding, folder, data.shard_tokens)
            )
    if text_chunks:
        _say(
            console,
            f"tokenized in {time.monotonic() - started:.1f} s by {workers} "
            f"process{'es' if workers > 1 else ''}",
        )
    return Manifest(
        format=1, tokenizer=tokenizer, recipe=recipe, corpora=tuple(records), baselines=None
    )


def _tokenizer(
    folder: Path, given: Path | None, vocab: int, chunks: Sequence[Chunk], console: Console
) -> TokenizerRecord | None:
    """Copy or train the tokenizer into `folder`; None when there is neither one nor text."""
    path = folder / TOKENIZER
    if given:
        tokenizer = load_tokenizer(given.expanduser())
        shutil.copyfile(given.expanduser(), path)
    elif chunks:
        started = time.monotonic()
        tokenizer = train_tokenizer(sample_texts(chunks), vocab)
        path.write_text(tokenizer.to_str(), encoding="utf-8")
        _say(
            console,
            f"tokenizer of {vocab_of(tokenizer):,} entries trained in "
            f"{time.monotonic() - started:.1f} s, on at most 10 MB of the text",
        )
    else:
        return None
    return TokenizerRecord(
        file=TOKENIZER,
        sha256=sha256_of(path),
        vocab=vocab_of(tokenizer),
        end_of_document=end_of_document_id(tokenizer, given or path),
    )


def _reference(found: Found, held_out_fraction: float) -> CorpusRecord:
    """A corpus of Megatron shards, left where they are."""
    digest = hashlib.sha256()
    for shard in found.shards:
        digest.update(sha256_of(with_ending(shard.prefix, ".idx")).encode())
    whole = [Segment(shard=str(shard.prefix), start=0, stop=shard.tokens) for shard in found.shards]
    train, held_out = split_tail(Path(), whole, held_out_fraction)
    return CorpusRecord(
        name=found.corpus.name,
        documents=sum(shard.documents for shard in found.shards),
        bytes=None,
        tokens=sum(shard.tokens for shard in found.shards),
        duplicates=0,
        skipped={},
        held_out_by="tail",
        digest=digest.hexdigest(),
        train=train,
        held_out=held_out,
    )


def _with_baselines(
    folder: Path, manifest: Manifest, weights: Mapping[str, float], vocab: int, console: Console
) -> Manifest:
    """Measure the baselines; left out when a corpus has no two neighbouring tokens in a split."""
    started = time.monotonic()
    mapper = shard_mapper()
    train = {each.name: open_segments(folder, each.train, mapper) for each in manifest.corpora}
    held = {each.name: open_segments(folder, each.held_out, mapper) for each in manifest.corpora}
    if min(stream.tokens for stream in (*train.values(), *held.values())) < 2:
        return manifest
    vocab = manifest.tokenizer.vocab if manifest.tokenizer else vocab
    baselines: Baselines = measure_baselines(train, held, weights, vocab)
    _say(
        console,
        f"baselines of {baselines.training_tokens:,} training tokens measured in "
        f"{time.monotonic() - started:.1f} s",
    )
    return manifest.model_copy(update={"baselines": baselines})


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place if all goes well and goes if not."""
    mine = f".{folder.name}.{socket.gethostname()}-{os.getpid()}"
    partial, old = folder.parent / f"{mine}.partial", folder.parent / f"{mine}.old.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"prepared data in {folder}", f"it must be writable: {error}", "another data.folder"
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes of this host that were killed left beside `folder`."""
    start = f".{folder.name}.{socket.gethostname()}-"
    for leftover in folder.parent.glob(f"{start}*.partial"):
        process = int(leftover.name.removeprefix(start).split(".")[0])
        if not is_alive(process):
            shutil.rmtree(leftover, ignore_errors=True)
