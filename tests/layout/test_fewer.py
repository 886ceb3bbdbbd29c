"""The nearest layout on fewer devices: valid, the same batch, and as many devices as it can use."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.fewer import fewer_devices
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import trainable
from ridgeline.model.shape import ExpertShape, ModelShape

SEQUENCE = 64
DENSE = ModelShape(layers=8, hidden=64, heads=8, kv_heads=8, ffn_hidden=96, vocab=320)
MIXED = DENSE.model_copy(update={"experts": ExpertShape(count=8, top_k=2, ffn_hidden=32)})


def valid(layout: Layout, shape: ModelShape, batch: int) -> bool:
    try:
        check(layout, shape, SEQUENCE, batch)
        trainable(layout, shape, SEQUENCE)
    except LayoutError:
        return False
    return True


sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[Layout, ModelShape, int]:
    """A layout that can train a model with a batch."""
    shape, batch = draw(st.sampled_from([DENSE, MIXED])), draw(st.sampled_from([8, 24, 48, 60, 96]))
    pipeline = draw(st.sampled_from([1, 2, 4]))
    told: dict[str, Any] = {
        "data": draw(sizes),
        "context": draw(st.sampled_from([1, 2, 4])),
        "tensor": draw(st.sampled_from([1, 2, 4, 8])),
        "pipeline": pipeline,
        "interleave": draw(st.sampled_from([1, 2])) if pipeline > 1 else 1,
        "schedule": draw(st.sampled_from(["1f1b", "zbh1"])),
        "expert": draw(st.sampled_from([1, 2, 4])) if shape.experts else 1,
        "micro_batch": draw(st.sampled_from([1, 2, 4])),
        "zero": draw(st.integers(0, 3)),
        "precision": "fp32",
    }
    if told["zero"]:
        told["shard_group"] = draw(st.sampled_from([0, 2]))
    try:
        layout = Layout(**told)
    except LayoutError:
        assume(False)
    assume(valid(layout, shape, batch))
    return layout, shape, batch


@given(laid_out(), st.data())
def test_it_is_valid_keeps_the_batch_and_uses_as_many_devices_as_any_that_divides_the_model_alike(
    case: tuple[Layout, ModelShape, int], data: st.DataObject
) -> None:
    layout, shape, batch = case
    devices = data.draw(st.integers(1, layout.world), label="devices")
    found = fewer_devices(layout, devices, shape, SEQUENCE, batch)
    assert found.world <= devices
    assert valid(found, shape, batch)  # dp·mb divides the same batch
    for name in ("schedule", "zero", "precision", "recompute", "compile", "order"):
        assert getattr(found, name) == getattr(layout, name)
    for name in ("context", "tensor", "pipeline", "expert"):
        assert getattr(layout, name) % getattr(found, name) == 0
    division = layout.context * layout.tensor * layout.pipeline
    kept = found.context * found.tensor * found.pipeline
    if devices >= division:
        assert kept == division or not any(
            fits_somehow(layout, shape, batch, data=d) for d in range(1, devices // division + 1)
        )
    more = range(found.data + 1, devices // kept + 1)
    assert not any(fits_somehow(found, shape, batch, data=d, most=layout) for d in more)
    assert fewer_devices(found, devices, shape, SEQUENCE, batch) == found


def fits_somehow(
    layout: Layout, shape: ModelShape, batch: int, data: int, most: Layout | None = None
) -> bool:
    """Whether any experts, shard group and micro-batch make `data` replicas of it valid."""
    most = most or layout
    groups = {0, *range(1, most.shard_group + 1)}
    for expert, group, size in itertools.product(
        range(1, most.expert + 1), groups, range(1, most.micro_batch + 1)
    ):
        told = {"data": data, "expert": expert, "shard_group": group, "micro_batch": size}
        try:
            if most.expert % expert == 0 and valid(
                Layout(**layout.model_dump() | told), shape, batch
            ):
                return True
        except LayoutError:
            continue
    return False


@pytest.mark.parametrize(
    ("before", "devices", "after"),
    [
        ("dp4 tp2 mb2 fp32", 6, "dp3 tp2 mb2 fp32"),
        ("dp4 tp2 mb2 fp32", 5, "dp2 tp2 mb2 fp32"),  # one device is left idle
        ("dp4 mb8 fp32", 3, "dp3 mb8 fp32"),
        ("dp8 mb6 fp32", 5, "dp4 mb6 fp32"),  # 5 does not divide 48
        ("dp2 pp4 v2 fp32", 6, "pp4 v2 fp32"),
        ("dp2 pp2 v2 fp32", 1, "fp32"),  # what is no pipeline has no interleaving
        ("tp4 cp2 fp32", 7, "tp4 fp32"),  # context first
        ("dp4 zero3/4 fp32", 3, "dp3 zero3/3 fp32"),
        ("dp2 tp2 fp32", 4, "dp2 tp2 fp32"),
    ],
)
def test_replicas_go_first(before: str, devices: int, after: str) -> None:
    layout = Layout.model_validate(before)
    assert str(fewer_devices(layout, devices, DENSE, SEQUENCE, 48)) == str(
        Layout.model_validate(after)
    )


def test_what_nothing_can_train_is_refused() -> None:
    impossible = Layout.model_validate("dp2 etp2 fp32")
    with pytest.raises(LayoutError, match="on 1 devices"):
        fewer_devices(impossible, 1, DENSE, SEQUENCE, 48)
