"""The decoder: the GPT-2 and GPT-3 family and the Llama family, and no parallelism.

Axes: B batch, L sequence, D hidden, N query heads, K key/value heads, H head_dim, F ffn_hidden,
V vocab. Under tensor parallelism N, K, F and V are this rank's part: head counts are read off the
tensors, so a sharded projection works unchanged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ridgeline.errors import ModelError
from ridgeline.model.experts import MixtureOfExperts
from ridgeline.model.shape import ModelShape

TensorRule = Literal[
    "vocabulary", "positions", "sequence", "gather", "columns", "heads", "rows", "logits", "parts"
]
"""How a module is divided over the tensor axis (arXiv:1909.08053, 2205.05198):

vocabulary  an embedding by its rows; its output is divided along the sequence
positions   an embedding kept whole, looked up for this rank's part of the sequence
sequence    kept whole, and applied to this rank's part of the sequence
gather      no weights of its own: gathers the sequence for the modules within
columns     a linear layer by its outputs: whole sequence in, this rank's features out
heads       kept whole, and applied to this rank's heads (B, L, heads, H)
rows        a linear layer by its inputs; its output is summed and divided along the sequence
logits      as columns, from a part of the sequence; the logits stay divided by vocabulary
parts       kept whole, and takes its own part of its weights' gradients (`experts.here`)
"""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over (q_BLNH, k_BLKH, v_BLKH), giving (B, L, N, H)."""


class Rope:
    """Rotary positions (arXiv:2104.09864): element i of a head turns with element i + H/2.

    cos and sin are (L, 1, H), float32; sin carries the sign of the element it multiplies.
    A plain class, because sharded data parallelism casts every floating tensor it finds in a
    block's arguments (tuples, dicts and dataclasses included) to the training precision, and bf16
    has too few digits for angles.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def rotate(self, x_BLNH: Tensor) -> Tensor:
        """Each position's vectors turned by its angles; computed in float32, dtype kept."""
        swapped_BLNH = x_BLNH.roll(x_BLNH.shape[-1] // 2, -1)
        return torch.addcmul(x_BLNH * self.cos, swapped_BLNH, self.sin).to(x_BLNH.dtype)


def make_rope(shape: ModelShape, positions_L: Tensor) -> Rope:
    """The angles of these positions, with Llama-3's scaling where the shape asks for it.

    Computed once per forward pass: there is no buffer that a meta build or a cast could spoil.
    """
    exponents = torch.arange(0, shape.head_dim, 2, device=positions_L.device) / shape.head_dim
    frequencies = shape.rope_theta**-exponents
    if scaling := shape.rope_scaling:
        turns = scaling.original_max_sequence * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = torch.outer(positions_L.float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return Rope(torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None])


def make_norm(shape: ModelShape) -> nn.Module:
    """LayerNorm or RMSNorm over the residual stream."""
    kind = nn.LayerNorm if shape.norm == "layernorm" else nn.RMSNorm
    return kind(shape.hidden, eps=shape.norm_eps)


def causal_attention(q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor) -> Tensor:
    """Each position's mixture (B, L, N, H) of the values of positions up to its own."""
    mixed_BNLH = functional.scaled_dot_product_attention(
        q_BLNH.transpose(1, 2),
        k_BLKH.transpose(1, 2),
        v_BLKH.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BLNH.shape[2] != k_BLKH.shape[2],
    )
    return mixed_BNLH.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention: multi-head, or grouped-query when kv_heads < heads.

    `mix` does the attention itself; where a sequence is divided over ranks another takes its place.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q = nn.Linear(shape.hidden, query, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.hidden, key, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.hidden, key, bias=shape.qkv_bias)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else None
        self.out = nn.Linear(query, shape.hidden, bias=shape.bias)
        self.mix: Mix = causal_attention

    def forward(self, x_BLD: Tensor, rope: Rope | None) -> Tensor:
        B, L, _ = x_BLD.shape
        q_BLNH = self.q(x_BLD).view(B, L, -1, self.head_dim)
        k_BLKH = self.k(x_BLD).view(B, L, -1, self.head_dim)
        v_BLKH = self.v(x_BLD).view(B, L, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNH, k_BLKH = self.q_norm(q_BLNH), self.k_norm(k_BLKH)
        if rope is not None:
            q_BLNH, k_BLKH = rope.rotate(q_BLNH), rope.rotate(k_BLKH)
        out_BLD: Tensor = self.out(self.mix(q_BLNH, k_BLKH, v_BLKH).flatten(2))
        return out_BLD


class MLP(nn.Module):
    """up, GELU, down; or SwiGLU (arXiv:2002.05202): SiLU(gate) * up, down."""

    def __init__(self, shape: ModelShape, ffn_hidden: int) -> None:
        super().__init__()
        gated = shape.activation == "swiglu"
        self.gelu = "tanh" if shape.activation == "gelu_tanh" else "none"
        self.gate = nn.Linear(shape.hidden, ffn_hidden, bias=shape.bias) if gated else None
        self.up = nn.Linear(shape.hidden, ffn_hidden, bias=shape.bias)
        self.down = nn.Linear(ffn_hidden, shape.hidden, bias=shape.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLF = self.up(x_BLD)
        if self.gate is None:
            h_BLF = functional.gelu(h_BLF, approximate=self.gelu)
        else:
            h_BLF = functional.silu(self.gate(x_BLD)) * h_BLF
        out_BLD: Tensor = self.down(h_BLF)
        return out_BLD


def make_mlp(shape: ModelShape, layer: int) -> nn.Module:
    """The MLP of block `layer`, or the mixture of experts in its place."""
    experts = shape.experts_at(layer)
    if experts is None:
        return MLP(shape, shape.ffn_hidden)
    shared = MLP(shape, experts.shared * experts.ffn_hidden) if experts.shared else None
    return MixtureOfExperts(shape, experts, shared)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(shape)
        self.attention = Attention(shape)
        self.mlp_norm = make_norm(shape)
        self.mlp = make_mlp(shape, layer)

    def forward(self, x_BLD: Tensor, rope: Rope | None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope)
        out_BLD: Tensor = x_BLD + self.mlp(self.mlp_norm(x_BLD))
        return out_BLD


class Decoder(nn.Module):
    """Tokens in, logits out.

    A pipeline stage is cut from it by setting `embedding` and `positions`, or `norm` and `head`, to
    None and deleting blocks: what is None is skipped, so the input or output is hidden states, and
    the remaining parameters keep their names. Build it on the meta device to allocate nothing, then
    `to_empty(device=...)` and `initialise(seed)`.
    """

    tensor_parallel: ClassVar[dict[str, TensorRule]] = {
        "embedding": "vocabulary",
        "positions": "positions",
        "blocks.*.attention_norm": "sequence",
        "blocks.*.attention": "gather",
        "blocks.*.attention.[qkv]": "columns",
        "blocks.*.attention.[qk]_norm": "heads",
        "blocks.*.attention.out": "rows",
        "blocks.*.mlp_norm": "sequence",
        "blocks.*.mlp.router": "parts",
        "blocks.*.mlp.experts.*": "parts",
        "blocks.*.mlp.shared": "gather",
        "blocks.*.mlp": "gather",
        "blocks.*.gate": "columns",
        "blocks.*.up": "columns",
        "blocks.*.down": "rows",
        "norm": "sequence",
        "head": "logits",
    }
    """What tensor parallelism does to each module; a block of one's own names its own."""

    def __init__(self, shape: ModelShape) -> None:
        """Raises ModelError for latent attention, which can only be planned."""
        super().__init__()
        if shape.latent_attention is not None:
            raise ModelError(
                f"train {shape.name}, which has latent_attention",
                "a shape with latent_attention can be planned but not yet trained",
                "ordinary heads: leave out [model.latent_attention]",
            )
        self.shape = shape
        learned = shape.positions == "learned"
        self.embedding: nn.Embedding | None = nn.Embedding(shape.vocab, shape.hidden)
        self.positions = nn.Embedding(shape.max_sequence, shape.hidden) if learned else None
        self.blocks = nn.ModuleDict({str(n): Block(shape, n) for n in range(shape.layers)})
        self.norm: nn.Module | None = make_norm(shape)
        self.head: nn.Linear | None = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self._tie()

    def forward(self, tokens_BL: Tensor, positions_L: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of the token after each position, in the precision of the weights.

        `positions_L` says where in the sequence the tokens stand; default: 0 to L-1.
        """
        if positions_L is None:
            positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        rope = make_rope(self.shape, positions_L) if self.shape.positions == "rope" else None
        x_BLD = tokens_BL
        if self.embedding is not None:
            x_BLD = self.embedding(tokens_BL)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(positions_L)
        for block in self.blocks.values():
            x_BLD = block(x_BLD, rope)
        if self.norm is not None:
            x_BLD = self.norm(x_BLD)
        return x_BLD if self.head is None else self.head(x_BLD)

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer with its initial value, and tie the head again (a move
        off the meta device unties it)."""
        self._tie()
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        with torch.no_grad():
            for name, value in self.initial_values(seed):
                tensors[name].copy_(value)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name and whole initial value, on the CPU.

        Weights are normal(0, init_std), those that write to the residual stream scaled by
        1 / sqrt(2 layers) (GPT-2's report, section 2.3); norms are 1, biases and buffers 0. A value
        depends on seed, name and shape alone, so every layout, device and order starts from the
        same model; a tied head is named as the embedding.
        """
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if parameter.dim() == 1:
                yield name, value.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            residual = name.endswith(("out.weight", "down.weight"))
            std = self.shape.init_std / (math.sqrt(2 * self.shape.layers) if residual else 1.0)
            key = "embedding.weight" if self.shape.tied and name == "head.weight" else name
            digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            yield name, value.normal_(0.0, std, generator=generator)
        for name, buffer in self.named_buffers():
            yield name, torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")

    def _tie(self) -> None:
        if self.shape.tied and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight
