"""The articles' lines, each to the digit, and the page that quotes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import articles

PAGE = Path(__file__).parents[2] / "docs" / "articles.md"
COMPUTED = {
    "frontier": {
        "3,072 of Frontier's cards": "8.11%",
        "3,072 of its GCDs": "4.08%",
        "1,024 of its cards": "2.70%",
        "22B: 73.5 TFLOP/s": "38.38%",
        "175B: 69.2 TFLOP/s": "36.14%",
        "1T: 61.2 TFLOP/s": "31.96%",
        "memory of 1T parameters": "14 TB",
        "GCDs of 64 GB that hold 14 TB": "219",
        "bubble of 1T, strong scaling at 3,072": "4.5% idle",
        "1T to the end, 20 T tokens, on those 3,072": "27 years",
        "FLOP of GPT-3 (175B, 300 B tokens)": "3.23e23",
        "a GPT-3 on 20,000 A100-SXM-80GB": "1.5 days",
        "a GPT-3 on 20,000 V100-SXM3-32GB": "3.7 days",
        "the same on 1,024 A100": "33.9 days",
    },
    "newsletter": {
        "3,072 of 75,264": "4.1%",
        "nodes behind 3,072 GCDs": "384",
        "exaFLOP/s of 3,072 GCDs at 61.2 TFLOP/s": "0.188",
    },
    "gigagpt": {
        "GPT-3's size": "174.6 billion",
        "nanoGPT's usual model": "124.4 million",
        "weights, gradients and Adam of it": "2.79 TB",
        "300 B tokens of it on 192 CS-2": "2.6 days at peak",
    },
    "llama_as_printed": {
        "share of embeddings": "0.49%",
        "6·N·D": "3.645e25",
        "16,000 H100 at 1,979 TFLOP/s": "3.17e19",
        "3.8e25 FLOP over 3.2e19 FLOP/s": "1.19e6 s, 13.7 days",
        "devices at 30,000 $": "480 M$",
        "capital": "960 M$",
        "power": "22.4 MW",
        "energy of 54 days": "29.03 million kWh",
        "electricity at 0.083 per kWh": "2.41 million",
        "its share of the cost of ownership": "0.25%",
    },
    "llama_what_holds": {
        "embedding and head": "1.04%",
        "FLOP of 15 T tokens, counted": "3.79e25",
        "days at the dense peak": "27.8",
        "days at an MFU of 43 to 38%": "65 to 73",
        "days by the model card": "78",
        "MFU that 54 days would mean": "51.5%",
        "energy by the card's hours": "43.18 GWh",
        "hours between failures": "3.09",
        "H100 that hold weights, gradients and Adam": "82",
    },
    "supercomputers": {
        "memory of 1T parameters": "24 TB",
        "the same after decomposition": "14 TB",
        "GCDs of 64 GB that hold 24 TB": "375",
        "parameters of Fugaku-LLM": "13.22 billion",
        "13,824 nodes of Fugaku": "8.7%",
        "tokens per parameter": "28.7",
        "days at the peak of float32": "3.9",
        "idle share of its pipeline": "50.0%",
        "the same with ZB-H1": "27.6%",
        "the same with 8 micro-batches and 5 chunks a rank": "14.9%",
    },
}


@pytest.mark.parametrize("article", articles.ARTICLES, ids=lambda article: article.__name__)
def test_each_line_to_the_digit(article: articles.Article) -> None:
    assert {line.about: line.computed for line in article()} == COMPUTED[article.__name__]


def test_slips_are_named() -> None:
    remarks = {line.about: line.remark for a in articles.ARTICLES for line in a()}
    assert "1.48e6 s would be 17.1 days" in remarks["3.8e25 FLOP over 3.2e19 FLOP/s"]
    assert "42.5 days, which would be 22.85" in remarks["energy of 54 days"]
    assert "slip of 10,000" in remarks["tokens per parameter"]
    assert "snapshot" in remarks["MFU that 54 days would mean"]
    assert "each of the 3,072 was one GCD" in remarks["3,072 of Frontier's cards"]


def test_the_page_is_what_the_functions_print() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == articles.markdown(), "python bench/articles.py > docs/articles.md"
