"""The catalogue reads, names its sources and answers to aliases."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest

from ridgeline.errors import ModelError
from ridgeline.model import catalogue
from ridgeline.model.shape import ModelShape, RopeScaling

NAMES = catalogue.names()


def test_the_promised_models_are_there() -> None:
    promised = {
        *(f"gpt2{size}" for size in ("", "-medium", "-large", "-xl")),
        *(f"gigagpt-{size}" for size in ("111m", "1.3b", "13b", "70b", "175b")),
        *(f"frontier-{size}" for size in ("1.4b", "22b", "175b", "1t")),
        *(f"llama2-{size}" for size in ("7b", "13b", "70b")),
        *(f"llama3.1-{size}" for size in ("8b", "70b", "405b")),
        *(f"megatron-{size}" for size in ("1.7b", "3.6b", "7.5b", "18.4b", "39.1b", "76.1b")),
        *(f"megatron-{size}" for size in ("145.6b", "310.1b", "529.6b", "1008b")),
        *("gpt3-175b", "fugaku-llm-13b", "mixtral-8x7b", "deepseek-v3", "qwen2.5-7b", "qwen3-8b"),
        "laptop",
    }
    assert promised <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_says_where_it_is_from(name: str) -> None:
    entry = catalogue.entry(name)
    assert entry.shape.name == name
    assert entry.source == entry.shape.source != type(entry.shape).model_fields["source"].default
    assert (entry.published_parameters is None) == (name == "laptop")


def test_aliases_find_their_entry_and_shadow_no_name() -> None:
    assert catalogue.entry("llama3-405b").shape.name == "llama3.1-405b"
    aliases = [alias for name in NAMES for alias in catalogue.entry(name).aliases]
    assert len({*aliases, *NAMES}) == len(aliases) + len(NAMES)
    assert all(alias in catalogue.entry(alias).aliases for alias in aliases)


def test_an_unknown_model_is_told_the_nearest_name() -> None:
    with pytest.raises(ModelError) as caught:
        catalogue.entry("lama3.1-405b")
    assert "did you mean 'llama3.1-405b'?" in caught.value.remedy


def test_a_table_takes_from_its_entry_what_it_leaves_out() -> None:
    llama = catalogue.entry("llama3.1-8b").shape
    assert ModelShape(**catalogue.expand({"name": "llama3-8b"})) == llama
    scaling = {"factor": 32.0}
    cut = ModelShape(
        **catalogue.expand({"name": "llama3.1-8b", "layers": 4, "rope_scaling": scaling})
    )
    assert (cut.layers, cut.hidden, cut.ffn_hidden) == (4, llama.hidden, llama.ffn_hidden)
    assert cut.rope_scaling == RopeScaling(factor=32.0)


def test_a_table_of_its_own_is_left_alone_and_half_of_one_is_refused() -> None:
    own = {"name": "mine", "layers": 1, "hidden": 8, "heads": 2, "vocab": 9}
    assert catalogue.expand(own) == own
    with pytest.raises(ModelError, match="'mine'"):
        catalogue.expand({"name": "mine", "layers": 1})


def test_no_family_repeats_a_name_of_another() -> None:
    files = resources.files(catalogue).iterdir()
    tables = [
        line
        for file in files
        if file.name.endswith(".toml")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("[")
    ]
    assert len(set(tables)) == len(tables) == len(NAMES)


def test_shapes_counts_and_catalogue_need_no_torch() -> None:
    script = (
        "import sys; from ridgeline.model import catalogue, counts;"
        "counts.parameters(catalogue.entry('gpt2').shape); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
