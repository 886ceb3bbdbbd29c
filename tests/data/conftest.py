"""Small corpora and prepared folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ridgeline.data.indexed import ShardWriter, token_dtype

VERSE = """a the ridge line plans and rehearses, trains and audits models: 12 345 tokens, whose loss
falls slowly (but surely) over many steps of a long run on machines large or small."""
WORDS = VERSE.split()


@pytest.fixture
def write_jsonl() -> Callable[..., Path]:
    """Write `count` different documents of text, one per line, and return the path."""

    def write(path: Path, count: int, seed: int = 0) -> Path:
        choose = np.random.RandomState(seed)
        texts = [
            f"{number} " + " ".join(WORDS[at] for at in choose.randint(0, len(WORDS), 40))
            for number in range(count)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def write_shard() -> Callable[[Path, list[list[int]]], Path]:
    """Write documents of token ids as a shard and return its prefix."""

    def write(prefix: Path, documents: list[list[int]], vocab: int = 1000) -> Path:
        with ShardWriter(prefix, token_dtype(vocab)) as shard:
            for document in documents:
                shard.add(np.array(document, np.int64))
        return prefix

    return write
