"""A shape derives what it is not told, reads back as it was, and refuses what cannot be."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ridgeline.errors import ModelError
from ridgeline.model.shape import ExpertShape, LatentAttentionShape, ModelShape, RopeScaling

SMALL: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 100}
LATENT = {
    "query_rank": 24,
    "kv_rank": 8,
    "rope_head_dim": 4,
    "nope_head_dim": 12,
    "value_head_dim": 10,
}


def test_absent_sizes_are_derived_from_the_given_ones() -> None:
    shape = ModelShape(**SMALL)
    assert (shape.kv_heads, shape.head_dim, shape.ffn_hidden) == (4, 16, 256)
    assert not shape.qkv_bias
    gpt = ModelShape(**SMALL, activation="gelu", bias=True)
    assert (gpt.ffn_hidden, gpt.qkv_bias) == (256, True)


# Llama 2's own widths (7B and 13B), which its multiple of 256 produces.
@pytest.mark.parametrize(("hidden", "ffn_hidden"), [(4096, 11008), (5120, 13824), (384, 1024)])
def test_swiglu_width_follows_llama_2(hidden: int, ffn_hidden: int) -> None:
    assert ModelShape(**SMALL | {"hidden": hidden}).ffn_hidden == ffn_hidden


@given(
    heads=st.integers(1, 64),
    head_dim=st.integers(1, 128).map(lambda half: 2 * half),
    activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    positions=st.sampled_from(["learned", "rope"]),
    flags=st.tuples(*[st.booleans()] * 3),
)
def test_a_dumped_shape_is_explicit_and_reads_back_equal(
    heads: int, head_dim: int, activation: Any, positions: Any, flags: tuple[bool, bool, bool]
) -> None:
    shape = ModelShape(
        layers=3,
        hidden=heads * head_dim,
        heads=heads,
        vocab=11,
        activation=activation,
        positions=positions,
        bias=flags[0],
        tied=flags[1],
        experts=ExpertShape(count=4, top_k=2, ffn_hidden=32) if flags[2] else None,
        rope_scaling=RopeScaling() if positions == "rope" else None,
    )
    table = shape.model_dump(exclude_none=True)
    assert {"kv_heads", "head_dim", "ffn_hidden", "qkv_bias"} <= set(table)
    assert ModelShape(**table) == shape
    assert pickle.loads(pickle.dumps(shape)) == shape


def test_overriding_what_was_written_derives_the_rest_again() -> None:
    written = ModelShape(**SMALL).model_dump(exclude_unset=True)
    assert written == SMALL
    assert ModelShape(**written | {"hidden": 128}).head_dim == 32


IMPOSSIBLE: list[tuple[dict[str, Any], str, str]] = [
    ({"heads": 5}, "64 / 5 = 12.80", "heads = 4, hidden = 65"),
    ({"heads": 6, "head_dim": 16, "kv_heads": 4}, "6 / 4 = 1.50", "kv_heads = 3"),
    ({"kv_heads": 8}, "4 / 8 = 0.50", "kv_heads = 4"),
    ({"head_dim": 15}, "15 is odd", "head_dim = 16 or 14"),
    ({"layers": 0}, "at least 1", "layers = 1"),
    ({"vocab": -7}, "at least 1", "vocab = 1"),
    ({"norm_eps": -1e-5}, "greater than 0", "norm_eps = 1e-05"),
    ({"positions": "learned", "rope_scaling": {}}, "only rotary", "leave out"),
    ({"rope_scaling": {"low_frequency_factor": 4.0}}, "4 >= 4", "high_frequency_factor = 16"),
    ({"experts": {"count": 4, "top_k": 5, "ffn_hidden": 8}}, "5 > 4", "top_k = 4, or count = 5"),
    ({"experts": {"count": 0, "top_k": 1, "ffn_hidden": 8}}, "at least 1", "count = 1"),
    (
        {"experts": {"count": 4, "top_k": 1, "ffn_hidden": 8, "normalise": True}},
        "a lone score divided by itself is 1",
        "normalise = false",
    ),
    (
        {"experts": {"count": 4, "top_k": 2, "ffn_hidden": 8, "bias_rate": -0.1}},
        "at least 0",
        "bias_rate = 0",
    ),
    (
        {"experts": {"count": 4, "top_k": 2, "ffn_hidden": 8, "first_dense_layers": 2}},
        "2 >= 2",
        "first_dense_layers = 1",
    ),
    ({"latent_attention": LATENT, "head_dim": 24}, "12 + 4 = 16", "head_dim = 16"),
    ({"latent_attention": LATENT, "kv_heads": 2}, "its own key", "kv_heads = 4"),
    ({"latent_attention": LATENT | {"rope_head_dim": 3}}, "3 is odd", "rope_head_dim = 4 or 2"),
]


@pytest.mark.parametrize(("change", "arithmetic", "remedy"), IMPOSSIBLE)
def test_an_impossible_shape_says_the_arithmetic_and_the_nearest_choice(
    change: dict[str, Any], arithmetic: str, remedy: str
) -> None:
    with pytest.raises(ModelError) as caught:
        ModelShape(**SMALL | change)
    assert arithmetic in caught.value.rule
    assert remedy in caught.value.remedy


@given(heads=st.integers(1, 64), kv_heads=st.integers(1, 64), hidden=st.integers(1, 512))
def test_the_nearest_choices_offered_are_valid(heads: int, kv_heads: int, hidden: int) -> None:
    """Taking the offered heads, or hidden, or kv_heads, is met with no further complaint."""
    table: dict[str, Any] = {
        "layers": 1,
        "vocab": 9,
        "heads": heads,
        "hidden": hidden,
        "positions": "learned",
    }
    choices = [table]
    try:
        ModelShape(**table)
    except ModelError as error:
        offers = re.findall(r"(heads|hidden) = (\d+)", error.remedy)
        choices = [table | {key: int(value)} for key, value in offers]
        assert len(choices) == 2
    for choice in choices:
        assert ModelShape(**choice).kv_heads == choice["heads"]
        try:
            ModelShape(**choice, kv_heads=kv_heads)
        except ModelError as error:
            assert ModelShape(**choice, kv_heads=int(error.remedy.removeprefix("kv_heads = ")))


@pytest.mark.parametrize("key", ["layer", "experts.topk"])
def test_unknown_keys_are_refused(key: str) -> None:
    table: dict[str, Any] = SMALL | {"experts": {"count": 4, "top_k": 2, "ffn_hidden": 8}}
    inner = table["experts"] if "." in key else table
    inner[key.rpartition(".")[2]] = 1
    with pytest.raises(ValidationError, match="Extra inputs"):
        ModelShape(**table)


def test_every_field_says_what_it_is() -> None:
    for table in (ModelShape, RopeScaling, ExpertShape, LatentAttentionShape):
        assert [n for n, field in table.model_fields.items() if not field.description] == []


def test_a_shape_is_frozen() -> None:
    shape = ModelShape(**SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        shape.layers = 3
