"""Parameters and FLOPs against published figures, papers' formulas and PyTorch's own counter."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ridgeline.model import catalogue
from ridgeline.model.counts import (
    flops_per_token,
    layer_flops,
    layer_parameters,
    parameters,
)
from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ExpertShape, LatentAttentionShape, ModelShape

NAMES = catalogue.names()
TRAINABLE = [name for name in NAMES if not catalogue.entry(name).shape.latent_attention]
# Published under the name of the model whose depth and width it takes: 64.9e9 by its own config.
MISNAMED = {"gigagpt-70b": 64_861_528_064}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "laptop"])
def test_count_agrees_with_the_published_one_to_its_last_digit(name: str) -> None:
    entry = catalogue.entry(name)
    published = entry.published_parameters
    assert published is not None
    total = parameters(entry.shape).total
    if name in MISNAMED:
        assert total == MISNAMED[name]
        return
    exponent = published.as_tuple().exponent
    assert isinstance(exponent, int)
    assert abs(total - published) <= Decimal(1).scaleb(exponent) / 2


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("megatron")])
def test_count_is_the_formula_of_the_megatron_paper(name: str) -> None:
    # arXiv:2104.04473 equation 2, P = 12 l h^2 (1 + 13/12h + (V+s)/12lh), omits the last norm.
    shape = catalogue.entry(name).shape
    l, h = shape.layers, shape.hidden  # noqa: E741 - the paper's symbols
    paper = 12 * l * h * h + 13 * l * h + (shape.vocab + shape.max_sequence) * h
    assert parameters(shape).total == paper + 2 * h


def test_mixtures_count_the_experts_a_token_visits() -> None:
    # Mixtral: "47B parameters, 13B active" (arXiv:2401.04088); DeepSeek-V3: "671B, 37B activated"
    # (arXiv:2412.19437). The released DeepSeek-V3 weights add 58 layers x 256 selection biases.
    mixtral = parameters(catalogue.entry("mixtral-8x7b").shape)
    assert (round(mixtral.total / 1e9), round(mixtral.active / 1e9)) == (47, 13)
    deepseek = parameters(catalogue.entry("deepseek-v3").shape)
    assert deepseek.total + 58 * 256 == 671_026_419_200
    assert int(deepseek.active / 1e9) == 37


def test_the_laptop_model_meets_the_main_jobs_minimum() -> None:
    assert parameters(catalogue.entry("laptop").shape).non_embedding == 5_311_104 >= 5_000_000


@pytest.mark.parametrize("name", TRAINABLE)
def test_count_is_that_of_the_decoder_itself(name: str) -> None:
    shape = catalogue.entry(name).shape
    # Every layer is alike: four of them show it, and keep the meta build quick.
    few = shape.model_copy(update={"layers": min(4, shape.layers)})
    with torch.device("meta"):
        decoder = Decoder(few)
    assert parameters(few).total == sum(p.numel() for p in decoder.parameters())
    more = parameters(shape).total - parameters(few).total
    assert more == (shape.layers - few.layers) * layer_parameters(shape, 0).total


def test_each_component_is_that_of_the_decoder() -> None:
    shape = ModelShape(
        layers=2, hidden=24, heads=4, kv_heads=2, vocab=50, max_sequence=9, positions="learned",
        bias=True, qk_norm=True, norm="layernorm",
    )  # fmt: skip
    counts = parameters(shape)
    sizes: dict[str, int] = {}
    for name, parameter in Decoder(shape).named_parameters():
        part = next(
            (p for p in ("norm", "attention", "mlp", "embedding", "positions") if p in name), "head"
        )
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    assert sizes == {
        "embedding": counts.embedding,
        "positions": counts.positions,
        "attention": counts.attention,
        "mlp": counts.mlp,
        "norm": counts.norms,
        "head": counts.head,
    }
    assert counts.non_embedding == counts.attention + counts.mlp + counts.norms


SHAPES = [
    ModelShape(layers=2, hidden=32, heads=4, kv_heads=2, vocab=64),
    ModelShape(layers=1, hidden=24, heads=3, head_dim=16, vocab=40, qk_norm=True, qkv_bias=True),
    ModelShape(
        layers=2, hidden=32, heads=4, vocab=48, positions="learned", norm="layernorm",
        activation="gelu_tanh", bias=True, tied=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape: ModelShape) -> None:
    batch, sequence = 2, 16
    decoder = Decoder(shape)
    tokens_BL = torch.zeros(batch, sequence, dtype=torch.long)
    expected = flops_per_token(shape, sequence, "full")
    # The CPU's flash attention has no entry in the counter; the plain one is counted in full.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            logits_BLV = decoder(tokens_BL)
        assert counter.get_total_flops() == batch * sequence * expected.forward.total
        with FlopCounterMode(display=False) as counter:
            logits_BLV.sum().backward()
        assert counter.get_total_flops() == batch * sequence * expected.backward.total


def test_causal_halves_the_scores_and_nothing_else() -> None:
    shape = SHAPES[0]
    full, causal = (layer_flops(shape, 0, 16, c) for c in ("full", "causal"))
    assert full.attention_scores == 2 * causal.attention_scores == 4 * 16 * 4 * 8
    assert full.total - full.attention_scores == causal.total - causal.attention_scores


@given(layers=st.integers(1, 9), heads=st.integers(1, 8), sequence=st.integers(1, 4096))
def test_dense_flops_are_six_per_matrix_parameter_and_the_scores(
    layers: int, heads: int, sequence: int
) -> None:
    # PaLM's appendix B (arXiv:2204.02311): 6 N + 12 L H Q T per token, N the matrices' parameters.
    shape = ModelShape(layers=layers, hidden=16 * heads, heads=heads, vocab=33)
    counts = parameters(shape)
    matrices = counts.total - counts.embedding - counts.norms
    palm = 6 * matrices + 12 * layers * heads * 16 * sequence
    assert flops_per_token(shape, sequence, "full").total == palm


def test_llama_405b_takes_the_published_flops() -> None:
    # "3.8 x 10^25 FLOPs on 15.6T text tokens" (arXiv:2407.21783), which is 6 N D.
    shape = catalogue.entry("llama3.1-405b").shape
    tokens = 15.6e12
    assert f"{6 * parameters(shape).total * tokens:.1e}" == "3.8e+25"
    # The scores of 8,192-token sequences come on top, less the embedding, which multiplies nothing.
    ratio = flops_per_token(shape, 8192, "causal").total * tokens / 3.8e25
    assert 1.0 < ratio < 1.06


def test_megatron_1t_step_matches_the_papers_formula() -> None:
    # arXiv:2104.04473 equation 3: 96 B s l h^2 (1 + s/6h + V/16lh) per step with recomputation,
    # four passes through the blocks and three through the head; ours is three through both.
    shape = catalogue.entry("megatron-1008b").shape
    s, l, h, v = 2048, shape.layers, shape.hidden, shape.vocab  # noqa: E741
    blocks = (96 * l * h * h + 16 * l * h * s) * 3 // 4
    assert flops_per_token(shape, s, "full").total == blocks + 6 * h * v


def test_a_mixture_counts_only_visited_experts_and_its_first_layers_dense() -> None:
    shape = ModelShape(
        layers=3, hidden=8, heads=2, vocab=10, ffn_hidden=20,
        experts=ExpertShape(count=6, top_k=2, ffn_hidden=5, shared=1, first_dense_layers=1),
    )  # fmt: skip
    forward = flops_per_token(shape, 4, "full").forward
    assert forward.mlp == 2 * 3 * 8 * 20
    assert forward.router == 2 * (2 * 8 * 6)
    assert forward.experts == 2 * (2 * 3 * 3 * 8 * 5)
    counts = parameters(shape)
    assert (counts.experts, counts.router, counts.mlp) == (2 * 7 * 120, 2 * 48, 480)
    assert counts.total - counts.active == 2 * 4 * 120


def test_latent_attention_by_hand() -> None:
    shape = ModelShape(
        layers=1, hidden=8, heads=2, head_dim=7, vocab=10,
        latent_attention=LatentAttentionShape(
            query_rank=6, kv_rank=4, rope_head_dim=2, nope_head_dim=5, value_head_dim=3
        ),
    )  # fmt: skip
    # down to 6, up to 2 x 7; down to 4 + 2, up to 2 x (5 + 3); out from 2 x 3
    matrices = 8 * 6 + 6 * 14 + 8 * 6 + 4 * 16 + 6 * 8
    counts = layer_parameters(shape, 0)
    assert (counts.attention, counts.norms) == (matrices, 2 * 8 + 6 + 4)
    flops = layer_flops(shape, 0, 16, "full")
    assert flops.attention_projections == 2 * matrices
    assert flops.attention_scores == 2 * 16 * 2 * 7 + 2 * 16 * 2 * 3
