"""With the same weights, logits and gradients are those of `transformers`: float32, 1e-5."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ModelShape, RopeScaling

LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    **{name: f"{name}_proj" for name in ("q", "k", "v", "gate", "up", "down")},
    "out": "o_proj",
}
GPT2_NAMES = {
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def llama_name(name: str) -> str:
    """The name that Llama, Qwen2 and Qwen3 give to a parameter of ours."""
    if not name.startswith("blocks."):
        return LLAMA_NAMES[name]
    _, layer, *parts = name.split(".")
    return ".".join(["model.layers", layer, *(LLAMA_NAMES.get(part, part) for part in parts)])


def gpt2_tensors(theirs: dict[str, Tensor], ours: Decoder) -> dict[str, Tensor]:
    """GPT-2's tensors (weights or gradients) under our names: it keeps matrices transposed, and q,
    k and v in one."""
    found = {}
    for name, _ in ours.named_parameters():
        if not name.startswith("blocks."):
            top = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
            module, kind = name.split(".")
            found[name] = theirs[f"transformer.{top[module]}.{kind}"]
            continue
        _, layer, inner = name.split(".", 2)
        module, kind = inner.rsplit(".", 1)
        prefix = f"transformer.h.{layer}"
        if match := re.fullmatch(r"attention\.([qkv])", module):
            joint = theirs[f"{prefix}.attn.c_attn.{kind}"]
            tensor = joint.chunk(3, dim=-1)["qkv".index(match[1])]
        else:
            tensor = theirs[f"{prefix}.{GPT2_NAMES[module]}.{kind}"]
        found[name] = tensor.T if tensor.dim() == 2 else tensor
    return found


def llama_tensors(theirs: dict[str, Tensor], ours: Decoder) -> dict[str, Tensor]:
    return {name: theirs[llama_name(name)] for name, _ in ours.named_parameters()}


def randomise(model: nn.Module) -> None:
    """Weights far from their initial values, so that norms and biases count too."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def assert_same_model(theirs: Any, shape: ModelShape, tensors: Any, length: int) -> None:
    randomise(theirs)
    ours = Decoder(shape)
    ours.load_state_dict(tensors(dict(theirs.named_parameters()), ours), strict=not shape.tied)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    generator = torch.Generator().manual_seed(12)
    tokens_BL = torch.randint(0, shape.vocab, (2, length), generator=generator)

    ours_BLV, theirs_BLV = ours(tokens_BL), theirs(input_ids=tokens_BL).logits
    torch.testing.assert_close(ours_BLV, theirs_BLV, rtol=1e-5, atol=1e-5)
    for logits_BLV in (ours_BLV, theirs_BLV):
        loss = cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())
        torch.autograd.backward(loss)
    expected = tensors({n: p.grad for n, p in theirs.named_parameters()}, ours)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        # Adding a bias to every key changes no softmax: its gradient is rounding alone.
        scale = 1.0 if name.endswith("k.bias") else float(expected[name].norm())
        assert float((parameter.grad - expected[name]).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize(("activation", "theirs"), [("gelu_tanh", "gelu_new"), ("gelu", "gelu")])
def test_gpt2(activation: Any, theirs: str) -> None:
    config = GPT2Config(
        vocab_size=61, n_positions=24, n_embd=48, n_layer=3, n_head=4, activation_function=theirs,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    shape = ModelShape(
        layers=3, hidden=48, heads=4, vocab=61, max_sequence=24, positions="learned", bias=True,
        norm="layernorm", activation=activation, tied=True,
    )  # fmt: skip
    assert_same_model(GPT2LMHeadModel(config), shape, gpt2_tensors, length=24)


SCALING = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "vocab": 61, "hidden": 48, "ffn_hidden": 80, "layers": 3, "max_sequence": 128,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "scaled", "tied"),
    [(4, 4, False, False), (6, 2, False, True), (4, 1, True, False)],
)
def test_llama(heads: int, kv_heads: int, scaled: bool, tied: bool) -> None:
    config = LlamaConfig(
        **SIZES, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        rope_parameters=SCALING if scaled else PLAIN,
    )  # fmt: skip
    scaling = RopeScaling(factor=4.0, original_max_sequence=32) if scaled else None
    shape = ModelShape(**SHAPE, heads=heads, kv_heads=kv_heads, tied=tied, rope_scaling=scaling)
    assert_same_model(LlamaForCausalLM(config), shape, llama_tensors, length=100)


def test_qwen2_with_biases_on_queries_keys_and_values() -> None:
    config = Qwen2Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        rope_parameters=PLAIN,
    )  # fmt: skip
    shape = ModelShape(**SHAPE, heads=4, kv_heads=2, qkv_bias=True)
    assert_same_model(Qwen2ForCausalLM(config), shape, llama_tensors, length=40)


def test_qwen3_with_norms_on_queries_and_keys_and_wide_heads() -> None:
    config = Qwen3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_parameters=PLAIN,
        tie_word_embeddings=False,
    )  # fmt: skip
    shape = ModelShape(**SHAPE, heads=4, kv_heads=2, head_dim=32, qk_norm=True)
    assert_same_model(Qwen3ForCausalLM(config), shape, llama_tensors, length=40)


def test_bf16_rmsnorm_is_that_of_llama() -> None:
    """Ours rounds once, theirs twice (before the gain and after): within two roundings of bf16."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(1)
    x_BLD = (3 * torch.randn(2, 8, 256, generator=generator)).bfloat16()
    gain_D = (1 + 0.1 * torch.randn(256, generator=generator)).bfloat16()
    ours, theirs = nn.RMSNorm(256, eps=1e-5), LlamaRMSNorm(256, eps=1e-5)
    for norm in (ours, theirs):
        norm.bfloat16().weight.data.copy_(gain_D)
    torch.testing.assert_close(ours(x_BLD), theirs(x_BLD), rtol=2 * 2**-8, atol=1e-5)
