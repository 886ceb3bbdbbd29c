"""Where no plan can be made: by how much, what binds, and the nearest question that has one."""

from __future__ import annotations

from collections.abc import Iterator

from ridgeline.errors import LayoutError, PlanError
from ridgeline.plan.constants import calibration
from ridgeline.plan.memory import memory
from ridgeline.plan.question import Question, physics, usable
from ridgeline.plan.search import Found, search
from ridgeline.plan.space import nearest_devices, space


def indivisible(asked: Question) -> LayoutError:
    """No layout divides the run: the batches nearest to the asked one that some layout does."""
    shape, devices = asked.shape, asked.devices
    return LayoutError(
        f"{shape.name} on {devices} devices with a batch of {asked.global_batch} sequences",
        f"dp·cp·tp·pp = {devices}, dp divides {asked.global_batch}, cp divides "
        f"{asked.sequence} tokens, tp divides {shape.heads} heads and {shape.kv_heads} key-value "
        f"heads, pp is at most {shape.layers} layers: no four numbers do all of that",
        f"{nearest_devices(shape, asked.sequence, asked.global_batch, devices)} devices, or a "
        f"batch of {-(-asked.global_batch // devices) * devices} sequences",
    )


def too_small(asked: Question, found: Found) -> PlanError:
    """Nothing fits: by how much, what binds, and how many devices would do."""
    table, layout = found.smallest_memory, found.smallest.layout(0, asked.precision)
    names = ("weights", "gradients", "optimizer", "activations", "temporary", "framework")
    parts = {name: float(getattr(table, name)[0]) for name in names}
    biggest = max(parts, key=lambda name: parts[name])
    need, have = float(table.total[0]), usable(asked)
    gib = 2.0**30
    return PlanError(
        f"{asked.shape.name} on {asked.devices} {asked.cluster.device.name}",
        f"the smallest layout, '{layout}', needs {need / gib:.1f} of {have / gib:.1f} usable GiB "
        f"per device: {(need - have) / gib:.1f} too much, most of it {biggest} "
        f"({parts[biggest] / gib:.1f} GiB)",
        _what_fits(asked),
    )


def _what_fits(asked: Question) -> str:
    """The fewest devices that something fits, of up to 1,024 times as many."""
    if asked.cluster.device.effective:
        return "shorter sequences, or a machine with more memory"
    task, rates = physics(asked)
    for devices in _larger(asked.devices):
        tried = space(asked.shape, asked.sequence, asked.global_batch, devices)
        enough = usable(asked)
        if any((memory(task, rates, each).total <= enough).any() for each in tried.chunks()):
            found = search(task, rates, calibration().shared, tried, enough)
            best = found.layouts.layout(0, asked.precision)
            return f"{devices} devices ('{best}'), shorter sequences, or larger devices"
    return "shorter sequences, or devices with more memory"


def _larger(devices: int) -> Iterator[int]:
    """More devices: whole multiples, four to each doubling, up to 1,024 times as many."""
    sizes = {devices * 2**k * quarters // 4 for k in range(10) for quarters in (5, 6, 7, 8)}
    yield from (size for size in sorted(sizes) if size > devices and size % devices == 0)
