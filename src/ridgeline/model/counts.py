"""Exact parameters and FLOPs of a shape, by component. No torch.

Symbols: D hidden, N query heads, K key/value heads, H head_dim, F ffn_hidden, V vocab, S sequence.

Conventions of the FLOPs: a matrix product of (m, k) by (k, n) is 2mnk; only matrix products count
(not norms, activations, softmax, rotation, or the embedding's look-up); the backward pass is twice
the forward, one product for the gradient of each factor; recomputation is never included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ridgeline.model.shape import ModelShape

Convention = Literal["causal", "full"]
"""Attention scores per token over half the sequence ("causal") or over all of it ("full").

"full" is PaLM's (arXiv:2204.02311, appendix B) and most papers'; "causal" leaves out the half that
the mask discards. Half is S/2, not the exact (S+1)/2.
"""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by component."""

    embedding: int = 0
    positions: int = 0
    attention: int = 0
    mlp: int = 0
    """MLPs of dense layers."""
    router: int = 0
    experts: int = 0
    """All experts, routed and shared."""
    norms: int = 0
    head: int = 0
    """0 when tied to the embedding."""
    idle_experts: int = 0
    """The part of `experts` that one token does not visit; not a component of its own."""

    @property
    def total(self) -> int:
        """All parameters, each once."""
        return (
            self.embedding
            + self.positions
            + self.attention
            + self.mlp
            + self.router
            + self.experts
            + self.norms
            + self.head
        )

    @property
    def non_embedding(self) -> int:
        """Total without token embedding, learned positions and head (arXiv:2001.08361's N)."""
        return self.total - self.embedding - self.positions - self.head

    @property
    def active(self) -> int:
        """Total without the experts that a token does not visit."""
        return self.total - self.idle_experts

    def __add__(self, other: ParameterCounts) -> ParameterCounts:
        return ParameterCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs per token by component, of one pass."""

    attention_projections: int = 0
    attention_scores: int = 0
    """Queries by keys, and weights by values."""
    mlp: int = 0
    """MLPs of dense layers."""
    router: int = 0
    experts: int = 0
    """The routed experts that a token visits, and the shared ones."""
    head: int = 0

    @property
    def total(self) -> int:
        """All components."""
        attention = self.attention_projections + self.attention_scores
        return attention + self.mlp + self.router + self.experts + self.head

    def __add__(self, other: FlopCounts) -> FlopCounts:
        return FlopCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of training on one token."""

    forward: FlopCounts

    @property
    def backward(self) -> FlopCounts:
        """Twice the forward."""
        return self.forward + self.forward

    @property
    def total(self) -> int:
        """Forward and backward."""
        return 3 * self.forward.total


def parameters(shape: ModelShape) -> ParameterCounts:
    """Exact parameters of the whole model.

    The router's selection bias (one number per routed expert, moved by a rule and not by a
    gradient) and DeepSeek-V3's extra prediction layer are not counted.
    """
    counts = ParameterCounts(
        embedding=shape.vocab * shape.hidden,
        positions=shape.max_sequence * shape.hidden if shape.positions == "learned" else 0,
        norms=_norm(shape),
        head=0 if shape.tied else shape.vocab * shape.hidden,
    )
    for layer in range(shape.layers):
        counts += layer_parameters(shape, layer)
    return counts


def layer_parameters(shape: ModelShape, layer: int) -> ParameterCounts:
    """Exact parameters of block `layer`, counted from 0."""
    attention = _attention_matrices(shape)
    norms = 2 * _norm(shape)
    if shape.latent_attention:
        norms += shape.latent_attention.query_rank + shape.latent_attention.kv_rank
    if shape.qk_norm:
        norms += 2 * shape.head_dim
    if shape.qkv_bias:
        attention += (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if shape.bias:
        attention += shape.hidden
    experts = shape.experts_at(layer)
    if experts is None:
        return ParameterCounts(attention=attention, norms=norms, mlp=_mlp(shape, shape.ffn_hidden))
    each = _mlp(shape, experts.ffn_hidden)
    return ParameterCounts(
        attention=attention,
        norms=norms,
        router=shape.hidden * experts.count,
        experts=(experts.count + experts.shared) * each,
        idle_experts=(experts.count - experts.top_k) * each,
    )


def flops_per_token(shape: ModelShape, sequence: int, convention: Convention) -> TokenFlops:
    """FLOPs of training on one token within sequences of `sequence` tokens."""
    forward = FlopCounts(head=2 * shape.hidden * shape.vocab)
    for layer in range(shape.layers):
        forward += layer_flops(shape, layer, sequence, convention)
    return TokenFlops(forward)


def layer_flops(shape: ModelShape, layer: int, sequence: int, convention: Convention) -> FlopCounts:
    """FLOPs per token of the forward pass of block `layer`, counted from 0."""
    value_dim = shape.latent_attention.value_head_dim if shape.latent_attention else shape.head_dim
    scores = 2 * sequence * shape.heads * (shape.head_dim + value_dim)
    projections = 2 * _attention_matrices(shape)
    if convention == "causal":
        scores //= 2
    experts = shape.experts_at(layer)
    if experts is None:
        return FlopCounts(projections, scores, mlp=2 * _mlp_matrices(shape, shape.ffn_hidden))
    visited = experts.top_k + experts.shared
    return FlopCounts(
        attention_projections=projections,
        attention_scores=scores,
        router=2 * shape.hidden * experts.count,
        experts=2 * visited * _mlp_matrices(shape, experts.ffn_hidden),
    )


def _attention_matrices(shape: ModelShape) -> int:
    """Elements of the attention's weight matrices: DNH for q and out, DKH for k and v.

    Latent attention (arXiv:2412.19437, equations 1 to 11): down to the queries' latent and up from
    it, down to the latent of keys and values together with the shared rotated key, up from it, out.
    """
    hidden, heads, latent = shape.hidden, shape.heads, shape.latent_attention
    if latent is None:
        return hidden * 2 * (heads + shape.kv_heads) * shape.head_dim
    queries = latent.query_rank * (hidden + heads * shape.head_dim)
    keys_and_values = hidden * (latent.kv_rank + latent.rope_head_dim) + latent.kv_rank * heads * (
        latent.nope_head_dim + latent.value_head_dim
    )
    return queries + keys_and_values + heads * latent.value_head_dim * hidden


def _mlp_matrices(shape: ModelShape, ffn_hidden: int) -> int:
    """Elements of an MLP's weight matrices: DF for up, down and, if gated, gate."""
    return (3 if shape.activation == "swiglu" else 2) * shape.hidden * ffn_hidden


def _mlp(shape: ModelShape, ffn_hidden: int) -> int:
    biases = (2 if shape.activation == "swiglu" else 1) * ffn_hidden + shape.hidden
    return _mlp_matrices(shape, ffn_hidden) + (biases if shape.bias else 0)


def _norm(shape: ModelShape) -> int:
    return (2 if shape.norm == "layernorm" else 1) * shape.hidden
