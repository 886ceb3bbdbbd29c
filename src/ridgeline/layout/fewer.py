"""The nearest layout for fewer devices than a run was laid out for."""

from __future__ import annotations

from collections.abc import Iterator

from ridgeline.errors import LayoutError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import trainable
from ridgeline.model.shape import ModelShape


def fewer_devices(
    layout: Layout, devices: int, shape: ModelShape, sequence: int, batch: int
) -> Layout:
    """`layout` on at most `devices`: the same batch of `batch` sequences, the model divided alike.

    Data-parallel replicas go first, because every device then holds of the model what it held. Only
    where not even one replica is left, the model is divided less: by as many devices as there are,
    and rather by tensor than by pipeline than by context. As many replicas as that division allows;
    experts as far apart, then micro-batches as large, as before or as fits.
    Raises LayoutError where nothing fits: not even one device could train it.
    """
    for pipeline, context, tensor in _divisions(layout, devices):
        for data in range(devices // (pipeline * context * tensor), 0, -1):
            sizes = {"data": data, "context": context, "tensor": tensor, "pipeline": pipeline}
            for found in _candidates(layout, sizes, batch):
                if _fits(found, shape, sequence, batch):
                    return found
    raise LayoutError(
        f"layout '{layout}' on {devices} devices",
        f"none that divides the model less can train {shape.name}",
        f"{layout.world} devices",
    )


def _divisions(layout: Layout, devices: int) -> list[tuple[int, int, int]]:
    """How the model may be divided, nearest first: (pipeline, context, tensor)."""
    divisions = [
        (pipeline, context, tensor)
        for pipeline in _divisors(layout.pipeline)
        for context in _divisors(layout.context)
        for tensor in _divisors(layout.tensor)
        if pipeline * context * tensor <= devices
    ]

    def nearness(sizes: tuple[int, int, int]) -> tuple[int, ...]:
        pipeline, context, tensor = sizes
        return pipeline * context * tensor, tensor, pipeline

    return sorted(divisions, key=nearness, reverse=True)


def _candidates(layout: Layout, sizes: dict[str, int], batch: int) -> Iterator[Layout]:
    """Layouts of these axes, nearest first; only those that divide the batch."""
    data, replicas = sizes["data"], sizes["data"] * sizes["context"]
    group = next((n for n in _divisors(replicas) if n <= layout.shard_group), 0)
    whole = layout.model_dump() | sizes | {"shard_group": group}
    if sizes["pipeline"] == 1:
        whole["interleave"] = 1
    for expert in _divisors(layout.expert):
        for micro_batch in range(layout.micro_batch, 0, -1):
            if replicas % expert == 0 and batch % (data * micro_batch) == 0:
                yield Layout(**whole | {"expert": expert, "micro_batch": micro_batch})


def _fits(layout: Layout, shape: ModelShape, sequence: int, batch: int) -> bool:
    try:
        check(layout, shape, sequence, batch)
        trainable(layout, shape, sequence)
    except LayoutError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    """Divisors, largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]
