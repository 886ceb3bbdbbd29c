"""The catalogue of machines as text: one line each, or every number of one and how it is known."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ridgeline.human import DASH
from ridgeline.machine.cluster import Cluster, cluster, clusters
from ridgeline.machine.corrections import FACTORS, read_corrections
from ridgeline.machine.device import Device, devices
from ridgeline.plan.certainty import certainty
from ridgeline.plan.constants import DeviceConstants, calibration, names_of

WIDTH = 100
HEADINGS = ("machine", "device", "of a node", "nodes", "peak", "memory", "node's ports", "network")
MEANINGS = {
    "matrix": "large 16-bit products, of the peak",
    "matrix_8": "large 8-bit products, of their peak",
    "matrix_4": "large 4-bit products, of their peak",
    "edge": "width of a product at half that rate",
    "attention": "fused attention, of the 16-bit peak",
    "memory": "element-wise work, of the bandwidth",
    "link": "collectives in a node, of the links",
    "port": "between nodes, of the ports",
}
NOTE = (
    "peak: dense TFLOP/s of one device in 16 bits. All numbers of a machine or device, and how "
    "each is known: ridgeline machines NAME. A device alone means the machine that stands for "
    "it; this machine is `local`, once ridgeline probe has measured it."
)


def table() -> str:
    """Every machine of the catalogue on one line."""
    rows = [HEADINGS, *(_row(each) for each in clusters().values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                row[1].ljust(widths[1]),
                *map(str.rjust, row[2:7], widths[2:7]),
                row[7],
            ]
        )
        for row in rows
    ]
    return "\n".join([*lines, "", *textwrap.wrap(NOTE, WIDTH)])


def _row(each: Cluster) -> tuple[str, ...]:
    peaks = each.device.peak_flops
    peak = next(peaks[name] for name in ("bf16", "fp16", "fp32") if name in peaks)
    memory = each.device.memory_bytes
    return (
        each.name,
        each.device.name,
        f"{each.node.devices:,}",
        DASH if each.nodes is None else f"{each.nodes:,}",
        f"{peak / 1e12:,.5g}",
        DASH if memory is None else f"{memory / 2**30:g} GiB",
        f"{each.network.node_bandwidth / 1e9:,g} GB/s",
        each.network.topology or DASH,
    )


def describe(name: str) -> str:
    """Every number of a machine, or of the one that stands for a device, with its origin.

    Raises MachineError, with the nearest name, for one that is not in the catalogue.
    """
    alone = devices().get(name)
    standing = any(each.device.name == name for each in clusters().values())
    if alone is not None and not standing:  # a device without a node can be described all the same
        return "\n".join(_section(f"device {name}", alone.source, _device_rows(alone)))
    found = cluster(name)
    device = found.device
    lines = _section(found.name, found.source, _cluster_rows(found))
    lines += ["", *_section(f"device {device.name}", device.source, _device_rows(device))]
    known = calibration().devices.get(device.name)
    if known is not None:
        lines += ["", f"what the planner takes of it ({_evidence(device)})"]
        lines += [_line(*row) for row in _calibrated_rows(device, known)]
    for precision, by in read_corrections(device.name).items():
        lines += ["", *textwrap.wrap(f"corrected in {precision} by {by.source}", WIDTH)]
        lines += [_line(f"seconds of {name}", f"x{getattr(by, name):.3f}", "measured")
                  for name in FACTORS]  # fmt: skip
    return "\n".join(lines)


def _section(title: str, source: str, rows: Iterator[tuple[str, str, str]]) -> list[str]:
    told = textwrap.wrap(f"source: {source}", WIDTH)
    return [title, *told, *(_line(*row) for row in rows)]


def _line(name: str, value: str, origin: str) -> str:
    return f"  {name:44} {value:>16}  {origin}".rstrip()


def _cluster_rows(found: Cluster) -> Iterator[tuple[str, str, str]]:
    node, network, how = found.node, found.network, found.origins

    def row(name: str, value: float | None, unit: str, key: str) -> tuple[str, str, str]:
        said = DASH if value is None else f"{value:,.6g} {unit}".rstrip()
        return name, said, how.get(key, "not known" if value is None else "")

    yield row("devices of a node", node.devices, "", "devices_per_node")
    yield row("nodes", found.nodes, "", "nodes")
    for ranks, rate in node.links:
        yield row(f"link within {ranks} neighbours, one way", rate / 1e9, "GB/s", "links")
    yield row("all ports of a node, one way", network.node_bandwidth / 1e9, "GB/s", "nic_gb_s")
    yield "network", network.topology or DASH, how.get("topology", "not known")
    if network.pod_devices is not None:
        yield row("devices of a pod", network.pod_devices, "", "pod_devices")
        yield row("oversubscription beyond", network.oversubscription, "", "oversubscription")
    yield row("power of a node beside its devices", node.overhead_w, "W", "node_w")
    yield row("power of the centre over its nodes'", found.pue, "", "pue")
    failures = found.failures_per_device_hour
    yield row("failures per device and hour", failures, "", "failures_per_device_hour")
    price = found.price_per_device_hour
    yield row("price of a device-hour", price, found.currency or "", "price_per_device_hour")


def _device_rows(device: Device) -> Iterator[tuple[str, str, str]]:
    how = device.origins
    for precision, peak in device.peak_flops.items():
        yield f"dense peak in {precision}", f"{peak / 1e12:,g} TFLOP/s", how["peak_tflops"]
    for name, value, one, unit, key in (
        ("memory", device.memory_bytes, 2.0**30, "GiB", "memory_gib"),
        ("its bandwidth", device.memory_bandwidth, 1e12, "TB/s", "memory_tb_s"),
        ("power limit", device.power_w, 1.0, "W", "power_w"),
        ("idle power", device.idle_w, 1.0, "W", "idle_w"),
    ):
        said = DASH if value is None else f"{value / one:,g} {unit}"
        yield name, said, how.get(key, "not known")


def _calibrated_rows(device: Device, known: DeviceConstants) -> Iterator[tuple[str, str, str]]:
    fitted = calibration().fitted[f"device {device.name}"]
    needs = {"matrix_8": "fp8", "matrix_4": "fp4"}
    for name in names_of(DeviceConstants):
        if needs.get(name, "fp32") not in {*device.peak_flops, "fp32"}:
            continue
        value = getattr(known, name)
        shown = f"{value:.1f}" if name == "edge" else f"{value:.1%}"
        yield f"{name}: {MEANINGS[name]}", shown, "fitted" if name in fitted else "assumed"


def _evidence(device: Device) -> str:
    seen = certainty().ranges.get(device.name)
    if seen is None:
        return "no published run: all assumed, from its kin"
    return (
        f"published runs on up to {seen['devices']:,.0f} devices, sequences of up to "
        f"{seen['sequence']:,.0f}"
    )
