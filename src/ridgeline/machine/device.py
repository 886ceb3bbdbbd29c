"""Devices: peaks, memory, bandwidth and power, each with its source."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from ridgeline.errors import MachineError, nearest
from ridgeline.machine.local import is_local, local_row, unreadable

ORIGINS = ("read", "measured", "assumed")
"""How a number of the catalogue is known."""


CPUS = ("A64FX",)
"""Devices of the catalogue that run PyTorch's CPU kernels."""
PROBED_HEAD_DIM = 64
"""Head width at which the probe measures attention."""


@dataclass(frozen=True)
class Decoder:
    """The small Llama, of heads PROBED_HEAD_DIM wide, whose passes `ridgeline probe` timed."""

    rows: tuple[int, int]
    """Tokens of a small and a large micro-batch."""
    hidden: int
    heads: int
    inner: int
    """Width within the gated MLP."""
    vocab: int
    sequence: int


@dataclass(frozen=True)
class Effective:
    """What a device reaches in one precision, as `ridgeline probe` measures it."""

    matrix_flops: float
    """FLOP/s of large linear layers, forward and backward."""
    edge: float
    """Width at which a matrix product reaches half that rate."""
    attention_flops: float
    """FLOP/s of causal fused attention over long sequences at PROBED_HEAD_DIM, forward and
    backward, counted as three times the forward pass over half of the square."""
    decoder: Decoder
    """What the times below are of."""
    layer_s: tuple[float, float]
    """Seconds of one of its layers, forward and backward, with few rows and many."""
    ends_s: float
    """Seconds of its embedding, head and loss, forward and backward, with many rows."""
    update_s: float
    """Seconds per parameter of clipping, updating and zeroing, once per step."""


@dataclass(frozen=True)
class Device:
    """A device; peaks in FLOP/s, dense, by precision (`bf16`, `fp16`, `fp8`, `fp4`, `fp32`)."""

    name: str
    reported_as: tuple[str, ...]
    peak_flops: dict[str, float]
    source: str
    memory_bytes: float | None = None
    """Memory of one device; None where the catalogue does not know it."""
    memory_bandwidth: float | None = None
    """Bytes per second between the device and its memory."""
    power_w: float | None = None
    """Power limit of the board, its share per device."""
    idle_w: float | None = None
    """Power of an idle device."""
    origins: dict[str, str] = field(default_factory=dict)
    """How each number is known: read, measured or assumed; all peaks as `peak_tflops`."""
    effective: dict[str, Effective] = field(default_factory=dict)
    """By precision; empty in the catalogue: only `ridgeline probe` measures it."""


def is_cpu(name: str) -> bool:
    """Whether a device is a CPU; this machine is, as far as it was probed."""
    return is_local(name) or name in CPUS


def devices() -> dict[str, Device]:
    """The catalogue, by name."""
    return dict(_devices())


def device(name: str) -> Device:
    """The device called `name`; `local` is this machine, where it was measured.

    Raises MachineError for an unknown or ambiguous name, and a bad machine file.
    """
    if is_local(name):
        row = local_row("devices", name)
        try:
            return _device(name, row | {"peaks": "measured"})
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise unreadable(name, fault) from None
    if name == "MI250X":
        raise MachineError(
            "device 'MI250X'",
            "one MI250X card is two GCDs, and each GCD is a device: 3,072 GCDs are 1,536 cards "
            "on 384 Frontier nodes, 3,072 cards are 6,144 GCDs on 768",
            "MI250X-GCD, and count GCDs",
        )
    known = _devices()
    if name not in known:
        raise MachineError(f"device {name!r}", "it is not in the catalogue", nearest(name, known))
    return known[name]


def recognise(reported: str) -> Device | None:
    """The device that PyTorch reports as `reported`, or None when the catalogue lacks it.

    The longest name that fits decides: a GB200 is no B200.
    """
    fitting = (
        (len(name), device)
        for device in devices().values()
        for name in device.reported_as
        if name in reported
    )
    return max(fitting, key=lambda pair: pair[0], default=(0, None))[1]


def merged(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers of a catalogue row from its tables of origin, and the origin of each."""
    numbers: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin in ORIGINS:
        for key, value in row.get(origin, {}).items():
            numbers[key], origins[key] = value, origin
    return numbers, origins


@cache
def _devices() -> dict[str, Device]:
    text = resources.files("ridgeline.machine").joinpath("catalogue/devices.toml").read_text()
    return {name: _device(name, row) for name, row in tomllib.loads(text).items()}


def _device(name: str, row: dict[str, Any]) -> Device:
    numbers, origins = merged(row)
    memory, bandwidth = numbers.get("memory_gib"), numbers.get("memory_tb_s")
    return Device(
        name,
        tuple(row["reported_as"]),
        {precision: value * 1e12 for precision, value in row["peak_tflops"].items()},
        row["source"],
        memory_bytes=None if memory is None else memory * 2.0**30,
        memory_bandwidth=None if bandwidth is None else bandwidth * 1e12,
        power_w=numbers.get("power_w"),
        idle_w=numbers.get("idle_w"),
        origins={"peak_tflops": row.get("peaks", "read"), **origins},
        effective={
            precision: Effective(
                matrix_flops=told["matrix_tflops"] * 1e12,
                edge=told["edge"],
                attention_flops=told["attention_tflops"] * 1e12,
                decoder=Decoder(**row["decoder"] | {"rows": _pair(row["decoder"]["rows"])}),
                layer_s=_pair(told["layer_s"]),
                ends_s=told["ends_s"],
                update_s=told["update_s"],
            )
            for precision, told in row.get("effective", {}).items()
        },
    )


def _pair(values: list[Any]) -> tuple[Any, Any]:
    few, many = values
    return few, many
