"""The shape of a model: every number that fixes its weights and its arithmetic, and no torch.

A `ModelShape` is the `[model]` table of a run file. What the file leaves out is derived once, when
the shape is checked, so that a dumped shape is explicit and reads back as an equal object. A shape
that cannot be raises `ModelError` with the rule, its arithmetic and the nearest valid choice.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ridgeline.errors import ModelError

SWIGLU_MULTIPLE = 256
MAY_BE_ZERO = ("shared", "first_dense_layers", "balance_weight", "bias_rate")


class _Table(BaseModel):
    """What every table of a shape has in common: frozen, closed, and made of positive numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_a_number(cls, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        if isinstance(value, bool | str) and cls.model_fields[name].annotation in (int, float):
            raise ModelError(f"{name} = {value!r}", f"{name} is a number", f"{name} = 1")
        return value

    @field_validator("*")
    @classmethod
    def _large_enough(cls, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        least = 0 if name in MAY_BE_ZERO else 1
        if value < least and (isinstance(value, int) or least == 0):
            raise ModelError(
                f"{name} = {value}", f"{name} must be at least {least}", f"{name} = {least}"
            )
        if value <= 0 < least:
            raise ModelError(
                f"{name} = {value}", f"{name} must be greater than 0", f"{name} = {abs(value) or 1}"
            )
        return value


class RopeScaling(_Table):
    """Llama-3's stretching of the rotary wavelengths (arXiv:2407.21783 and its reference code).

    Wavelengths above original_max_sequence / low_frequency_factor are multiplied by `factor`, those
    below original_max_sequence / high_frequency_factor are kept, those between are interpolated.
    """

    factor: float = 8.0
    """How many times the longest wavelengths are stretched."""
    low_frequency_factor: float = 1.0
    """Fewer turns than this within the original sequence: stretched in full."""
    high_frequency_factor: float = 4.0
    """More turns than this within the original sequence: left alone."""
    original_max_sequence: int = 8192
    """Tokens per sequence before stretching."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if low >= high:
            raise ModelError(
                f"rope_scaling: low_frequency_factor {low:g}, high_frequency_factor {high:g}",
                f"wavelengths are interpolated between the two, so low < high; {low:g} >= {high:g}",
                f"high_frequency_factor = {4 * low:g}",
            )
        return self


class ExpertShape(_Table):
    """A mixture of experts in place of the MLP of every layer after the first dense ones."""

    count: int
    """Routed experts per layer."""
    top_k: int
    """Routed experts that one token visits."""
    ffn_hidden: int
    """Inner width of one expert, routed or shared."""
    shared: int = 0
    """Experts that every token visits, beside the routed ones."""
    first_dense_layers: int = 0
    """Leading layers that keep an MLP of the model's own ffn_hidden."""

    routing: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: softmax over all experts, or each expert's own sigmoid
    (DeepSeek-V3, arXiv:2412.19437, equation 15)."""
    normalise: bool = Field(default_factory=lambda known: known["top_k"] > 1)
    """Whether the scores of the chosen experts are divided by their sum before they weight;
    default: where there are several."""
    scale: float = 1.0
    """What the weights of the chosen experts are multiplied by."""
    balance_weight: float = 0.01
    """Weight of the auxiliary loss that evens the load, per token and layer; 0: none. The default
    is Switch Transformer's (arXiv:2101.03961, section 2.2)."""
    bias_rate: float = 0.0
    """How far the bias that the router adds to an expert's score, for choosing only, moves after
    every step towards an even load (arXiv:2412.19437, equation 16); 0: it stays at 0."""

    @model_validator(mode="after")
    def _routable(self) -> Self:
        if self.top_k > self.count:
            raise ModelError(
                f"experts: top_k {self.top_k} of count {self.count}",
                f"a token visits distinct experts, so top_k <= count; {self.top_k} > {self.count}",
                f"top_k = {self.count}, or count = {self.top_k}",
            )
        if self.top_k == 1 and self.normalise:
            raise ModelError(
                "experts: normalise with top_k 1",
                "a lone score divided by itself is 1, so the loss would teach the router nothing",
                "normalise = false, or top_k = 2",
            )
        return self


class LatentAttentionShape(_Table):
    """Multi-head latent attention: queries, keys and values expand from two low-rank latents.

    As in DeepSeek-V2 and -V3 (arXiv:2412.19437, section 2.1.1); head_dim of the model is then
    nope_head_dim + rope_head_dim.
    """

    query_rank: int
    """Width of the queries' latent."""
    kv_rank: int
    """Width of the latent that keys and values share."""
    rope_head_dim: int
    """Part of each query and key that is rotated; the key's is shared by all heads."""
    nope_head_dim: int
    """Part of each query and key that is not rotated."""
    value_head_dim: int
    """Width of each head's value."""


def _default_head_dim(known: dict[str, Any]) -> int:
    hidden, heads = known["hidden"], known["heads"]
    if hidden % heads == 0:
        return int(hidden // heads)
    divisor = _nearest_divisor(hidden, heads)
    multiple = max(1, round(hidden / heads)) * heads
    raise ModelError(
        f"hidden {hidden} with heads {heads} and no head_dim",
        f"head_dim = hidden / heads must be whole; {hidden} / {heads} = {hidden / heads:.2f}",
        f"heads = {divisor}, hidden = {multiple}, or give head_dim",
    )


def _default_ffn_hidden(known: dict[str, Any]) -> int:
    if known["activation"] != "swiglu":
        return 4 * int(known["hidden"])
    two_thirds = 8 * int(known["hidden"]) // 3
    return -(-two_thirds // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d))


class ModelShape(_Table):
    """A decoder-only transformer. The defaults are the Llama family's."""

    name: str = "custom"
    """What tables and reports call the model."""
    source: str = "the run file"
    """Where these numbers come from."""

    layers: int
    """Transformer blocks."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int = Field(default_factory=lambda known: known["heads"])
    """Key and value heads; default: heads. Fewer is grouped-query attention."""
    head_dim: int = Field(default_factory=_default_head_dim)
    """Width of one query and one key; default: hidden / heads."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "swiglu"
    """The MLP: exact GELU, GELU by its tanh approximation (GPT-2's), or gated SiLU (Llama's)."""
    ffn_hidden: int = Field(default_factory=_default_ffn_hidden)
    """Inner width of the MLP; default: 4 hidden, for swiglu 8/3 hidden (its three matrices then
    weigh as much as two of 4 hidden) rounded up to a multiple of 256, which is Llama 2's rule."""
    vocab: int
    """Rows of the embedding, padding included."""
    max_sequence: int = 2048
    """Longest sequence in tokens; learned positions have this many rows."""

    positions: Literal["learned", "rope"] = "rope"
    """Learned position embeddings, or rotary ones on queries and keys."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """The normalisation before attention, before the MLP and before the head."""
    norm_eps: float = 1e-5
    """What the norms add to the variance."""
    bias: bool = False
    """Whether linear layers (the head excepted) have biases."""
    qkv_bias: bool = Field(default_factory=lambda known: known["bias"])
    """Whether the query, key and value projections have biases; default: bias. Qwen2: true."""
    qk_norm: bool = False
    """Whether each head's query and key pass an RMSNorm before rotation, as in Qwen3."""
    tied: bool = False
    """Whether the head is the embedding's weight."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    rope_scaling: RopeScaling | None = None
    """Llama-3's stretching of the rotary wavelengths; absent: none."""
    experts: ExpertShape | None = None
    """A mixture of experts; absent: dense."""
    latent_attention: LatentAttentionShape | None = None
    """Multi-head latent attention; absent: ordinary heads."""

    def experts_at(self, layer: int) -> ExpertShape | None:
        """The mixture of experts of block `layer`, counted from 0; None where its MLP is dense."""
        if self.experts is None or layer < self.experts.first_dense_layers:
            return None
        return self.experts

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._check_heads()
        self._check_positions()
        self._check_latent_attention()
        if self.experts and self.experts.first_dense_layers >= self.layers:
            dense = self.experts.first_dense_layers
            raise ModelError(
                f"experts: first_dense_layers {dense} of layers {self.layers}",
                f"at least one layer must hold experts; {dense} >= {self.layers}",
                f"first_dense_layers = {self.layers - 1}, or leave out [experts]",
            )
        return self

    def _check_heads(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                f"kv_heads {self.kv_heads} with heads {self.heads}",
                f"each key/value head serves a whole number of query heads; "
                f"{self.heads} / {self.kv_heads} = {self.heads / self.kv_heads:.2f}",
                f"kv_heads = {_nearest_divisor(self.heads, self.kv_heads)}",
            )

    def _check_positions(self) -> None:
        if self.positions == "learned":
            if self.rope_scaling:
                raise ModelError(
                    'rope_scaling with positions = "learned"',
                    "only rotary positions have wavelengths to stretch",
                    'positions = "rope", or leave out [rope_scaling]',
                )
            return
        latent = self.latent_attention
        name, size = (
            ("rope_head_dim", latent.rope_head_dim) if latent else ("head_dim", self.head_dim)
        )
        if size % 2:
            raise ModelError(
                f'{name} {size} with positions = "rope"',
                f"rotary positions turn pairs, so {name} must be even; {size} is odd",
                f"{name} = {size + 1}" + (f" or {size - 1}" if size > 1 else ""),
            )

    def _check_latent_attention(self) -> None:
        latent = self.latent_attention
        if latent is None:
            return
        parts = latent.nope_head_dim + latent.rope_head_dim
        if self.head_dim != parts:
            raise ModelError(
                f"head_dim {self.head_dim} with latent attention",
                f"head_dim = nope_head_dim + rope_head_dim; "
                f"{latent.nope_head_dim} + {latent.rope_head_dim} = {parts}",
                f"head_dim = {parts}",
            )
        if self.positions != "rope" or self.kv_heads != self.heads or self.qkv_bias or self.qk_norm:
            raise ModelError(
                f"latent attention with positions {self.positions}, kv_heads {self.kv_heads} of "
                f"{self.heads}, qkv_bias {self.qkv_bias}, qk_norm {self.qk_norm}",
                "every head expands its own key and value from the latent, rotated, without bias",
                f'positions = "rope", kv_heads = {self.heads}, qkv_bias = false, qk_norm = false',
            )
