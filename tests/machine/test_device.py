"""The catalogue of devices: peaks as published, and names that could mean two refused."""

from __future__ import annotations

import pytest

from ridgeline.errors import MachineError
from ridgeline.machine.device import device, devices, recognise


def test_every_device_has_its_peaks_and_their_source() -> None:
    for name, found in devices().items():
        assert found.source
        assert set(found.peak_flops) <= {"bf16", "fp16", "fp4", "fp8", "fp32", "fp64"}
        # Nothing computes below 1 TFLOP/s or, per device, above 20 PFLOP/s dense: a slip of units.
        assert all(1e12 < peak < 20e15 for peak in found.peak_flops.values()), name


def test_peaks_are_dense() -> None:
    # NVIDIA's H100 datasheet prints 1,979 TFLOP/s in bf16, with sparsity; dense is half of it.
    assert device("H100-SXM-80GB").peak_flops["bf16"] == 989e12
    # ORNL's Frontier user guide: an MI250X of two GCDs has 383 TFLOP/s in bf16.
    assert device("MI250X-GCD").peak_flops["bf16"] == 191.5e12


def test_a_card_of_two_devices_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(MachineError, match="two GCDs") as caught:
        device("MI250X")
    assert caught.value.remedy.startswith("MI250X-GCD")
    assert device("MI250X-GCD")


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(MachineError) as caught:
        device("H100-80GB")
    assert caught.value.remedy == "did you mean 'H100-SXM-80GB'?"


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("NVIDIA H200", "H200-SXM-141GB"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GH200 120GB", "GH200-96GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("AMD Instinct MI250X", "MI250X-GCD"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_devices_are_recognised_by_what_pytorch_reports(reported: str, name: str | None) -> None:
    found = recognise(reported)
    assert (found.name if found else None) == name
