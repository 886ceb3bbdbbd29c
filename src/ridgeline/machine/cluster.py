"""Clusters: nodes of devices, the links within a node and the network between nodes."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from ridgeline.errors import MachineError, nearest
from ridgeline.machine.device import Device, device, devices, merged
from ridgeline.machine.local import (
    LOCAL,
    is_local,
    local_name,
    local_processes,
    local_row,
    unreadable,
)

MOST_DEVICES = 10_000_000
"""More than any machine has by far: a count above it is a slip, not a question."""


@dataclass(frozen=True)
class Node:
    """Devices that share a host and fast links."""

    devices: int
    links: tuple[tuple[int, float], ...]
    """(ranks, bytes per second): within so many neighbouring ranks each has that rate, one way."""
    overhead_w: float | None = None
    """Power of the node beside its devices."""
    hop_s: float | None = None
    """Latency of one hop of a collective within the node; None: not known of this machine."""


@dataclass(frozen=True)
class Network:
    """What joins nodes."""

    node_bandwidth: float
    """Bytes per second out of one node over all of its ports, one way."""
    pod_devices: int | None = None
    """Devices within which the network has full bisection; None: all."""
    oversubscription: float = 1.0
    """Beyond a pod each port has its rate divided by this."""
    topology: str | None = None
    """How nodes are joined: dragonfly, fat tree, rail, torus. What that costs is in the other
    fields: a ring's neighbours share a port alike in all of them, until a pod is oversubscribed."""


@dataclass(frozen=True)
class Cluster:
    """A machine, or the part of it that is meant."""

    name: str
    device: Device
    node: Node
    network: Network
    nodes: int | None
    """Nodes of the whole machine; None where it has no fixed size."""
    source: str
    pue: float | None = None
    """Power of the centre over the power of its nodes."""
    failures_per_device_hour: float | None = None
    price_per_device_hour: float | None = None
    currency: str | None = None
    origins: dict[str, str] = field(default_factory=dict)
    """How each number is known: read, measured or assumed."""


def clusters() -> dict[str, Cluster]:
    """The catalogue, by name."""
    return dict(_clusters()[0])


def cluster(name: str) -> Cluster:
    """The cluster of that name, or the one that stands for the device of that name.

    A name may be shortened to any beginning that fits one device or cluster only (`H100` is
    H100-SXM-80GB, since that stands first among its kin); `local` is this machine, where it was
    measured. Raises MachineError.
    """
    if is_local(name):
        row = local_row("clusters", name)
        try:
            return _cluster(name, row)
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise unreadable(name, fault) from None
    known, standing = _clusters()
    if name in known:
        return known[name]
    found = full_device_name(name)
    if found not in standing:
        raise MachineError(
            f"device {name!r}", "no node of it is in the catalogue", nearest(name, standing)
        )
    return standing[found]


def full_device_name(name: str) -> str:
    """`H100` → `H100-SXM-80GB`. Raises MachineError for an unknown or ambiguous name."""
    name = re.sub(r"\s*\((per GPU|Trillium)\)$", "", name)
    known = devices()
    if name in known or name == "MI250X":
        return device(name).name
    begins = [full for full in known if full.startswith(name + "-")]
    usual = [full for full in begins if full.endswith("-SXM-80GB")]
    if len(begins) == 1 or (usual and name in ("A100", "H100")):
        return (usual or begins)[0]
    if begins:
        raise MachineError(
            f"device {name!r}", f"it could be {' or '.join(begins)}", f"{begins[0]} in full"
        )
    raise MachineError(
        f"device or machine {name!r}",
        "it is not in the catalogue",
        nearest(name, [*known, *_clusters()[0]]),
    )


def parse_devices(text: str) -> tuple[int, Cluster]:
    """`16384xH100-SXM-80GB`, `3072xFrontier`: how many devices, and of which machine.

    `2xlocal` is two processes on this machine, `local` as many as it was measured with.

    Raises MachineError for a sentence of another form, an unknown machine, and more devices than
    the machine has.
    """
    if text.strip() == LOCAL:
        text = f"{local_processes()}x{LOCAL}"
    match = re.fullmatch(r"(-?[\d_,]{1,30})\s*[x×*]\s*(.+)", text.strip())
    if match is None or not re.search(r"\d", match[1]):
        raise MachineError(
            f"machine {text!r}", "a machine is a number of devices and their name",
            "8xH100-SXM-80GB, 3072xFrontier",
        )  # fmt: skip
    count = int(re.sub(r"[_,]", "", match[1]))
    if not 1 <= count <= MOST_DEVICES:
        raise MachineError(
            f"{count:,} devices",
            f"a machine has from 1 to {MOST_DEVICES:,} devices",
            f"{min(max(count, 1), MOST_DEVICES)}x{match[2].strip()}",
        )
    if is_local(match[2].strip()):
        if match[2].strip() not in (LOCAL, local_name(count)):
            raise MachineError(
                f"machine {text!r}", "processes are counted once", f"{count}x{LOCAL}"
            )
        return count, cluster(local_name(count))
    found = cluster(match[2].strip())
    whole = None if found.nodes is None else found.nodes * found.node.devices
    named = match[2].strip() in _clusters()[0]
    if named and whole is not None and count > whole:
        raise MachineError(
            f"{count} devices of {found.name}",
            f"it has {found.nodes}·{found.node.devices} = {whole}",
            f"{whole}x{found.name}",
        )
    return count, found


@cache
def _clusters() -> tuple[dict[str, Cluster], dict[str, Cluster]]:
    """By name, and by the device that each stands for."""
    text = resources.files("ridgeline.machine").joinpath("catalogue/clusters.toml").read_text()
    rows = tomllib.loads(text)
    named = {name: _cluster(name, row) for name, row in rows.items()}
    standing = {row["device"]: named[name] for name, row in rows.items() if row.get("stands_for")}
    return named, standing


def _cluster(name: str, row: dict[str, Any]) -> Cluster:
    numbers, origins = merged(row)
    links = tuple((int(ranks), rate * 1e9) for ranks, rate in numbers["links"])
    return Cluster(
        name=name,
        device=device(row["device"]),
        node=Node(numbers["devices_per_node"], links, numbers.get("node_w"), numbers.get("hop_s")),
        network=Network(
            numbers["nic_gb_s"] * 1e9,
            numbers.get("pod_devices"),
            numbers.get("oversubscription", 1.0),
            numbers.get("topology"),
        ),
        nodes=numbers.get("nodes"),
        source=row["source"],
        pue=numbers.get("pue"),
        failures_per_device_hour=numbers.get("failures_per_device_hour"),
        price_per_device_hour=numbers.get("price_per_device_hour"),
        currency=row.get("currency"),
        origins=origins,
    )
