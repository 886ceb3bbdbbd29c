"""The tokenizer: an existing tokenizer.json, or a byte-level BPE trained on the text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ridgeline.data.sources import Chunk, read_documents
from ridgeline.errors import TokenizerError

END_OF_DOCUMENT = "<|endoftext|>"
# What the tokenizers of GPT-2, Llama-3, Llama-2/Mistral, Gemma and BERT end a document with.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
SMALLEST_VOCAB = 257  # 256 bytes and the end of a document
SAMPLE_BYTES = 10_000_000
_SAMPLED_CHUNKS = 64


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises TokenizerError when it is missing or not one."""
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(
            f"tokenizer {path}",
            f"it must be a tokenizer.json of Hugging Face tokenizers: {error}",
            "give the path of one, or leave data.tokenizer out to train one",
        ) from error


def vocab_of(tokenizer: Tokenizer) -> int:
    """One more than the largest token id; ids may have holes."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def end_of_document_id(tokenizer: Tokenizer, path: Path) -> int:
    """The id of the token that ends a document. Raises TokenizerError when there is none."""
    for name in END_OF_DOCUMENT_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise TokenizerError(
        f"tokenizer {path}",
        "it must have a token that ends a document: " + ", ".join(END_OF_DOCUMENT_NAMES),
        f"add the special token {END_OF_DOCUMENT} to it",
    )


def check_vocab(tokens: int, model: int, what: str) -> None:
    """Raise TokenizerError when a vocabulary of `tokens` entries does not fit `model` entries."""
    if tokens > model:
        raise TokenizerError(
            f"{what} has {tokens:,} tokens, and the model's vocabulary {model:,}",
            f"every token needs a row of the embedding: {tokens:,} > {model:,}",
            f"model.vocab = {-(-tokens // 64) * 64} (a multiple of 64), or another tokenizer",
        )


def sample_texts(chunks: Sequence[Chunk]) -> Iterator[str]:
    """About SAMPLE_BYTES of text (counted in characters), taken evenly from all over the chunks."""
    count = min(len(chunks), _SAMPLED_CHUNKS)
    for number in range(count):
        room = SAMPLE_BYTES // count
        for text in read_documents(chunks[number * len(chunks) // count], Counter()):
            yield text[:room]
            room -= len(text)
            if room <= 0:
                break


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab` entries; id 0 ends a document.

    Every byte has a token, so any text comes back unchanged; digits stand alone, so that numbers
    are spelt alike everywhere. Raises TokenizerError when `vocab` cannot hold all bytes.
    """
    if vocab < SMALLEST_VOCAB:
        raise TokenizerError(
            f"a byte-level tokenizer of {vocab} entries",
            f"256 bytes + 1 end of document = {SMALLEST_VOCAB} entries at least",
            f"model.vocab = {SMALLEST_VOCAB} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
