"""A rehearsal for people, and as JSON."""

from __future__ import annotations

from typing import Any

from ridgeline import human
from ridgeline.rehearse.differences import differences_of
from ridgeline.rehearse.rehearse import AXES, OWNERS, Rehearsal, Stage

MOST_ROWS = 12
"""Stages shown; of more, the first, the fullest and the last."""


def as_json(found: Rehearsal) -> dict[str, Any]:
    """The object of `ridgeline rehearse --json`: bytes, FLOP and seconds."""
    return {
        "run": found.run.name,
        "layout": str(found.layout),
        "fits": found.fits,
        "validated_on": found.validated_on,
        "capacity_bytes": found.capacity_bytes,
        "usable_bytes": found.usable_bytes,
        "stages": [_stage(stage) for stage in found.stages],
        "findings": list(found.findings),
        "differences": [vars(each) for each in differences_of(found)],
        "traced": found.traced,
        "ledger": found.ledger.model_dump(mode="json"),
        "seconds": found.seconds,
        "rss_bytes": found.rss_bytes,
    }


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "rank": stage.rank,
        "layers": stage.layers,
        "peak_bytes": stage.peak_bytes,
        "peak_at": stage.peak_at,
        "by_component": dict(stage.by_component),
        "flops": stage.flops,
        "flops_by_module": dict(stage.flops_by_module),
        "collectives": {
            axis: {"count": stage.calls[axis], "bytes": stage.sent_bytes.get(axis, 0.0)}
            for axis in AXES
            if stage.calls.get(axis)
        },
        "kernels": stage.kernels,
        "largest": [vars(each) for each in stage.largest],
        "timeline": [
            {"step": moment.step, "bytes": moment.total} for moment in _thinned(stage.timeline)
        ],
    }


def table(found: Rehearsal) -> str:
    """Stages with their memory, what they compute and send, and what was found."""
    layout, run = found.layout, found.run
    lines = [
        f"{run.name}: {run.model.name} in '{layout}', {layout.world:,} ranks, "
        f"{layout.pipeline} stages",
        "",
        f"{'stage':>5} {'rank':>7} {'layers':>6} " + "".join(f"{n[:11]:>12}" for n in OWNERS)
        + f"{'framework':>12}{'peak':>12}  at",
    ]  # fmt: skip
    fullest = found.fullest
    lines += [_row(stage, stage is fullest) for stage in _shown(found)]
    lines += ["", _verdict(found), "", f"largest tensors at the peak of stage {fullest.stage}"]
    lines += [
        f"  {human.size(each.size_bytes):>10}  {each.owner:11} {each.name} "
        f"{'x'.join(map(str, each.shape))} {each.dtype}"
        for each in fullest.largest
    ]
    lines += ["", *_sums(found), "", *_found(found)]
    lines += ["", *(f"differs on {_device(found)}: {each}" for each in differences_of(found))]
    lines += [
        "",
        f"{found.traced}; {human.duration(found.seconds)}, {human.size(found.rss_bytes)} of memory",
        f"validated on: {found.validated_on}",
    ]
    return "\n".join(lines)


def _device(found: Rehearsal) -> str:
    return found.run.cluster.device


def _shown(found: Rehearsal) -> list[Stage]:
    """All stages, or of many the first, the fullest, the last, and those beside them."""
    stages = found.stages
    if len(stages) <= MOST_ROWS:
        return list(stages)
    full = found.fullest.stage
    near = {0, 1, 2, full - 1, full, full + 1, *range(len(stages) - 3, len(stages))}
    return [stage for stage in stages if stage.stage in near]


def _row(stage: Stage, fullest: bool) -> str:
    parts = "".join(
        f"{human.size(stage.by_component[name]):>12}" for name in (*OWNERS, "framework")
    )
    return (
        f"{stage.stage:>5} {stage.rank:>7,} {stage.layers:>6} {parts}"
        f"{human.size(stage.peak_bytes):>12}  {stage.peak_at}{' ←' if fullest else ''}"
    )


def _verdict(found: Rehearsal) -> str:
    full = found.fullest
    if found.usable_bytes is None or found.capacity_bytes is None:
        return f"fits: {human.DASH} (the memory of {_device(found)} is not known)"
    room = found.usable_bytes - full.peak_bytes
    of = f"{human.size(found.usable_bytes)}, which are 95% of {human.size(found.capacity_bytes)}"
    if room >= 0:
        return f"fits: stage {full.stage} leaves {human.size(room)} of {of}"
    return f"does not fit: stage {full.stage} needs {human.size(-room)} more than {of}"


def _sums(found: Rehearsal) -> list[str]:
    ledger = found.ledger
    done, asked = ledger.hardware_flops_per_device, ledger.flops_per_device
    assert done is not None and asked is not None
    again = done - asked
    lines = [
        f"per device and step: {human.short(done)} FLOP, {again / done:.1%} of them done again; "
        f"{ledger.kernels:,.0f} operations launched"
    ]
    for axis in AXES:
        count, size = getattr(ledger.calls, axis), getattr(ledger.sent, f"{axis}_bytes")
        if count:
            lines.append(f"  {axis:9} {count:>9,.0f} messages {human.size(size):>12} sent")
    return lines


def _found(found: Rehearsal) -> list[str]:
    return [f"found: {each}" for each in found.findings] or ["found: nothing to report"]


def _thinned(timeline: tuple[Any, ...], most: int = 400) -> list[Any]:
    """At most about `most` moments, the highest of each stretch."""
    stretch = -(-len(timeline) // most)
    return [
        max(timeline[at : at + stretch], key=lambda moment: moment.total)
        for at in range(0, len(timeline), stretch)
    ]
