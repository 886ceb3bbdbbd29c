"""How wide an interval is: by what was fitted, and by how far the question lies from it."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.machine.device import devices
from ridgeline.plan.certainty import BEYOND, UNKNOWN, certainty

WITHIN = {
    "devices": np.array([8.0, 10**6]),
    "sequence": np.array([2048.0, 2048.0]),
    "tensor": np.array([8.0, 8.0]),
    "pipeline": np.array([1.0, 1.0]),
}


@pytest.mark.parametrize(
    ("device", "precision", "stretch"),
    [
        ("H100-SXM-80GB", "bf16", [1.0, BEYOND]),
        ("H100-SXM-80GB", "fp8", [1.0, BEYOND]),
        ("H200-SXM-141GB", "bf16", [BEYOND, BEYOND]),
        ("B200-SXM-180GB", "fp8", [UNKNOWN, UNKNOWN]),
        ("MI300X", "bf16", [UNKNOWN, UNKNOWN]),
    ],
)
def test_the_interval_widens_with_the_distance_from_what_was_fitted(
    device: str, precision: str, stretch: list[float]
) -> None:
    assert certainty().stretch(device, precision, WITHIN).tolist() == stretch


def test_kin_have_the_same_peak_and_were_fitted() -> None:
    sure = certainty()
    assert sure.kin
    for name, relatives in sure.kin.items():
        for relative in relatives:
            assert relative in sure.ranges
            assert devices()[relative].peak_flops["fp16"] == devices()[name].peak_flops["fp16"]


def test_an_interval_is_the_quantile_of_its_class_times_the_stretch() -> None:
    sure = certainty()
    half = sure.half_width["fsdp2 narrow"]
    low, high = sure.interval(np.array([10.0]), "fsdp2", "fp8", np.array([2.0]))
    assert low[0] == pytest.approx(10 * np.exp(-2 * half))
    assert high[0] == pytest.approx(10 * np.exp(2 * half))
    assert sure.class_of("ridgeline", "bf16") == "all"
