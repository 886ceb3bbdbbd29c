"""The catalogue as text: known rows, sums that are sums, and what fits a terminal."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import Decimal

import pytest

from ridgeline.errors import ModelError
from ridgeline.model.catalogue import entry, names
from ridgeline.model.counts import parameters
from ridgeline.model.table import _rounded, describe, table


def rows() -> dict[str, list[str]]:
    """The cells of each model's line."""
    _, *lines = table().split("\n\n")[0].splitlines()
    return {line.split()[0]: line.split() for line in lines}


def numbers(text: str, heading: str) -> dict[str, list[int]]:
    """The figures of one section of `describe`, by the name at the start of their line."""
    section = next(part for part in text.split("\n\n") if part.startswith(heading))
    lines = re.findall(r"^  (\D+?)  +(.+)$", section, re.M)
    return {
        name: [int(n.replace(",", "")) for n in re.findall(r"(?<!\S)[\d,]+(?!\S)", figures)]
        for name, figures in lines
    }


def test_every_model_has_one_line_of_at_most_100_columns() -> None:
    assert list(rows()) == names()
    assert max(map(len, table().splitlines())) <= 100


def test_columns_are_aligned() -> None:
    lines = table().split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "cells",
    [
        # 3·(12·(2·12·768² + 2·1024·768) + 2·768·50257) = 797,815,296: two products per weight, half
        # of the scores, head; three passes. 124,439,808 parameters: the released checkpoint.
        "gpt2 12 768 12/12 3072 50257 1024 124M 124M 0.80",
        # arXiv:2407.21783, table 3; 8,030,261,248 parameters: the released checkpoint
        "llama3.1-8b 32 4096 32/8 14336 128256 131072 8.03B 8.03B 148.11",
        "gigagpt-70b 80 8192 64/64 32768 50257 2048 64.9B 70B 397.07",
        "laptop 3 384 6/6 1024 2048 256 6.88M — 0.04",
    ],
)
def test_known_rows(cells: str) -> None:
    assert rows()[cells.split()[0]] == cells.split()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        ("8030261248", "8.03B"),
        ("7.0E+10", "70B"),
        ("1.3E+9", "1.3B"),
        ("1E+12", "1T"),
        ("1.456E+11", "146B"),
        ("512", "512"),
    ],
)
def test_counts_keep_no_more_digits_than_were_published(count: str, text: str) -> None:
    assert _rounded(Decimal(count)) == text


def test_llama_8b_by_component() -> None:
    text = describe("llama3-8b")
    assert text.startswith("llama3.1-8b (or llama3-8b)\nsource: arXiv:2407.21783")
    counted = numbers(text, "parameters")
    assert counted == {
        "embedding": [128256 * 4096],
        "attention": [32 * 4096 * 128 * (2 * 32 + 2 * 8)],
        "mlp": [32 * 3 * 4096 * 14336],
        "norms": [65 * 4096],
        "head": [128256 * 4096],
        "total": [8_030_261_248],
        "without embeddings and head": [8_030_261_248 - 2 * 128256 * 4096],
        "published": [8_030_261_248],
    }


def test_flops_of_gpt2_in_both_conventions() -> None:
    flops = numbers(describe("gpt2"), "FLOPs per token, in sequences of 1,024 tokens")
    scores = 12 * 2 * 1024 * 768  # of all layers, half of the sequence
    assert flops["forward, attention scores"] == [scores, 2 * scores]
    rest = 2 * 12 * 12 * 768**2 + 2 * 768 * 50257
    assert flops["forward"] == [rest + scores, rest + 2 * scores]
    assert flops["forward and backward"] == [797_815_296, 3 * (rest + 2 * scores)]


@pytest.mark.parametrize("name", names())
def test_components_add_up_and_lines_fit(name: str) -> None:
    text = describe(name)
    assert max(map(len, text.splitlines())) <= 100
    counted = numbers(text, "parameters")
    sums = {"total", "active per token", "without embeddings and head", "published"}
    parts = [values[0] for part, values in counted.items() if part not in sums]
    assert sum(parts) == counted["total"][0] == parameters(entry(name).shape).total
    flops = numbers(text, "FLOPs")
    for convention in (0, 1):
        parts = [value[convention] for part, value in flops.items() if "forward, " in part]
        assert sum(parts) == flops["forward"][convention]
        assert 3 * sum(parts) == flops["forward and backward"][convention]


def test_a_mixture_says_what_a_token_visits_and_its_shape_by_dotted_names() -> None:
    text = describe("deepseek-v3")
    assert "experts.top_k" in text and "latent_attention.kv_rank" in text
    # 37B activated of 671B: arXiv:2412.19437, abstract
    assert numbers(text, "parameters")["active per token"] == [37_552_282_624]
    assert re.search(r"^  published +671B  counted \+0\.0%$", text, re.M)


def test_a_published_count_of_few_digits_is_not_printed_with_more() -> None:
    assert re.search(r"^  published +70B  counted -7\.3%$", describe("gigagpt-70b"), re.M)
    assert re.search(r"^  published +1\.0080T  counted \+0\.0%$", describe("megatron-1t"), re.M)


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"llama3\.1-8b"):
        describe("llama3.1-8")


def test_the_table_needs_no_torch() -> None:
    code = "import ridgeline.model.table as t, sys; t.table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
