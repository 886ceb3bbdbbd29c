"""`ridgeline probe`'s clock: the trainer's own program, in parts, timed on this machine's CPU.

The processes of one layout compute at the same time, as they will in training: each round all pass
a barrier and time one action, then the next. A round takes as long as its slowest process, since a
step does; a figure is the median of the rounds, since a step meets what else the machine does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ridgeline.errors import LaunchError, MachineError
from ridgeline.layout.layout import Layout
from ridgeline.machine.device import PROBED_HEAD_DIM
from ridgeline.machine.probe import LAYERS, Measured, Sizes
from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ModelShape
from ridgeline.run import Optimizer
from ridgeline.train.optimizer import adamw, clip, totals
from ridgeline.train.parallelize import make_mesh, parallelize
from ridgeline.train.pipeline import prepare
from ridgeline.train.vocabulary import token_loss

Action = Callable[[], object]
PATIENCE_S = 120.0
"""Seconds without a word after which the measuring processes are given up."""


def measure(
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
    return Measured(processes, threads, native, said, f"PyTorch {torch.__version__}")


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
        parts = _operations(sizes, dtype) | _program(sizes, name, processes, rank)
        actions |= {f"{name} {what}": action for what, action in parts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    begun, turn = time.monotonic(), 0
    while turn <= sizes.rounds and _agreed(turn < 4 or time.monotonic() - begun < sizes.seconds):
        for place, (name, action) in enumerate(actions.items()):
            if rank == 0:
                rounds = (turn + place / len(actions)) / (sizes.rounds + 1)
                share = max(rounds, min(1.0, (time.monotonic() - begun) / sizes.seconds))
                tell.send((f"{processes} x {threads} threads: {name}", share))
            action()  # a step finds the memory that the last one left; another action's is no such
            dist.barrier()
            start = time.perf_counter()
            action()
            if turn:  # the first round only warms up
                seconds[name].append(time.perf_counter() - start)
        turn += 1
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        medians = map(statistics.median, slowest.tolist())
        tell.send(dict(zip(seconds, medians, strict=True)))
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


def _operations(sizes: Sizes, dtype: torch.dtype) -> dict[str, Action]:
    """Matrix products and attention, forward and backward."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    def both(forward: Callable[[], Tensor]) -> Action:
        gradient = torch.randn_like(forward())
        return lambda: torch.autograd.backward(forward(), gradient)

    left, right = (torch.randn(sizes.square, sizes.square, dtype=dtype) for _ in range(2))
    actions: dict[str, Action] = {"square": lambda: left @ right}
    for rows, k, n in sizes.products:
        x, weight = leaf(rows, k), leaf(n, k)
        actions[f"linear {rows} {k} {n}"] = both(lambda x=x, w=weight: functional.linear(x, w))  # type: ignore[misc]
    for length in sizes.sequences:
        shape = (max(1, sizes.rows[-1] // length), length, sizes.heads, PROBED_HEAD_DIM)
        q, k_, v = leaf(*shape), leaf(*shape), leaf(*shape)

        def attention(q: Tensor = q, k: Tensor = k_, v: Tensor = v) -> Tensor:
            return functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )

        actions[f"attention {length}"] = both(attention)
    return actions


def _program(sizes: Sizes, precision: str, processes: int, rank: int) -> dict[str, Action]:
    """A small decoder, with and without its layers, in the parts of a step.

    Passes whose gradients stay on the rank, one that reduces them, and one that is a whole step.
    """
    layout = Layout.model_validate({"data": processes, "precision": precision})
    mesh = make_mesh(layout, torch.device("cpu"), rank)
    shape = ModelShape(
        layers=LAYERS, hidden=sizes.widths[0], heads=sizes.heads, head_dim=PROBED_HEAD_DIM,
        ffn_hidden=sizes.widths[1], vocab=sizes.vocab, max_sequence=sizes.sequences[0],
    )  # fmt: skip

    def built(blocks: bool) -> nn.Module:
        model = Decoder(shape)
        if not blocks:
            model.blocks.clear()
        parallelize(model, shape, mesh)
        return model

    def passing(model: nn.Module, rows: int, reduces: bool = False) -> Action:
        size = (max(1, rows // sizes.sequences[0]), sizes.sequences[0])
        inputs_BL, targets_BL = (torch.randint(shape.vocab, size) for _ in range(2))

        def run() -> None:
            prepare(model, layout.zero, reduce=reduces, last=reduces)
            torch.autograd.backward(token_loss(model(inputs_BL), targets_BL) / rows)

        return run

    whole, ends = built(blocks=True), built(blocks=False)
    optimizer = adamw(whole, Optimizer())

    reducing = passing(whole, sizes.rows[0], reduces=True)

    def step() -> None:
        reducing()
        parameters = list(whole.parameters())
        norm, _ = totals(parameters, torch.zeros(()), layout)
        clip(parameters, norm, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    actions: dict[str, Action] = {}
    for rows in sizes.rows:
        actions[f"ends {rows}"] = passing(ends, rows)
        actions[f"whole {rows}"] = passing(whole, rows)
    return actions | {"reducing": reducing, "step": step}
