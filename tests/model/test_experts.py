"""The mixture of experts against `transformers`, a loop over tokens, and the papers' formulas.

Axes: B batch, L sequence, D hidden, E experts, K experts that one token visits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from ridgeline.errors import ModelError
from ridgeline.model.counts import flops_per_token, layer_flops, parameters
from ridgeline.model.decoder import Decoder, make_mlp
from ridgeline.model.experts import MixtureOfExperts, permute
from ridgeline.model.shape import ExpertShape, ModelShape


def shape_of(activation: Any = "swiglu", **experts: Any) -> ModelShape:
    """Two layers; eight experts unless told otherwise."""
    table = {"count": 8, "top_k": 3, "ffn_hidden": 24, "balance_weight": 0.0} | experts
    return ModelShape(
        layers=2, hidden=16, heads=2, vocab=40, ffn_hidden=32, max_sequence=32,
        activation=activation, experts=ExpertShape(**table),
    )  # fmt: skip


def made(shape: ModelShape, seed: int = 1) -> MixtureOfExperts:
    """The mixture of the last layer, with weights large enough to route unevenly."""
    mixture = make_mlp(shape, shape.layers - 1)
    assert isinstance(mixture, MixtureOfExperts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixture


def some_input(batch: int = 3, length: int = 10, seed: int = 2) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


def test_mixtral() -> None:
    config = MixtralConfig(
        vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2,
        max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    shape = ModelShape(
        vocab=61, hidden=48, layers=3, heads=4, kv_heads=2, max_sequence=64,
        experts=ExpertShape(count=6, top_k=2, ffn_hidden=40, balance_weight=0.0),
    )  # fmt: skip
    torch.manual_seed(11)
    theirs, ours = MixtralForCausalLM(config), Decoder(shape)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = mixtral_tensors({n: p.detach() for n, p in theirs.named_parameters()})
    ours.initialise(0)
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert all(name.endswith("selection_bias") for name in missing) and not unexpected
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == parameters(shape).total

    tokens_BL = torch.randint(0, 61, (2, 40))
    ours_BLV, theirs_BLV = ours(tokens_BL), theirs(input_ids=tokens_BL).logits
    torch.testing.assert_close(ours_BLV, theirs_BLV, rtol=1e-5, atol=1e-5)
    for logits_BLV in (ours_BLV, theirs_BLV):
        loss = functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].ravel())
        torch.autograd.backward(loss)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    expected = mixtral_tensors(gradients)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        apart = (parameter.grad - expected[name]).norm()
        assert float(apart) <= 1e-5 * float(expected[name].norm()), name


def mixtral_tensors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's tensors (weights or gradients) under our names: it keeps gate and up in one."""
    names = {
        "model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head",
        "model.layers": "blocks", "input_layernorm": "attention_norm", "mlp.gate.": "mlp.router.",
        "post_attention_layernorm": "mlp_norm", "self_attn": "attention", "o_proj": "out",
        "_proj": "",
    }  # fmt: skip
    found = {}
    for name, tensor in theirs.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name.endswith("experts.gate_up"):
            gate, up = tensor.chunk(2, dim=1)
            found[name.replace("gate_up", "gate.weight")] = gate
            found[name.replace("gate_up", "up.weight")] = up
        else:
            found[f"{name}.weight" if name.endswith("experts.down") else name] = tensor
    return found


def one_token(mixture: MixtureOfExperts, x_D: Tensor) -> Tensor:
    """What one token gets, read off the papers: no sorting, no stacking, one expert at a time."""
    settings, experts = mixture.settings, mixture.experts
    logits_E = mixture.router.weight @ x_D
    scores_E = logits_E.sigmoid() if settings.routing == "sigmoid" else logits_E.softmax(0)
    chosen = (scores_E + mixture.selection_bias).topk(settings.top_k).indices.tolist()
    divisor = scores_E[chosen].sum() if settings.normalise else 1.0
    out_D = torch.zeros_like(x_D)
    for expert in chosen:
        h_F = experts.up.weight[expert] @ x_D
        if experts.gate is None:
            h_F = functional.gelu(h_F)
        else:
            h_F = functional.silu(experts.gate.weight[expert] @ x_D) * h_F
        weight = settings.scale * scores_E[expert] / divisor
        out_D = out_D + weight * (experts.down.weight[expert] @ h_F)
    return out_D if mixture.shared is None else out_D + mixture.shared(x_D)


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("activation", "shared"), [("swiglu", 2), ("gelu", 0)])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(
    routing: str, normalise: bool, activation: str, shared: int
) -> None:
    shape = shape_of(activation, routing=routing, normalise=normalise, shared=shared, scale=1.7)
    mixture = made(shape)
    x_BLD = some_input().requires_grad_()
    unbiased_BLD = mixture(x_BLD)
    mixture.selection_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    factor_BLD = some_input(seed=9)
    results = []
    for out_BLD in (
        mixture(x_BLD),
        torch.stack([one_token(mixture, x_D) for x_D in x_BLD.flatten(0, 1)]).view_as(x_BLD),
    ):
        inputs = [x_BLD, *mixture.parameters()]
        results.append((out_BLD, *torch.autograd.grad((out_BLD * factor_BLD).sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm())
    assert not torch.allclose(results[0][0], unbiased_BLD)  # the bias chose other experts


def test_no_token_is_dropped_when_all_want_the_same_expert() -> None:
    mixture = made(shape_of(top_k=1, scale=2.0))
    mixture.selection_bias[5] = 9.0
    x_BLD = some_input()
    mixture(x_BLD)
    assert mixture.visits.tolist() == [0, 0, 0, 0, 0, 30, 0, 0]
    one_D = one_token(mixture, x_BLD[2, 9])
    torch.testing.assert_close(mixture(x_BLD)[2, 9], one_D, rtol=1e-5, atol=1e-6)


def written_balance_loss(mixture: MixtureOfExperts, x_BLD: Tensor) -> Tensor:
    """Sum over sequences of L * sum_E f P, equations 17 to 20 of arXiv:2412.19437."""
    settings = mixture.settings
    total = torch.zeros(())
    for x_LD in x_BLD:
        logits_LE = x_LD @ mixture.router.weight.T
        sigmoid = settings.routing == "sigmoid"
        s_LE = logits_LE.sigmoid() if sigmoid else logits_LE.softmax(-1)
        chosen = s_LE.topk(settings.top_k).indices
        visits_E = torch.bincount(chosen.flatten(), minlength=settings.count)
        f_E = settings.count / (settings.top_k * len(x_LD)) * visits_E
        P_E = (s_LE / s_LE.sum(-1, keepdim=True)).mean(0)
        total = total + len(x_LD) * (f_E * P_E).sum()
    return total


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_the_auxiliary_loss_adds_the_gradient_of_its_formula(routing: str) -> None:
    """Also when the batch comes in two micro-batches."""
    mixture = made(shape_of(routing=routing, balance_weight=5.0, shared=1))
    plain = made(shape_of(routing=routing, shared=1))
    mixture.loss_scale = 1 / 30
    x_BLD = some_input()

    def gradients(module: nn.Module, part_BLD: Tensor) -> Tensor:
        x_BLD = part_BLD.detach().requires_grad_()
        module.zero_grad()
        torch.autograd.backward(module(x_BLD).square().sum() / 30)
        grads = [p.grad for p in (x_BLD, *module.parameters()) if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])

    x = x_BLD.clone().requires_grad_()
    loss = 5.0 / 30 * written_balance_loss(plain, x)
    inputs = [x, *plain.parameters()]
    written = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    added = torch.cat([grad.flatten() for grad in written])
    whole = gradients(mixture, x_BLD)
    torch.testing.assert_close(whole, gradients(plain, x_BLD) + added, rtol=1e-5, atol=1e-6)
    assert added.norm() > 1e-3 * whole.norm()

    inside = len(x_BLD.flatten())
    first, rest = gradients(mixture, x_BLD[:1]), gradients(mixture, x_BLD[1:])
    parameters_alone = first[inside // 3 :] + rest[2 * inside // 3 :]
    torch.testing.assert_close(parameters_alone, whole[inside:], rtol=1e-5, atol=1e-6)


def test_evaluation_counts_nothing_and_has_no_auxiliary_loss() -> None:
    mixture = made(shape_of(balance_weight=0.5))
    x_BLD = some_input()
    mixture.eval()
    silent = torch.autograd.grad(mixture(x_BLD).sum(), mixture.router.weight)[0]
    assert mixture.visits.sum() == 0
    mixture.train()
    told = torch.autograd.grad(mixture(x_BLD).sum(), mixture.router.weight)[0]
    assert mixture.visits.sum() == 30 * 3
    assert not torch.allclose(silent, told)


def test_bf16_routes_in_float32_and_stays_near() -> None:
    mixture = made(shape_of(shared=1))
    x_BLD = some_input()
    exact = mixture(x_BLD)
    for parameter in mixture.parameters():
        parameter.data = parameter.data.bfloat16()
    assert mixture.router(x_BLD.bfloat16()).dtype == torch.float32
    rounded = mixture(x_BLD.bfloat16())
    assert rounded.dtype == torch.bfloat16
    # A rounded score may choose another expert: most tokens agree, not all.
    apart_BL = (rounded.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert apart_BL.lt(0.03).float().mean() > 0.9


@given(rows=st.integers(0, 9), copies=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_permutation_has_the_gradient_of_indexing(rows: int, copies: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order_T = torch.randperm(rows * copies, generator=generator)
    x = torch.randn(rows, 5, generator=generator, requires_grad=True)
    factor = torch.randn(rows * copies, 5, generator=generator)
    ours, plain = permute(x, order_T, order_T.argsort(), copies), x[order_T // copies]
    assert torch.equal(ours, plain)
    gradients = [torch.autograd.grad((y * factor).sum(), x)[0] for y in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_counts_are_those_of_the_decoder_itself(activation: str) -> None:
    shape = shape_of(activation, shared=2, first_dense_layers=1)
    decoder = Decoder(shape)
    counts = parameters(shape)
    sizes = dict.fromkeys(("mlp", "router", "experts"), 0)
    for name, parameter in decoder.named_parameters():
        if ".mlp." in name:
            part = "mlp" if "blocks.0" in name else "router" if "router" in name else "experts"
            sizes[part] += parameter.numel()
    assert sizes == {"mlp": counts.mlp, "router": counts.router, "experts": counts.experts}
    assert counts.total == sum(p.numel() for p in decoder.parameters())


def test_flops_are_those_that_torch_counts() -> None:
    def grouped(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        """FLOPs of a product of each row of x by the matrix of its expert."""
        return int(2 * x[0] * x[1] * weight[-1])

    shape = shape_of(shared=2, first_dense_layers=1)
    decoder = Decoder(shape)
    mlps = [block.get_submodule("mlp") for block in decoder.blocks.values()]
    mapping = {torch.ops.aten._grouped_mm: grouped}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        for mlp in mlps:
            mlp(some_input())
    counts = flops_per_token(shape, 10, "full").forward
    assert counter.get_total_flops() == 30 * (counts.mlp + counts.router + counts.experts)
    assert layer_flops(shape, 1, 10, "full").mlp == 0


def test_initial_values_cover_stacked_weights_and_buffers() -> None:
    shape = shape_of(shared=1, ffn_hidden=64).model_copy(update={"hidden": 64, "head_dim": 32})
    with torch.device("meta"):
        decoder = Decoder(shape)
    decoder.to_empty(device="cpu")
    for buffer in decoder.buffers():
        buffer.fill_(7)
    decoder.initialise(3)
    values = dict(decoder.named_parameters())
    for name, expected in {
        "router.weight": 0.02,
        "experts.gate.weight": 0.02,
        "experts.up.weight": 0.02,
        "experts.down.weight": 0.02 / 2,  # sqrt(2 layers)
        "shared.up.weight": 0.02,
        "shared.down.weight": 0.02 / 2,
    }.items():
        spread = values[f"blocks.1.mlp.{name}"].std().item()
        assert spread == pytest.approx(expected, rel=0.1), name
    assert all(buffer.eq(0).all() for buffer in decoder.buffers())
    saved = {name for name in decoder.state_dict() if name not in values}
    assert saved == {f"blocks.{layer}.mlp.selection_bias" for layer in (0, 1)}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"bias": True, "qkv_bias": True}, "add no bias"),
        ({"hidden": 20, "head_dim": 10}, "20 = 24 - 4"),
        ({"experts": ExpertShape(count=4, top_k=2, ffn_hidden=12)}, "12 = 16 - 4"),
    ],
)
def test_what_grouped_products_cannot_take_is_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ModelError) as caught:
        Decoder(shape_of().model_copy(update=changes))
    assert rule in caught.value.rule
