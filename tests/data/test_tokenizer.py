"""The tokenizer: anything comes back, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from ridgeline.data import tokenizer as module
from ridgeline.data.sources import chunks_of, find_files
from ridgeline.data.tokenizer import (
    END_OF_DOCUMENT,
    check_vocab,
    end_of_document_id,
    load_tokenizer,
    sample_texts,
    train_tokenizer,
    vocab_of,
)
from ridgeline.errors import TokenizerError

TEXT = "def main(number: int) -> None:\n    print(number + 2024)\n" * 50
TRAINED = train_tokenizer(iter([TEXT]), 280)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text).ids, skip_special_tokens=False) == text


def test_the_end_of_a_document_is_token_0_and_digits_stand_alone() -> None:
    assert TRAINED.token_to_id(END_OF_DOCUMENT) == 0 == end_of_document_id(TRAINED, Path("x"))
    assert [TRAINED.decode([token]) for token in TRAINED.encode("2024").ids] == list("2024")
    assert any(len(TRAINED.decode([token])) > 3 for token in TRAINED.encode("number").ids)


def test_training_is_deterministic_and_holds_to_the_vocabulary() -> None:
    again = train_tokenizer(iter([TEXT]), 280)
    assert again.to_str() == TRAINED.to_str()
    assert vocab_of(TRAINED) == TRAINED.get_vocab_size() == 280
    # A text too small for the vocabulary wanted gives fewer entries.
    assert 257 <= vocab_of(train_tokenizer(iter(["ab"]), 5000)) < 270


def test_a_vocabulary_below_all_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"256 bytes \+ 1 end of document = 257"):
        train_tokenizer(iter([TEXT]), 256)


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    check_vocab(300, 300, "the tokenizer")
    with pytest.raises(TokenizerError, match=r"301 > 300\n.*model\.vocab = 320"):
        check_vocab(301, 300, "the tokenizer")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(TokenizerError, match=r"bad\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_a_tokenizer_must_be_able_to_end_a_document() -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert vocab_of(bare) == 8  # ids may have holes
    with pytest.raises(TokenizerError, match="ends a document"):
        end_of_document_id(bare, Path("bare.json"))
    bare.add_special_tokens(["</s>"])
    assert end_of_document_id(bare, Path("bare.json")) == bare.token_to_id("</s>")


def test_the_sample_is_bounded_and_from_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 64_000)
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(f"{number:03}" * 400_000)
    chunks = list(chunks_of(find_files([str(tmp_path)])[0], "text"))
    texts = list(sample_texts(chunks))
    assert sum(map(len, texts)) == 64_000
    files = [int(text[:3]) for text in texts]
    assert files[0] == 0
    assert files[-1] >= 97
    assert len(set(files)) == 64
