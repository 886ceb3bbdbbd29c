"""The whole space of layouts of one model, batch and number of devices, as arrays.

Every way to write the devices as dp·cp·tp·pp; micro-batches 1 to 16; every interleaving that
divides the layers of a stage, under the schedules that can interleave so; expert parallelism
over divisors of the experts; ZeRO 0 to 3 with every shard group that divides the replicas; three
kinds of recomputation. `bases` keeps what `layout.arithmetic.check` lets pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ridgeline.model.shape import ModelShape
from ridgeline.plan.quantities import RECOMPUTES, SCHEDULES, Array, Layouts

MOST_MICRO_BATCH = 16
PLAIN = ("1f1b", "gpipe", "zbh1")
"""Schedules with one chunk per rank."""
INTERLEAVED = ("1f1b", "izb")
FOLDED = ("zbv", "dualpipev")
"""Schedules that fold the model once over the ranks: always two chunks."""
CHUNK_ROWS = 1 << 15
"""Rows priced at once: their columns stay in the processor's cache."""


@dataclass(frozen=True)
class Space:
    """The layouts that divide the run, without ZeRO and recomputation, and how many there are."""

    bases: Layouts
    shards: tuple[Array, ...]
    """By base's kind of replicas: the (zero, shard group) pairs, flattened."""
    kind: NDArray[np.intp]
    """Which of `shards` each base has."""
    candidates: int
    """Members of the space, before any arithmetic."""
    valid: int
    """Those that satisfy it."""

    def chunks(self) -> Iterator[Layouts]:
        """The valid layouts in full, some thousand at a time."""
        again = len(RECOMPUTES)
        for kind, pairs in enumerate(self.shards):
            rows = np.flatnonzero(self.kind == kind)
            width = len(pairs) * again
            zero = np.repeat(pairs[:, 0], again)
            group = np.repeat(pairs[:, 1], again)
            recompute = np.tile(np.arange(again, dtype=np.float64), len(pairs))
            step = max(1, CHUNK_ROWS // width)
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                base = self.bases.take(np.repeat(some, width))
                yield replace(
                    base,
                    zero=np.tile(zero, len(some)),
                    shard_group=np.tile(group, len(some)),
                    recompute=np.tile(recompute, len(some)),
                )


def space(
    shape: ModelShape, sequence: int, global_batch: int, devices: int, zero_stages: bool = True
) -> Space:
    """The space of `shape` over `devices`, with sequences of `sequence` tokens.

    `zero_stages` False leaves out ZeRO (for a quick look).
    """
    experts = divisors(shape.experts.count) if shape.experts else (1,)
    rows: list[tuple[float, ...]] = []
    candidates = 0
    for tensor, pipeline, context, data in _axes(devices):
        orders = _orders(shape.layers, pipeline)
        pairs = len(shard_pairs(data * context)) if zero_stages else 1
        candidates += MOST_MICRO_BATCH * len(orders) * len(experts) * pairs * len(RECOMPUTES)
        if sequence % context or not _divides(shape, tensor):
            continue
        whole = [e for e in experts if data * context % e == 0]
        for micro_batch in range(1, MOST_MICRO_BATCH + 1):
            if global_batch % (data * micro_batch):
                continue
            micro_batches = global_batch // (data * micro_batch)
            rows += [
                (data, context, tensor, pipeline, expert, micro_batch, chunks, order)
                for chunks, order in orders
                if pipeline * chunks <= shape.layers
                and (chunks == 1 or micro_batches % pipeline == 0)
                for expert in whole
            ]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 8).T
    nothing = np.zeros(columns.shape[1])
    replicas = columns[0] * columns[1]
    names = ("data", "context", "tensor", "pipeline", "expert", "micro_batch", "interleave")
    named = dict(zip((*names, "schedule"), columns, strict=True))
    bases = Layouts(**named, zero=nothing, shard_group=replicas, recompute=nothing)
    kinds, kind = np.unique(replicas, return_inverse=True)
    shards = tuple(
        shard_pairs(int(each)) if zero_stages else shard_pairs(int(each))[:1] for each in kinds
    )
    sizes = np.array([len(each) for each in shards], dtype=np.int64)
    valid = int(np.sum(sizes[kind])) * len(RECOMPUTES) if len(kinds) else 0
    return Space(bases, shards, kind, candidates, valid)


def nearest_devices(shape: ModelShape, sequence: int, global_batch: int, wanted: int) -> int:
    """The number of devices closest to `wanted` over which some layout divides the run."""
    tensors = [t for t in divisors(shape.heads) if _divides(shape, t)]
    parts = {t * c for t in tensors for c in divisors(sequence)}
    stages = range(1, shape.layers + 1)
    sizes = {part * stage for part in parts for stage in stages}
    data = np.array(divisors(global_batch))
    products = np.outer(np.array(sorted(sizes)), data).ravel()
    return int(products[np.argmin(np.abs(products - wanted))])


@cache
def shard_pairs(replicas: int) -> Array:
    """Every (ZeRO stage, shard group) over so many replicas; one replica has nothing to shard."""
    pairs = [(0.0, float(replicas))]
    pairs += [(float(zero), float(g)) for zero in (1, 2, 3) for g in divisors(replicas) if g > 1]
    return np.array(pairs)


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    low = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return tuple(sorted({*low, *(number // size for size in low)}))


def _axes(devices: int) -> Iterator[tuple[int, int, int, int]]:
    """Every (tensor, pipeline, context, data) whose product is `devices`."""
    for tensor in divisors(devices):
        for pipeline in divisors(devices // tensor):
            for context in divisors(devices // tensor // pipeline):
                yield tensor, pipeline, context, devices // tensor // pipeline // context


def _orders(layers: int, pipeline: int) -> list[tuple[int, int]]:
    """Every (interleaving, schedule's index); without a pipeline there is one order."""
    if pipeline == 1:
        return [(1, SCHEDULES.index("1f1b"))]
    each = divisors(-(-layers // pipeline))
    plain = [(1, SCHEDULES.index(name)) for name in PLAIN]
    looped = [(v, SCHEDULES.index(name)) for v in each if v > 1 for name in INTERLEAVED]
    return plain + looped + [(2, SCHEDULES.index(name)) for name in FOLDED]


def _divides(shape: ModelShape, tensor: int) -> bool:
    widths = (shape.heads, shape.kv_heads, shape.ffn_hidden)
    return all(width % tensor == 0 for width in widths)
