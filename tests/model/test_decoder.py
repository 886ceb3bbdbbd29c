"""The decoder by itself: initial weights, causality, stages, precision."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ridgeline.errors import ModelError
from ridgeline.model import catalogue
from ridgeline.model.decoder import Decoder, Rope, make_rope
from ridgeline.model.shape import ModelShape, RopeScaling

LLAMA = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, vocab=97, max_sequence=32)
GPT = ModelShape(
    layers=2, hidden=64, heads=4, vocab=97, max_sequence=32, positions="learned", bias=True,
    norm="layernorm", activation="gelu_tanh", tied=True,
)  # fmt: skip
QWEN = LLAMA.model_copy(update={"qk_norm": True, "qkv_bias": True})


def built(shape: ModelShape, seed: int = 3) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(shape)
    decoder.to_empty(device="cpu")
    decoder.initialise(seed)
    return decoder


def some_tokens(shape: ModelShape, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, shape.vocab, (2, length), generator=generator)


@pytest.mark.parametrize("shape", [LLAMA, GPT, QWEN])
def test_a_later_token_changes_no_earlier_logit(shape: ModelShape) -> None:
    decoder = built(shape)
    tokens_BL = some_tokens(shape)
    changed_BL = tokens_BL.clone()
    changed_BL[:, 9] = (changed_BL[:, 9] + 1) % shape.vocab
    before, after = decoder(tokens_BL), decoder(changed_BL)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).gt(1e-4).all()


@pytest.mark.parametrize("shape", [LLAMA, GPT])
def test_initial_weights_depend_on_seed_and_name_alone(shape: ModelShape) -> None:
    torch.manual_seed(1)
    direct = Decoder(shape)
    direct.initialise(3)
    from_meta = built(shape, seed=3)
    whole = dict(direct.named_parameters())
    assert [n for n, p in from_meta.named_parameters() if not torch.equal(p, whole[n])] == []

    stage = Decoder(shape)  # the last of two pipeline stages
    stage.embedding = stage.positions = None
    del stage.blocks["0"]
    stage.initialise(3)
    for name, parameter in stage.named_parameters():
        original = "embedding.weight" if shape.tied and name == "head.weight" else name
        assert torch.equal(parameter, whole[original]), name

    other = dict(built(shape, seed=4).named_parameters())
    assert not torch.equal(other["blocks.0.mlp.up.weight"], whole["blocks.0.mlp.up.weight"])
    assert not torch.equal(whole["blocks.1.mlp.up.weight"], whole["blocks.0.mlp.up.weight"])


def test_initial_weights_have_the_stated_spread() -> None:
    shape = GPT.model_copy(update={"hidden": 256, "head_dim": 64, "ffn_hidden": 1024, "layers": 8})
    weights = dict(Decoder(shape).initial_values(0))
    for name, expected in {
        "embedding.weight": 0.02,
        "blocks.3.attention.q.weight": 0.02,
        "blocks.3.attention.out.weight": 0.02 / math.sqrt(16),
        "blocks.7.mlp.down.weight": 0.02 / math.sqrt(16),
    }.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.03), name
    assert weights["blocks.0.mlp.up.bias"].eq(0).all()
    assert weights["blocks.0.mlp_norm.weight"].eq(1).all()
    assert weights["blocks.0.mlp_norm.bias"].eq(0).all()


def test_a_tied_head_is_the_embedding_also_after_a_meta_build() -> None:
    decoder = built(GPT)
    assert decoder.head is not None and decoder.embedding is not None
    assert decoder.head.weight is decoder.embedding.weight
    assert "head.weight" not in dict(decoder.named_parameters())


@pytest.mark.parametrize("shape", [LLAMA, GPT])
def test_two_stages_in_a_row_are_the_whole(shape: ModelShape) -> None:
    whole = built(shape)
    first, last = copy.deepcopy(whole), copy.deepcopy(whole)
    first.norm = first.head = None
    del first.blocks["1"]
    last.embedding = last.positions = None
    del last.blocks["0"]
    tokens_BL = some_tokens(shape)
    assert torch.equal(last(first(tokens_BL)), whole(tokens_BL))


def test_heads_are_counted_on_the_tensors() -> None:
    """Half the heads of every projection, added up over both halves, is the whole attention."""
    attention = built(LLAMA).blocks["0"].get_submodule("attention")
    x_BLD = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    rope = make_rope(LLAMA, torch.arange(8))
    total = torch.zeros_like(x_BLD)
    for half in (0, 1):
        part = copy.deepcopy(attention)
        for name in ("q", "k", "v", "out"):
            weight = part.get_parameter(f"{name}.weight")
            weight.data = weight.data.chunk(2, dim=1 if name == "out" else 0)[half].contiguous()
        total += part(x_BLD, rope)
    torch.testing.assert_close(total, attention(x_BLD, rope), rtol=1e-5, atol=1e-6)


def test_bf16_keeps_the_angles_in_float32() -> None:
    """At position 30,000 a bf16 angle would be wrong by tens of radians; a rotated bf16 vector is
    off by its own rounding alone."""
    last = make_rope(LLAMA, torch.tensor([30_000]))
    x_BLNH = torch.randn(1, 1, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = last.rotate(x_BLNH.double())
    assert last.rotate(x_BLNH).dtype == torch.bfloat16
    torch.testing.assert_close(last.rotate(x_BLNH).double(), exact, rtol=2**-8, atol=2**-9)
    assert last.cos.dtype == torch.float32


def test_sharding_in_bf16_leaves_the_angles_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: set[torch.dtype] = set()
    rotate = Rope.rotate

    def spy(rope: Rope, x_BLNH: Tensor) -> Tensor:
        seen.update((rope.cos.dtype, x_BLNH.dtype))
        return rotate(rope, x_BLNH)

    monkeypatch.setattr(Rope, "rotate", spy)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        decoder = built(LLAMA)
        for module in (*decoder.blocks.values(), decoder):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
        decoder(some_tokens(LLAMA))
    finally:
        dist.destroy_process_group()
    assert seen == {torch.float32, torch.bfloat16}


def test_llama_3_scaling_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    scaled = LLAMA.model_copy(
        update={"head_dim": 128, "rope_theta": 5e5, "rope_scaling": RopeScaling(factor=8.0)}
    )
    plain = scaled.model_copy(update={"rope_scaling": None})
    one = torch.tensor([1])
    angle, original = (make_rope(s, one).sin[0, 0, 64:].asin() for s in (scaled, plain))
    assert angle[0] == original[0]
    assert (original[-1] / angle[-1]).item() == pytest.approx(8.0, rel=1e-4)
    assert (original / angle).diff().ge(-1e-3).all()


@pytest.mark.parametrize("shape", [LLAMA, GPT])
def test_positions_say_where_tokens_stand(shape: ModelShape) -> None:
    """Without them tokens stand at the front; one token sees nothing but itself and its place."""
    decoder = built(shape)
    tokens_BL = some_tokens(shape)
    asked = decoder(tokens_BL, torch.arange(16))
    assert torch.equal(asked, decoder(tokens_BL))
    moved = decoder(tokens_BL, torch.arange(16) + 7)
    if shape.positions == "learned":
        assert (moved - asked).abs().amax(-1).gt(1e-4).all()
    else:  # rotations leave what depends on distances alone
        torch.testing.assert_close(moved, asked, rtol=0, atol=1e-5)
        stretched = decoder(tokens_BL, torch.arange(16) * 2)
        assert (stretched - asked).abs().amax(-1)[:, 2:].gt(1e-5).all()


def test_bf16_logits_stay_near_those_of_float32() -> None:
    decoder = built(LLAMA)
    tokens_BL = some_tokens(LLAMA)
    exact = decoder(tokens_BL)
    rounded = copy.deepcopy(decoder).bfloat16()(tokens_BL)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_what_can_only_be_planned_is_refused() -> None:
    shape = catalogue.entry("deepseek-v3").shape
    with torch.device("meta"), pytest.raises(ModelError, match="planned but not yet trained"):
        Decoder(shape)
