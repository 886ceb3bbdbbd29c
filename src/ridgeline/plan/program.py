"""What Ridgeline's own program does in a step of one layout, stage by stage: FLOPs and messages.

The search prices a million layouts by closed forms; this says of one layout what each stage of its
pipeline does, with the cuts, groups and collectives of `train`. `ridgeline rehearse` traces the
same, and `bench/plan_against_rehearsal.py` lays both side by side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from ridgeline.layout.context import ContextKind, kind_of
from ridgeline.layout.grid import expert_sizes, shard_sizes
from ridgeline.layout.layout import Layout, Schedule
from ridgeline.layout.schedules import schedule_of
from ridgeline.layout.stages import Chunk, chunks_of
from ridgeline.layout.transfers import MOST_LEAVING, Step, with_transfers
from ridgeline.model.counts import layer_flops
from ridgeline.model.shape import ExpertShape, ModelShape

REDUCED = 4.0
"""Bytes per parameter of gradients as they are kept and reduced."""
COUNT = 8.0
"""Bytes of a whole number that ranks tell each other."""


class Weight(NamedTuple):
    """A parameter as one tensor rank has it."""

    name: str
    rows: float
    columns: float
    summed: bool = False
    """Whether tensor ranks hold it whole, and sum their terms of its gradient."""

    @property
    def size(self) -> float:
        """Elements."""
        return self.rows * self.columns

    def padded(self, ranks: float) -> float:
        """Elements that are gathered over `ranks` shards, each of them equally many rows."""
        return math.ceil(self.rows / ranks) * ranks * self.columns


class Unit(NamedTuple):
    """Parameters that data parallelism gathers and reduces together."""

    weights: tuple[Weight, ...]
    copies: int
    """Groups of ranks that each hold the whole."""
    shards: int
    """Ranks over which one copy lies."""

    @property
    def size(self) -> float:
        """Elements."""
        return sum(weight.size for weight in self.weights)

    @property
    def padded(self) -> float:
        """Elements that are gathered."""
        return sum(weight.padded(self.shards) for weight in self.weights)


@lru_cache(maxsize=64)
def _steps(
    schedule: Schedule, pipeline: int, interleave: int, micro_batches: int
) -> tuple[tuple[Step, ...], ...]:
    layout = Layout(schedule=schedule, pipeline=pipeline, interleave=interleave)
    return with_transfers(schedule_of(layout, micro_batches))


def ring(size: float, ranks: int) -> float:
    """Bytes that each rank sends to gather, scatter or exchange `size` bytes over `ranks`."""
    return size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Program:
    """A model, cut and divided as `layout` says, with so many sequences of `sequence` a step."""

    shape: ModelShape
    layout: Layout
    sequence: int
    global_batch: int

    @property
    def micro_batches(self) -> int:
        """Of one replica, in a step."""
        return self.global_batch // (self.layout.data * self.layout.micro_batch)

    @property
    def width(self) -> float:
        """Bytes per element of activations and of weights for the matrix products."""
        return 4.0 if self.layout.precision == "fp32" else 2.0

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch on a context rank."""
        return self.layout.micro_batch * self.sequence / self.layout.context

    @cached_property
    def context(self) -> ContextKind | None:
        """How context ranks exchange attention; None: no sequence is divided."""
        return kind_of(self.layout, self.shape) if self.layout.context > 1 else None

    @cached_property
    def rank_of_chunk(self) -> tuple[int, ...]:
        """The pipeline rank of each chunk, along the model."""
        return schedule_of(self.layout, 1).rank_of_chunk

    @cached_property
    def cuts(self) -> tuple[Chunk, ...]:
        """The chunks of the pipeline."""
        return chunks_of(self.layout, self.shape, self.sequence)

    @cached_property
    def counted(self) -> int:
        """Micro-batches after which a step only repeats itself; all of them where that is less."""
        stages = self.layout.pipeline
        most = max(2, 1 + -(-MOST_LEAVING // stages)) * stages
        repeats = self.layout.schedule != "gpipe" and self.micro_batches > most
        return most if repeats else self.micro_batches

    @cached_property
    def steps(self) -> tuple[tuple[Step, ...], ...]:
        """What each rank of the pipeline does with so many micro-batches, messages included."""
        layout = self.layout
        return _steps(layout.schedule, layout.pipeline, layout.interleave, self.counted)

    def chunks(self, stage: int) -> list[Chunk]:
        """Those of one stage."""
        return [c for c in self.cuts if self.rank_of_chunk[c.index] == stage]

    def attention_widths(self) -> tuple[float, float]:
        """Features of the queries, and of the keys, of one tensor rank."""
        head = self.shape.head_dim / self.layout.tensor
        return self.shape.heads * head, self.shape.kv_heads * head

    def block_weights(self, layer: int) -> Iterator[Weight]:
        """The parameters of a block without its routed experts."""
        shape, tensor = self.shape, self.layout.tensor
        queries, keys = self.attention_widths()
        hidden, several = shape.hidden, tensor > 1
        for norm in ("attention_norm", "mlp_norm"):
            yield from self._norm(norm)
        for name, features in (("q", queries), ("k", keys), ("v", keys)):
            yield Weight(name, features, hidden)
            if shape.qkv_bias:
                yield Weight(f"{name}.bias", features, 1)
            if shape.qk_norm and name != "v":
                yield Weight(f"{name}_norm", shape.head_dim, 1, several)
        yield Weight("out", hidden, queries)
        if shape.bias:
            yield Weight("out.bias", hidden, 1)
        experts = shape.experts_at(layer)
        inner = shape.ffn_hidden
        if experts is not None:
            yield Weight("router", experts.count, hidden, several)
            inner = experts.shared * experts.ffn_hidden
        for name in self._inner_names() if inner else ():
            yield Weight(name, inner / tensor, hidden)
            if shape.bias:
                yield Weight(f"{name}.bias", inner / tensor, 1)
        if inner:
            yield Weight("down", hidden, inner / tensor)
            if shape.bias:
                yield Weight("down.bias", hidden, 1)

    def expert_weights(self, experts: ExpertShape) -> Iterator[Weight]:
        """The routed experts that one rank holds, whole on every tensor rank."""
        count, several = experts.count / self.layout.expert, self.layout.tensor > 1
        each = self.shape.hidden * experts.ffn_hidden
        for name in (*self._inner_names(), "down"):
            yield Weight(f"experts.{name}", count, each, several)

    def ends(self, chunk: Chunk) -> tuple[Weight, ...]:
        """Embedding and positions, last norm and head, as far as they lie in `chunk`."""
        shape, tensor = self.shape, self.layout.tensor
        found: list[Weight] = []
        if chunk.first:
            found.append(Weight("embedding", shape.vocab / tensor, shape.hidden))
            if shape.positions == "learned":
                found.append(Weight("positions", shape.max_sequence, shape.hidden, tensor > 1))
        if chunk.last:
            found.extend(self._norm("norm"))
            if not (shape.tied and chunk.first):
                found.append(Weight("head", shape.vocab / tensor, shape.hidden))
        return tuple(found)

    def units(self, layer: int) -> list[Unit]:
        """A block's units of data parallelism: its experts are one where they are spread."""
        experts = self.shape.experts_at(layer)
        common = tuple(self.block_weights(layer))
        if experts is None:
            return [self._unit(common)]
        routed = tuple(self.expert_weights(experts))
        if self.layout.expert == 1:
            return [self._unit((*common, *routed))]
        ranks = expert_sizes(self.layout)[0]
        apart = Unit(routed, *((ranks, 1) if self.layout.zero == 0 else (1, ranks)))
        return [self._unit(common), apart]

    def root(self, chunk: Chunk) -> Unit:
        """What lies in no block of a chunk."""
        return self._unit(self.ends(chunk))

    def _unit(self, weights: tuple[Weight, ...]) -> Unit:
        return Unit(weights, *shard_sizes(self.layout))

    def _norm(self, name: str) -> Iterator[Weight]:
        yield Weight(name, self.shape.hidden, 1, self.layout.tensor > 1)
        if self.shape.norm == "layernorm":
            yield Weight(f"{name}.bias", self.shape.hidden, 1, self.layout.tensor > 1)

    def _inner_names(self) -> tuple[str, ...]:
        return ("gate", "up") if self.shape.activation == "swiglu" else ("up",)


def executed_flops(program: Program) -> tuple[float, float]:
    """FLOPs of a step on all devices: what the model asks for, and what backward does again.

    Recomputation stops with the last tensor that backward needs, so a block's last product is not
    done again; `selective` keeps every product but attention's and the routed experts'.
    """
    shape, layout = program.shape, program.layout
    tokens = float(program.sequence * program.global_batch)
    asked, again = 2.0 * shape.hidden * shape.vocab, 0.0
    for layer in range(shape.layers):
        flops, experts = layer_flops(shape, layer, program.sequence, "causal"), None
        experts = shape.experts_at(layer)
        asked += flops.total
        inner = shape.ffn_hidden if experts is None else experts.shared * experts.ffn_hidden
        if layout.recompute == "full":
            again += flops.total - 2.0 * inner * shape.hidden
        elif layout.recompute == "selective":
            again += flops.attention_scores
            if experts is not None:
                again += flops.experts * experts.top_k / (experts.top_k + experts.shared)
    return 3 * asked * tokens, again * tokens


def sent_bytes(program: Program) -> Mapping[str, float]:
    """Bytes that a device sends in a step by axis, of the stage that sends most over each."""
    stages = [_sent(program, stage) for stage in range(program.layout.pipeline)]
    return {
        axis: max(each[axis] for each in stages)
        for axis in ("tensor", "pipeline", "data", "context", "expert")
    }


def _sent(program: Program, stage: int) -> defaultdict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    layers = 0
    for chunk in program.chunks(stage):
        layers += len(chunk.layers)
        units = [program.root(chunk)]
        for layer in chunk.layers:
            units += program.units(layer)
            _layer(program, layer, found)
        for unit in units:
            _reductions(program, unit, found)
        _ends(program, chunk, found)
    replicas, shards = shard_sizes(program.layout)
    found["data"] += 2 * ring(COUNT, shards) + 2 * ring(COUNT, replicas)
    if program.shape.experts is not None:
        visits = COUNT * layers * program.shape.experts.count
        found["data"] += 2 * ring(visits, shards) + 2 * ring(visits, replicas)
        found["tensor"] += 2 * ring(visits, program.layout.tensor)
    found["pipeline"] += _between_stages(program, stage)
    return found


def _reductions(program: Program, unit: Unit, found: defaultdict[str, float]) -> None:
    """A unit's gathers and reductions over data and tensor ranks."""
    zero, micro_batches = program.layout.zero, program.micro_batches
    times = micro_batches if zero >= 2 else 1
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[zero]
    found["data"] += gathers * ring(program.width * unit.padded, unit.shards)
    found["data"] += times * ring(REDUCED * unit.padded, unit.shards)
    found["data"] += times * 2 * ring(REDUCED * unit.padded / unit.shards, unit.copies)
    summed = sum(weight.size for weight in unit.weights if weight.summed)
    width = REDUCED if zero < 2 else program.width
    found["tensor"] += times * 2 * ring(width * summed, program.layout.tensor)


def _layer(program: Program, layer: int, found: defaultdict[str, float]) -> None:
    """A block's messages within its replica, of all micro-batches."""
    shape, layout, width = program.shape, program.layout, program.width
    tensor, context, micro_batches = layout.tensor, layout.context, program.micro_batches
    experts = shape.experts_at(layer)
    again = layout.recompute != "none"
    # two gathers and two scatters each way; of those in recomputation the last scatter is not
    # needed, and `selective` keeps what they gave
    gathered = width * program.rows * shape.hidden
    times = 0
    if experts is None or experts.shared:
        times = 8 + 3 * (layout.recompute == "full")
    else:
        times = 4 + 2 * (layout.recompute == "full")
    found["tensor"] += micro_batches * times * ring(gathered, tensor)
    queries, keys = program.attention_widths()
    element = program.rows * micro_batches
    if program.context == "heads":
        heads = shape.kv_heads // tensor
        copied = keys * max(1, context // max(heads, 1))
        both = width * element * (2 * queries + 2 * copied)
        found["context"] += (2 + again) * ring(both, context)
    elif program.context == "ring":
        block = 2 * keys * element
        found["context"] += (2 + again) * (context - 1) * width * block
        found["context"] += context * REDUCED * block
    if experts is not None:
        visits = width * element / tensor * experts.top_k * shape.hidden
        ways = 4 + 2 * again
        counts = (1 + again) * micro_batches * COUNT * experts.count
        found["expert"] += ways * ring(visits, layout.expert) + ring(counts, layout.expert)
        if experts.balance_weight:
            whole = (1 + again) * micro_batches * layout.micro_batch * COUNT * experts.count
            found["tensor"] += 2 * ring(whole, tensor)
            found["context"] += 2 * ring(whole, context)


def _ends(program: Program, chunk: Chunk, found: defaultdict[str, float]) -> None:
    """What embedding, head and loss send over tensor ranks."""
    tensor, micro_batches = program.layout.tensor, program.micro_batches
    gathered = program.width * program.rows * program.shape.hidden
    found["tensor"] += (chunk.first + chunk.last) * 2 * micro_batches * ring(gathered, tensor)
    if chunk.last:  # a maximum and two sums per token, in float32
        found["tensor"] += micro_batches * 2 * ring(3 * 4 * program.rows, tensor)


def _between_stages(program: Program, stage: int) -> float:
    """Hidden states and their gradients, and a tied embedding's gradient once."""
    layout, ranks = program.layout, program.rank_of_chunk
    hidden = program.width * program.rows * program.shape.hidden / layout.tensor
    sends = sum(
        0 <= other < len(ranks) and ranks[other] != stage
        for chunk in program.chunks(stage)
        for other in (chunk.index - 1, chunk.index + 1)
    )
    size = sends * program.micro_batches * hidden
    first, last = ranks[0], ranks[-1]
    if program.shape.tied and first != last and stage in (first, last):
        embedding = Weight("embedding", program.shape.vocab / layout.tensor, program.shape.hidden)
        shards = shard_sizes(layout)[1]
        size += REDUCED * embedding.padded(shards) / shards
    return size
