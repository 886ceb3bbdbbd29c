"""Devices and their peak rates, each with its source."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources

from ridgeline.errors import MachineError, nearest


@dataclass(frozen=True)
class Device:
    """A device; peaks in FLOP/s, dense, by precision (`bf16`, `fp16`, `fp8`, `fp32`)."""

    name: str
    reported_as: tuple[str, ...]
    peak_flops: dict[str, float]
    source: str


def devices() -> dict[str, Device]:
    """The catalogue, by name."""
    text = resources.files("ridgeline.machine").joinpath("catalogue/devices.toml").read_text()
    return {
        name: Device(
            name,
            tuple(row["reported_as"]),
            {precision: value * 1e12 for precision, value in row["peak_tflops"].items()},
            row["source"],
        )
        for name, row in tomllib.loads(text).items()
    }


def device(name: str) -> Device:
    """The device called `name`. Raises MachineError for an unknown or ambiguous name."""
    if name == "MI250X":
        raise MachineError(
            "device 'MI250X'",
            "one MI250X card is two GCDs, and each GCD is a device: 3,072 GCDs are 1,536 cards "
            "on 384 Frontier nodes, 3,072 cards are 6,144 GCDs on 768",
            "MI250X-GCD, and count GCDs",
        )
    known = devices()
    if name not in known:
        raise MachineError(f"device {name!r}", "it is not in the catalogue", nearest(name, known))
    return known[name]


def recognise(reported: str) -> Device | None:
    """The device that PyTorch reports as `reported`, or None when the catalogue lacks it."""
    found = (
        device for device in devices().values() if any(n in reported for n in device.reported_as)
    )
    return next(found, None)
