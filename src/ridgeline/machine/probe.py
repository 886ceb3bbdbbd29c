"""`ridgeline probe`: measure this machine's CPU the way training uses it.

The processes of one layout compute at the same time, as they will in training: each round every
process passes a barrier and times one action, then the next. A figure is the fastest of the rounds:
what else runs on the machine only ever slows it.
This is the one planning module that imports torch.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from ridgeline.errors import LaunchError, MachineError
from ridgeline.machine.device import PROBED_HEAD_DIM
from ridgeline.machine.local import local_name

Action = Callable[[], object]
Times = dict[str, float]
"""Seconds of the fastest round, by the name of the action."""
PATIENCE_S = 120.0
"""Seconds without a word after which the measuring processes are given up."""


@dataclass(frozen=True)
class Sizes:
    """How large what is timed is, and how often it is."""

    rows: int = 2048
    """Tokens of a micro-batch."""
    widths: tuple[int, int] = (384, 1024)
    """Hidden and inner; the linear layers are every pair of the two."""
    square: int = 1024
    """Side of the square product that stands for the peak."""
    sequences: tuple[int, ...] = (256, 512)
    copy_bytes: int = 2**27
    """Of each of the three large tensors."""
    message_bytes: tuple[int, ...] = (2**12, 2**20, 2**23, 2**25)
    rounds: int = 9
    """At most, after one that warms up."""
    seconds: float = 14.0
    """For each number of processes; three rounds are made in any case."""


@dataclass(frozen=True)
class Measured:
    """Times of all actions, with so many processes at work."""

    processes: int
    threads: int
    precisions: tuple[str, ...]
    times: Times


def probe(
    processes: Iterable[int], sizes: Sizes, tell: Callable[[str, float], None]
) -> list[Measured]:
    """Measure with each number of processes; `tell` hears what is timed and the share done.

    Raises MachineError where there is an accelerator or too few cores, LaunchError where a process
    dies.
    """
    counts, cores = sorted(set(processes)), len(os.sched_getaffinity(0))
    if torch.accelerator.is_available():
        raise MachineError(
            "probing this machine",
            "it has an accelerator, and the probe measures CPUs",
            "--on with the accelerator's name in the catalogue, such as 8xH100-SXM-80GB",
        )
    if counts[0] < 1 or counts[-1] > cores:
        raise MachineError(
            f"probing with {counts[0] if counts[0] < 1 else counts[-1]} processes",
            f"each needs a core, and this machine has {cores}",
            f"--processes {cores}",
        )
    found = []
    for place, count in enumerate(counts):

        def said(what: str, share: float, place: int = place) -> None:
            tell(what, (place + share) / len(counts))

        found.append(_measure(count, max(1, cores // count), sizes, said))
    return found


def usual_processes() -> list[int]:
    """One process, and as many as training starts by itself: one per NUMA domain, at least two."""
    cores = len(os.sched_getaffinity(0))
    domains = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return sorted({1, min(cores, max(2, domains))})


def precisions() -> tuple[str, ...]:
    """What this CPU multiplies natively: float32, and bf16 where its flags say so."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8").split()) if flags.exists() else set()
    return ("bf16", "fp32") if words & {"amx_bf16", "avx512_bf16", "bf16"} else ("fp32",)


def _measure(
    processes: int, threads: int, sizes: Sizes, tell: Callable[[str, float], None]
) -> Measured:
    """Start the processes, pass on what rank 0 says, and see that all of them end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", __name__])
    ours, theirs = context.Pipe(duplex=False)
    native = precisions()
    with tempfile.TemporaryDirectory(prefix="ridgeline-") as folder:
        arguments = (processes, threads, sizes, native, f"file://{folder}/meeting", theirs)
        workers = [
            context.Process(target=_work, args=(rank, *arguments), daemon=True)
            for rank in range(processes)
        ]
        try:
            for worker in workers:
                worker.start()
            theirs.close()
            said = _next(ours)
            while not isinstance(said, dict):
                tell(*said)
                said = _next(ours)
            for worker in workers:
                worker.join(PATIENCE_S)
        finally:
            ours.close()
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
    return Measured(processes, threads, native, said)


def _next(ours: Connection) -> Any:
    """What rank 0 says next. Raises LaunchError when it died or hangs."""
    try:
        if ours.poll(PATIENCE_S):
            return ours.recv()
        why = f"none said a word for {PATIENCE_S:.0f} s"
    except EOFError:
        why = "one of them died"
    raise LaunchError("the processes that measure", why, "its traceback stands above")


def _work(
    rank: int, processes: int, threads: int, sizes: Sizes,
    native: tuple[str, ...], meeting: str, tell: Connection,
) -> None:  # fmt: skip
    """One measuring process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    warnings.simplefilter("ignore", FutureWarning)  # 2.13 renames two collectives, 2.11 has not
    torch.set_num_threads(threads)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    actions = _memory(sizes) | (_collectives(sizes, processes) if processes > 1 else {})
    for name in native:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        actions |= {f"{name} {what}": action for what, action in _compute(sizes, dtype).items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    begun, turn = time.monotonic(), 0
    while turn <= sizes.rounds and _agreed(turn < 4 or time.monotonic() - begun < sizes.seconds):
        for place, (name, action) in enumerate(actions.items()):
            if rank == 0:
                rounds = (turn + place / len(actions)) / (sizes.rounds + 1)
                share = max(rounds, min(1.0, (time.monotonic() - begun) / sizes.seconds))
                tell.send((f"{processes} x {threads} threads: {name}", share))
            dist.barrier()
            start = time.perf_counter()
            action()
            if turn:  # the first round only warms up
                seconds[name].append(time.perf_counter() - start)
        turn += 1
    dist.barrier()
    if rank == 0:
        tell.send({name: min(taken) for name, taken in seconds.items()})
    dist.destroy_process_group()


def _agreed(more: bool) -> bool:
    """Rank 0's word, on every rank."""
    word = torch.tensor(more)
    dist.broadcast(word, 0)
    return bool(word)


def _memory(sizes: Sizes) -> dict[str, Action]:
    """Copy and triad over tensors too large for the caches."""
    a, b, c = (torch.ones(max(1, sizes.copy_bytes // 4)) for _ in range(3))
    return {
        "copy": lambda: a.copy_(b),
        "triad": lambda: torch.add(b, c, alpha=3.0, out=a),
    }


def _collectives(sizes: Sizes, ranks: int) -> dict[str, Action]:
    """All-reduces by size, and one reduce-scatter and all-gather of the largest size."""
    actions: dict[str, Action] = {}
    for size in sizes.message_bytes:
        message = torch.zeros(max(1, size // 4))
        actions[f"all-reduce {size}"] = lambda m=message: dist.all_reduce(m)  # type: ignore[misc]
    part = torch.zeros(max(1, sizes.message_bytes[-1] // 4 // ranks))
    whole = torch.zeros(part.numel() * ranks)
    actions["reduce-scatter"] = lambda: dist.reduce_scatter_tensor(part, whole)
    actions["all-gather"] = lambda: dist.all_gather_into_tensor(whole, part)
    return actions


def _linears(sizes: Sizes) -> list[tuple[int, int]]:
    """(in, out) of the linear layers that are timed."""
    return [(k, n) for k in sizes.widths for n in sizes.widths]


def _compute(sizes: Sizes, dtype: torch.dtype) -> dict[str, Action]:
    """Matrix products, attention, element-wise work and dispatch, forward and backward."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    def both(forward: Callable[[], torch.Tensor]) -> Action:
        gradient = torch.randn_like(forward())
        return lambda: torch.autograd.backward(forward(), gradient)

    left, right = (torch.randn(sizes.square, sizes.square, dtype=dtype) for _ in range(2))
    actions: dict[str, Action] = {"square": lambda: left @ right}
    for k, n in _linears(sizes):
        x, weight = leaf(sizes.rows, k), leaf(n, k)
        actions[f"linear {k} {n}"] = both(lambda x=x, w=weight: functional.linear(x, w))  # type: ignore[misc]
    for length in sizes.sequences:
        shape = (max(1, sizes.rows // length), _heads(sizes), length, PROBED_HEAD_DIM)
        q, k_, v = leaf(*shape), leaf(*shape), leaf(*shape)

        def attention(
            q: torch.Tensor = q, k: torch.Tensor = k_, v: torch.Tensor = v
        ) -> torch.Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        actions[f"attention {length}"] = both(attention)
    hidden, inner = sizes.widths[0], sizes.widths[1]
    smooth = [leaf(sizes.rows, hidden) for _ in range(4)] + [leaf(sizes.rows, inner)] * 2
    actions["element-wise"] = both(lambda: _element_wise(*smooth))
    tiny = [leaf(8, 8) for _ in range(7)]
    actions["dispatch"] = both(lambda: _tiny_layer(*tiny))
    return actions


def _heads(sizes: Sizes) -> int:
    return max(1, sizes.widths[0] // PROBED_HEAD_DIM)


def _element_wise(
    x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    gate: torch.Tensor, up: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What a layer does between its products: norms, rotation, residual sums and the gate."""
    width, angle = x.shape[-1:], torch.ones(x.shape[-1])
    normal = functional.rms_norm(x, width)
    q, k = (torch.addcmul(t * angle, t.roll(width[0] // 2, -1), angle).to(x.dtype) for t in (q, k))
    x = x + normal + q + k + v
    x = x + functional.rms_norm(x, width)
    return x.sum() + (functional.silu(gate) * up).sum()


def _tiny_layer(
    x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, up: torch.Tensor, gate: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """A layer so narrow that only the calling of its operations takes time."""
    normal = functional.rms_norm(x, x.shape[-1:])
    q, k, v = (functional.linear(normal, w).view(1, 1, 8, 8) for w in (query, key, value))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + functional.linear(mixed.view(8, 8), out)
    normal = functional.rms_norm(x, x.shape[-1:])
    gated = functional.silu(functional.linear(normal, gate)) * functional.linear(normal, up)
    return x + functional.linear(gated, out)


def rows_of(found: Measured, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The device's and the cluster's row, in the catalogue's form."""
    times, count = found.times, found.processes
    moved = 4 * max(1, sizes.copy_bytes // 4)
    bandwidth = math.sqrt((2 * moved / times["copy"]) * (3 * moved / times["triad"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    peaks: dict[str, float] = {}
    effective: dict[str, dict[str, float]] = {}
    for name in found.precisions:
        own = {k.removeprefix(f"{name} "): v for k, v in times.items() if k.startswith(f"{name} ")}
        effective[name], peaks[name] = _effective(own, sizes, bandwidth)
    cpu = platform.processor() or platform.machine()
    source = (
        f"ridgeline probe, {datetime.now(UTC):%Y-%m-%d}: {cpu}, {platform.system()}, "
        f"PyTorch {torch.__version__}, {count} processes of {found.threads} threads"
    )
    hop, rate = _link(times, sizes, count) if count > 1 else (0.0, bandwidth)
    device = {
        "reported_as": [],
        "peak_tflops": peaks,
        "source": source,
        "measured": {"memory_gib": memory / 2**30, "memory_tb_s": bandwidth / 1e12},
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


def _effective(
    times: Mapping[str, float], sizes: Sizes, bandwidth: float
) -> tuple[dict[str, float], float]:
    """The constants of one precision, and the peak: the fastest product seen, in TFLOP/s."""
    rows, hidden, inner = sizes.rows, sizes.widths[0], sizes.widths[1]
    work = {(k, n): times[f"linear {k} {n}"] for k, n in _linears(sizes)}
    rate, edge = fit_products(rows, work)
    attention = []
    for length in sizes.sequences:
        sequences = max(1, rows // length)
        flops = 3 * 2 * sequences * length**2 * _heads(sizes) * PROBED_HEAD_DIM
        attention.append(flops * (1 + edge / length) / times[f"attention {length}"])
    # the planner's count of a layer's bytes: forward, and twice that backward
    least = 3 * rows * (20 * hidden + 4 * 3 * hidden + 2 * 3 * inner)
    fastest = max(
        2 * sizes.square**3 / times["square"],
        *(6 * rows * k * n / seconds for (k, n), seconds in work.items()),
    )
    return {
        "matrix_tflops": rate / 1e12,
        "edge": edge,
        "attention_tflops": statistics.geometric_mean(attention) / 1e12,
        "traffic": times["element-wise"] * bandwidth / least,
        "host_s": times["dispatch"],
    }, fastest / 1e12


def fit_products(rows: int, seconds: Mapping[tuple[int, int], float]) -> tuple[float, float]:
    """(rate, edge) of 6·rows·k·n·(1+e/rows)(1+e/k)(1+e/n) / rate, by (k, n), in logarithms."""
    best = (math.inf, 0.0, 0.0)
    for edge in range(0, 513, 2):
        rates = [
            math.log(6 * rows * k * n / took)
            + sum(math.log1p(edge / width) for width in (rows, k, n))
            for (k, n), took in seconds.items()
        ]
        best = min(best, (statistics.pvariance(rates), statistics.fmean(rates), float(edge)))
    return math.exp(best[1]), best[2]


def _link(times: Mapping[str, float], sizes: Sizes, ranks: int) -> tuple[float, float]:
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
            (f"{name}: element-wise work", f"{told['traffic']:.1f} x its fewest bytes"),
            (f"{name}: dispatch of a layer", f"{told['host_s'] * 1e3:.2f} ms"),
        ]
    if found.processes > 1:
        largest = sizes.message_bytes[-1]
        rows += [
            ("gloo: one hop", f"{cluster['measured']['hop_s'] * 1e3:.2f} ms"),
            ("gloo: ring all-reduce", f"{cluster['measured']['links'][0][1]:.2f} GB/s"),
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
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as fault:
        raise MachineError(
            f"machine file {file}", f"it cannot be written: {fault}", "--output FILE"
        ) from None
    finally:
        if partial.exists():
            partial.unlink()
