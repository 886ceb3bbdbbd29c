"""Silent corruption: a device that computes wrongly, and copies that are no longer alike."""

from __future__ import annotations

import math
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ridgeline.errors import CorruptionError
from ridgeline.layout.layout import Layout
from ridgeline.train.checkpoint import model_tensors
from ridgeline.train.loop import Job
from ridgeline.train.parallelize import PRECISIONS

DEPTH, ROUNDS = 64, 4
"""Of the products of the self-test, and how many there are."""
PIECE = 2**22
"""Numbers whose checksum is taken at once: 32 MiB as int64."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REMEDY = "start again from the newest checkpoint; a device that is named twice is to be left out"
Place = tuple[str, tuple[int, ...]]
"""A tensor's name, and which part of it: a rank's place on the axes that divide it."""


def self_test(device: torch.device, layout: Layout, group: dist.ProcessGroup | None) -> None:
    """Multiply matrices whose product is known on every rank's device, in the run's precision.

    Raises CorruptionError, on all ranks, naming those whose device was wrong.
    """
    wrong = wrong_products(device, PRECISIONS.get(layout.precision, torch.float32))
    told = _from_all((socket.gethostname(), wrong), layout.world, group)
    found = [f"rank {r} on {host} ({n:,})" for r, (host, n) in enumerate(told) if n]
    if found:
        raise CorruptionError(
            f"the self-test of {len(told)} devices",
            f"numbers of an exact product that came out wrong: {', '.join(found)}",
            "leave the named devices out",
        )


def wrong_products(device: torch.device, dtype: torch.dtype) -> int:
    """How many numbers of some products of whole numbers a device gets wrong.

    Row i of the first matrix is p shifted by i, column j of the second q shifted by j; so the
    product at (i, j) is r[i - j], r[d] = sum over t of p[d + t] q[t]. All sums stay within the
    whole numbers that `dtype` can hold, so no order of adding rounds.
    """
    most = math.isqrt(int(2 / torch.finfo(dtype).eps) // DEPTH)
    size = 256 if device.type == "cpu" else 4096
    generator, wrong = torch.Generator().manual_seed(0), 0
    at, along = torch.arange(size), torch.arange(DEPTH)
    for _ in range(ROUNDS):
        p, q = torch.randint(-most, most + 1, (2, DEPTH), generator=generator)
        a, b = (each[(at[:, None] + along) % DEPTH].to(device, dtype) for each in (p, q))
        r = (p[(along[:, None] + along) % DEPTH] * q).sum(1)
        expected = r[(at[:, None] - at) % DEPTH]
        wrong += int(((a @ b.T).cpu() != expected).sum())
    return wrong


def checksum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's words, as whole numbers, times odd weights by position: int64 ().

    Modulo 2^64 an odd number has an inverse, so no change of one word goes unseen, nor do two
    equal flips at different positions of a piece.
    """
    words = tensor.detach().reshape(-1).view(WORDS[tensor.element_size()])
    weights = torch.arange(1, 2 * min(PIECE, len(words)), 2, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for piece in torch.split(words, PIECE):
        total = total * 31 + (piece * weights[: len(piece)]).sum()
    return total


def compare_copies(job: Job, totals: Sequence[Tensor], group: dist.ProcessGroup | None) -> int:
    """Compare, bit by bit, what several ranks hold of the model, and `totals`, alike on all ranks.

    Each axis of holders sends one message of 16 bytes per tensor. Returns how many tensors this
    rank has copies of; raises CorruptionError, on all ranks, naming what differs and where.
    """
    held: dict[tuple[dist.ProcessGroup, ...], dict[Place, Tensor]] = defaultdict(dict)
    devices = job.mesh.devices
    for chunk in job.chunks:
        for name, value in model_tensors(chunk).items():
            mesh, here, copied = devices, value, [False, True, True, True]
            if isinstance(value, DTensor):
                mesh, here = value.device_mesh, value.to_local()
                copied = [placement.is_replicate() for placement in value.placements]
            axes = [axis for axis, same in enumerate(copied) if same and mesh.size(axis) > 1]
            groups = tuple(mesh.get_group(axis) for axis in axes)
            part = tuple(mesh.get_local_rank(axis) for axis, same in enumerate(copied) if not same)
            held[groups][name, part] = checksum(here)
    if group is not None:
        world = dist.group.WORLD
        assert world is not None
        for name, total in zip(("the loss", "the gradient norm"), totals, strict=True):
            held[(world,)][name, ()] = checksum(total)
    differing: dict[Place, int] = {}
    for groups, sums in held.items():
        if groups:
            differing |= _differing(sums, groups)
    told = _from_all((socket.gethostname(), differing), job.layout.world, group)
    if any(found for _, found in told):
        raise _unlike(told)
    return sum(len(sums) for groups, sums in held.items() if groups)


def _differing(
    sums: Mapping[Place, Tensor], groups: Sequence[dist.ProcessGroup]
) -> dict[Place, int]:
    """This rank's checksums of what is not alike on all ranks of `groups`."""
    mine = torch.stack(list(sums.values()))
    highest_and_lowest = torch.cat((mine, ~mine))  # the least is the greatest complement's
    for each in groups:
        dist.all_reduce(highest_and_lowest, dist.ReduceOp.MAX, group=each)
    highest, lowest = highest_and_lowest.chunk(2)
    rows = zip(sums, (highest != ~lowest).tolist(), mine.tolist(), strict=True)
    return {place: value for place, unlike, value in rows if unlike}


def _unlike(told: Sequence[tuple[str, Mapping[Place, int]]]) -> CorruptionError:
    """The error about checksums that differ; `told`: host and those of each rank."""
    lines = []
    for place in sorted({place for _, found in told for place in found}):
        ranks = {rank: found[place] for rank, (_, found) in enumerate(told) if place in found}
        (common, votes), *_ = Counter(ranks.values()).most_common(1)
        majority = 2 * votes > len(ranks)
        odd = [rank for rank, value in ranks.items() if not majority or value != common]
        who = ", ".join(f"rank {rank} on {told[rank][0]}" for rank in odd)
        rest = f"the other {votes} holders" if majority else "one another"
        lines.append(f"{place[0]}: {who} unlike {rest}")
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return CorruptionError(
        "comparing what several ranks hold",
        f"copies must be alike bit by bit. {'; '.join(lines[:3])}{more}",
        REMEDY,
    )


def _from_all(mine: Any, world: int, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank of the run has, on every rank."""
    if group is None:
        return [mine]
    rows: list[Any] = [None] * world
    dist.all_gather_object(rows, mine, group=group)
    return rows
