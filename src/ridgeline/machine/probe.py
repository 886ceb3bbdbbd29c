"""What `ridgeline probe` measured, as a machine file: rates from the times of actions.

`train/measure.py` takes the times; here they become the few numbers of the planner's formulas, so
that these give the measured times back: the products' first, then what a whole layer takes beyond
its products and attention, and the head beyond its product.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ridgeline.machine.device import PROBED_HEAD_DIM
from ridgeline.machine.local import local_name, write_machine_file

Times = Mapping[str, float]
"""Seconds of an action, by its name."""
LAYERS = 2
"""Of the small decoder that is timed."""


@dataclass(frozen=True)
class Sizes:
    """How large what is timed is, and how often it is."""

    rows: tuple[int, int] = (256, 2048)
    """Tokens of a small and a large micro-batch."""
    widths: tuple[int, int] = (384, 1024)
    """Hidden and inner; the linear layers are every pair of the two."""
    vocab: int = 2048
    square: int = 1024
    """Side of the square product that stands for the peak."""
    sequences: tuple[int, ...] = (256, 512)
    """Lengths at which attention is timed; the decoder has the first."""
    copy_bytes: int = 2**27
    """Of each of the three large tensors."""
    message_bytes: tuple[int, ...] = (2**12, 2**20, 2**23, 2**25)
    rounds: int = 9
    """At most, after one that warms up."""
    seconds: float = 24.0
    """For each number of processes; three rounds are made in any case."""

    @property
    def heads(self) -> int:
        """Attention heads of the hidden width."""
        return max(1, self.widths[0] // PROBED_HEAD_DIM)

    @property
    def decoder(self) -> dict[str, Any]:
        """The small decoder, for the machine file."""
        return {
            "rows": list(self.rows), "hidden": self.widths[0], "heads": self.heads,
            "inner": self.widths[1], "vocab": self.vocab, "sequence": self.sequences[0],
        }  # fmt: skip

    @property
    def parameters(self) -> int:
        """Of the small decoder, its norms left out."""
        hidden, inner = self.widths
        queries = self.heads * PROBED_HEAD_DIM
        return LAYERS * (4 * hidden * queries + 3 * hidden * inner) + 2 * self.vocab * hidden

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(rows, in, out) of the linear layers that are timed."""
        return [(m, k, n) for m in self.rows for k in self.widths for n in self.widths]


@dataclass(frozen=True)
class Measured:
    """Times of all actions, with so many processes at work."""

    processes: int
    threads: int
    precisions: tuple[str, ...]
    times: Times
    software: str
    """What the actions ran on."""


def rows_of(found: Measured, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The device's and the cluster's row, in the catalogue's form."""
    times, count = found.times, found.processes
    moved = 4 * max(1, sizes.copy_bytes // 4)
    bandwidth = math.sqrt((2 * moved / times["copy"]) * (3 * moved / times["triad"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    hop, rate = _link(times, sizes, count) if count > 1 else (0.0, bandwidth)
    peaks: dict[str, float] = {}
    effective: dict[str, dict[str, Any]] = {}
    reduced: list[float] = []
    for name in found.precisions:
        own = {k.removeprefix(f"{name} "): v for k, v in times.items() if k.startswith(f"{name} ")}
        effective[name], peaks[name] = _effective(own, sizes)
        reducing = max(own["reducing"] - own[f"whole {sizes.rows[0]}"], 0.0)
        if count == 1:  # no other rank: what is left of reducing is copying, once per step
            effective[name]["update_s"] += reducing / sizes.parameters
        else:
            reduced.append(reducing)
    if reduced:
        # what passes add when they reduce, but never faster than the collective alone
        sent = 2 * (count - 1) / count * 4 * sizes.parameters
        alone = 2 * (count - 1) * hop + sent / rate
        rate = sent / (max(statistics.fmean(reduced), alone) - 2 * (count - 1) * hop)
    cpu = platform.processor() or platform.machine()
    source = (
        f"ridgeline probe, {datetime.now(UTC):%Y-%m-%d}: {cpu}, {platform.system()}, "
        f"{found.software}, {count} processes of {found.threads} threads"
    )
    device = {
        "reported_as": [],
        "peak_tflops": peaks,
        "source": source,
        "measured": {"memory_gib": memory / 2**30, "memory_tb_s": bandwidth / 1e12},
        "decoder": sizes.decoder,
        "effective": effective,
    }
    cluster = {
        "device": local_name(count),
        "source": source,
        "measured": {
            "nodes": 1, "devices_per_node": count, "links": [[count, rate / 1e9]], "hop_s": hop,
        },
        "assumed": {"nic_gb_s": rate / 1e9},
    }  # fmt: skip
    return device, cluster


def _effective(times: Times, sizes: Sizes) -> tuple[dict[str, Any], float]:
    """The constants of one precision, and the peak: the fastest product seen, in TFLOP/s."""
    work = {each: times["linear {} {} {}".format(*each)] for each in sizes.products}
    rate, edge = fit_products(work)
    attention = []
    for length in sizes.sequences:
        sequences = max(1, sizes.rows[-1] // length)
        flops = 3 * 2 * sequences * length**2 * sizes.heads * PROBED_HEAD_DIM
        attention.append(flops * (1 + edge / length) / times[f"attention {length}"])
    fastest = max(
        2 * sizes.square**3 / times["square"],
        *(6 * m * k * n / seconds for (m, k, n), seconds in work.items()),
    )
    layers = [(times[f"whole {rows}"] - times[f"ends {rows}"]) / LAYERS for rows in sizes.rows]
    return {
        "matrix_tflops": rate / 1e12,
        "edge": edge,
        "attention_tflops": statistics.geometric_mean(attention) / 1e12,
        "layer_s": [max(each, 0.0) for each in layers],
        "ends_s": times[f"ends {sizes.rows[-1]}"],
        "update_s": max(times["step"] - times["reducing"], 0.0) / sizes.parameters,
    }, fastest / 1e12


def fit_products(seconds: Mapping[tuple[int, int, int], float]) -> tuple[float, float]:
    """(rate, edge) of 6·m·k·n·(1+e/m)(1+e/k)(1+e/n) / rate, by (m, k, n), in logarithms."""
    best = (math.inf, 0.0, 0.0)
    for edge in range(0, 513, 2):
        rates = [
            math.log(6 * math.prod(widths) / took)
            + sum(math.log1p(edge / width) for width in widths)
            for widths, took in seconds.items()
        ]
        best = min(best, (statistics.pvariance(rates), statistics.fmean(rates), float(edge)))
    return math.exp(best[1]), best[2]


def _link(times: Times, sizes: Sizes, ranks: int) -> tuple[float, float]:
    """Seconds of a hop and bytes per second of a ring all-reduce, from its smallest and largest."""
    small, large = sizes.message_bytes[0], sizes.message_bytes[-1]
    least, most = times[f"all-reduce {small}"], times[f"all-reduce {large}"]
    rate = 2 * (ranks - 1) / ranks * (large - small) / max(most - least, 1e-9)
    return least / 2 / (ranks - 1), rate


def figures(found: Measured, sizes: Sizes) -> list[tuple[str, str]]:
    """What was measured with one number of processes, for people: name and value per process."""
    device, cluster = rows_of(found, sizes)
    rows = [("memory, copy and triad", f"{device['measured']['memory_tb_s'] * 1e3:.1f} GB/s")]
    for name in found.precisions:
        told = device["effective"][name]
        rows += [
            (f"{name}: fastest product", f"{device['peak_tflops'][name] * 1e3:,.0f} GFLOP/s"),
            (f"{name}: linear layers", f"{told['matrix_tflops'] * 1e3:,.0f} GFLOP/s"),
            (f"{name}: half of that at width", f"{told['edge']:.0f}"),
            (f"{name}: attention", f"{told['attention_tflops'] * 1e3:,.0f} GFLOP/s"),
        ]
        rows += [
            (f"{name}: layer, {tokens:,} tokens", f"{seconds * 1e3:.1f} ms")
            for tokens, seconds in zip(sizes.rows, told["layer_s"], strict=True)
        ]
        rows += [
            (f"{name}: embedding, head, loss", f"{told['ends_s'] * 1e3:.1f} ms"),
            (f"{name}: update of 1M parameters", f"{told['update_s'] * 1e9:.2f} ms"),
        ]
    if found.processes > 1:
        largest, measured = sizes.message_bytes[-1], cluster["measured"]
        rate = _link(found.times, sizes, found.processes)[1]
        rows += [
            ("gloo: one hop", f"{measured['hop_s'] * 1e3:.2f} ms"),
            ("gloo: ring all-reduce", f"{rate / 1e9:.2f} GB/s"),
            ("gloo: the same behind a pass", f"{measured['links'][0][1]:.2f} GB/s"),
        ]
        for name in ("reduce-scatter", "all-gather"):
            rate = largest * (1 - 1 / found.processes) / found.times[name]
            rows.append((f"gloo: {name}", f"{rate / 1e9:.2f} GB/s"))
    return rows


def write_machine(found: list[Measured], sizes: Sizes, file: Path) -> None:
    """Write the machine file at once or not at all. Raises MachineError where it cannot be."""
    import tomlkit

    devices: dict[str, Any] = {}
    clusters: dict[str, Any] = {}
    for each in found:
        name = local_name(each.processes)
        devices[name], clusters[name] = rows_of(each, sizes)
    text = (
        "# This machine, written by `ridgeline probe` in the form of Ridgeline's catalogue. A\n"
        "# device is one process with its share of the cores. What is assumed is never used:\n"
        "# there is one node.\n\n" + tomlkit.dumps({"devices": devices, "clusters": clusters})
    )
    write_machine_file(file, text)
