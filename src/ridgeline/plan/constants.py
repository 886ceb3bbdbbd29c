"""The calibration: effective shares and overheads, few of them, each with its origin.

`calibration/devices.toml`, `stacks.toml` and `shared.toml` are written by the fit in `bench/`; none
of their numbers is a fact about the hardware, all are what reproduces published runs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources

import numpy as np

from ridgeline.errors import MachineError, nearest
from ridgeline.machine.cluster import Cluster
from ridgeline.plan.quantities import Array, Rates

FILES = ("devices", "stacks", "shared")
JOIN = 3.0
"""Exponent of the power mean that joins a device's time and its host's (assumed)."""
OPTIMIZER_BYTES = 32
"""Read and written per owned parameter: gradient, master, two moments, weight."""
STACKS = ("megatron-deepspeed", "megatron-core", "fsdp1", "fsdp2", "ridgeline")


@dataclass(frozen=True)
class DeviceConstants:
    """Effective shares of one device."""

    matrix: float
    """Large 16-bit matrix products, of the peak."""
    matrix_8: float
    """Large 8-bit products, of the 8-bit peak."""
    matrix_4: float
    """Large 4-bit products, of the 4-bit peak."""
    edge: float
    """Width at which a matrix product reaches half its rate."""
    attention: float
    """The best fused attention kernel at head width 128, of the 16-bit peak."""
    memory: float
    """Element-wise work, of the memory's bandwidth."""
    link: float
    """Collectives within a node, of the link's rate."""
    port: float
    """Collectives between nodes, of the ports' rate."""


@dataclass(frozen=True)
class StackConstants:
    """What a named software stack does to them. At most four are fitted."""

    host: float
    """Seconds of launching per layer and micro-batch: forward, recompute and backward."""
    attention: float
    """Its attention kernel, of the best one."""
    exposed: float
    """Share of overlapped data-parallel communication that is paid all the same."""
    tensor_exposed: float
    """Share of tensor-parallel communication that is not hidden."""
    gather: float
    """Network share that its ZeRO-3 gathers reach."""
    traffic: float
    """Element-wise memory traffic over that of perfectly fused work."""
    selective_matrix: float
    selective_attention: float


@dataclass(frozen=True)
class Shared:
    """Constants of the physics itself, the same for every device and stack."""

    attention_backward: float
    """Backward over forward of fused attention."""
    narrow_heads: float
    """Exponent by which heads narrower than 128 slow fused attention."""
    score_bytes: float
    """Memory traffic per attention score where attention is not fused, forward."""
    softmax_fallback: float
    """Factor on the host's work where Megatron's fused softmax does not apply."""
    head_host: float
    """Host's work on embedding, head and loss per micro-batch, in layers' worth."""
    host_growth: float
    """Growth of the host's work by the launch of tensor ranks' collectives, however many ranks."""
    link_latency: float
    port_latency: float
    """Seconds per hop of a ring within a node, and between nodes."""
    compiled: float
    """Element-wise traffic of a compiled FSDP2 program over the eager one."""
    jitter: float
    """Scatter of a node's step, of which n nodes wait for the slowest: sqrt(2·ln n) times it."""


@dataclass(frozen=True)
class Constants:
    """The whole calibration."""

    devices: Mapping[str, DeviceConstants]
    stacks: Mapping[str, StackConstants]
    shared: Shared
    fitted: Mapping[str, tuple[str, ...]]
    """Names of the fitted constants by `device NAME`, `stack NAME` and `shared`; the rest is
    assumed."""


@cache
def calibration() -> Constants:
    """The calibration that ships with Ridgeline."""
    folder = resources.files("ridgeline.plan").joinpath("calibration")
    return constants_from({name: folder.joinpath(f"{name}.toml").read_text() for name in FILES})


def constants_from(texts: Mapping[str, str]) -> Constants:
    """Constants from the texts of the three TOML files, by name without ending."""
    tables = {name: tomllib.loads(text) for name, text in texts.items()}
    fitted: dict[str, tuple[str, ...]] = {}

    def numbers(label: str, row: dict[str, dict[str, float]]) -> dict[str, float]:
        fitted[label] = tuple(row.get("fitted", {}))
        return {**row.get("assumed", {}), **row.get("fitted", {})}

    return Constants(
        {k: DeviceConstants(**numbers(f"device {k}", v)) for k, v in tables["devices"].items()},
        {k: StackConstants(**numbers(f"stack {k}", v)) for k, v in tables["stacks"].items()},
        Shared(**numbers("shared", tables["shared"])),
        fitted,
    )


def rates_of(
    clusters: list[Cluster],
    stacks: list[str],
    precisions: list[str],
    compiled: list[bool],
    constants: Constants,
) -> Rates:
    """The effective rates of every row; arrays as long as the lists.

    Raises MachineError for a device or stack that is not calibrated, and for a precision that the
    device does not have.
    """
    devices = [one(constants.devices, cluster.device.name) for cluster in clusters]
    for name in stacks:
        if name not in constants.stacks:
            raise MachineError(
                f"stack {name!r}", "no such software is calibrated", nearest(name, constants.stacks)
            )
    kinds = [constants.stacks[name] for name in stacks]

    def array(values: list[float]) -> Array:
        return np.array(values, dtype=np.float64)

    peak_16 = array([peak(cluster, "bf16") for cluster in clusters])
    at = array([peak(c, p) for c, p in zip(clusters, precisions, strict=True)])
    share = array([_share(d, p) for d, p in zip(devices, precisions, strict=True)])
    traffic = [
        k.traffic * (constants.shared.compiled if c else 1.0)
        for k, c in zip(kinds, compiled, strict=True)
    ]
    links = array([c.node.links[-1][1] for c in clusters]) * array([d.link for d in devices])
    near = array([c.node.links[0][1] for c in clusters]) * array([d.link for d in devices])
    ports = array([c.network.node_bandwidth / c.node.devices for c in clusters])
    memory = array([(c.device.memory_bandwidth or np.nan) for c in clusters])
    memory = memory * array([d.memory for d in devices])
    return Rates(
        peak=at,
        matrix=at * share,
        matrix_16=peak_16 * array([d.matrix for d in devices]),
        cast=array([CAST_BYTES if p in NARROW else 0.0 for p in precisions]),
        edge=array([d.edge for d in devices]),
        attention=peak_16
        * array([d.attention * k.attention for d, k in zip(devices, kinds, strict=True)]),
        memory=memory,
        near_ranks=array([c.node.links[0][0] for c in clusters]),
        near=near,
        node_ranks=array([c.node.devices for c in clusters]),
        link=links,
        port=ports * array([d.port for d in devices]),
        pod_ranks=array([c.network.pod_devices or np.inf for c in clusters]),
        oversubscription=array([c.network.oversubscription for c in clusters]),
        link_latency=np.full(len(clusters), constants.shared.link_latency),
        port_latency=np.full(len(clusters), constants.shared.port_latency),
        host=array([k.host for k in kinds]),
        traffic=array(traffic),
        exposed=array([k.exposed for k in kinds]),
        tensor_exposed=array([k.tensor_exposed for k in kinds]),
        gather=array([k.gather for k in kinds]),
        join=np.full(len(clusters), JOIN),
        loss_traffic=array(traffic),
        update=OPTIMIZER_BYTES / memory,
        selective_matrix=array([k.selective_matrix for k in kinds]),
        selective_attention=array([k.selective_attention for k in kinds]),
    )


NARROW = ("fp8", "mxfp8", "nvfp4")
CAST_BYTES = 3.0
"""Read and written to convert one element of a product from 16 to 8 bits."""


def peak(cluster: Cluster, precision: str) -> float:
    """FLOP/s of the device in `precision`; MachineError where it has none.

    bf16 on a device without it (V100) is taken at the fp16 peak, fp32 where only that is known.
    """
    wanted = {"mxfp8": "fp8", "nvfp4": "fp4"}.get(precision, precision)
    peaks = cluster.device.peak_flops
    if wanted == "bf16" and "bf16" not in peaks:
        wanted = "fp16"
    if wanted not in peaks:
        raise MachineError(
            f"precision {precision} on {cluster.device.name}",
            f"the catalogue knows its peaks in {', '.join(peaks)}",
            next(iter(peaks)),
        )
    return peaks[wanted]


def one(devices: Mapping[str, DeviceConstants], name: str) -> DeviceConstants:
    """The constants of a device. Raises MachineError where it is not calibrated."""
    if name not in devices:
        raise MachineError(
            f"planning on {name}", "nothing is known of how fast it runs", nearest(name, devices)
        )
    return devices[name]


def _share(device: DeviceConstants, precision: str) -> float:
    if precision in ("fp8", "mxfp8"):
        return device.matrix_8
    return device.matrix_4 if precision == "nvfp4" else device.matrix


def names_of(kind: type) -> list[str]:
    """Names of the constants of a dataclass."""
    return [each.name for each in fields(kind)]
