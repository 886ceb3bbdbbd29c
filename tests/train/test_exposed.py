"""Time in messages is found wherever a program waits, and told by axis and phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce, wait_tensor

from ridgeline.launch.pool import Pool
from ridgeline.torch_compat import all_to_all
from ridgeline.train.exposed import Exposed
from ridgeline.train.telemetry import Clock
from ridgeline.train.worker import process_group

LATE_S = 0.2


def _plain(x: torch.Tensor) -> None:
    dist.all_reduce(x)


def _beside(x: torch.Tensor) -> None:
    works = [dist.all_reduce(x, async_op=True) for _ in range(2)]
    for work in works:
        assert work is not None
        work.wait()


def _sum(x: torch.Tensor) -> torch.Tensor:
    assert dist.group.WORLD is not None
    summed: torch.Tensor = all_reduce(x, "sum", dist.group.WORLD)
    return summed


def _functional(x: torch.Tensor) -> None:
    wait_tensor(_sum(x))  # type: ignore[no-untyped-call]


def _used(x: torch.Tensor) -> None:
    (_sum(x) + 1).sum()


def _differentiable(x: torch.Tensor) -> None:
    assert dist.group.WORLD is not None
    all_to_all(x.requires_grad_(), dist.group.WORLD).sum().backward()  # type: ignore[no-untyped-call]


def _received(x: torch.Tensor) -> None:
    if dist.get_rank() == 1:
        dist.send(x, 0)
    else:
        work = dist.irecv(x, 1)
        assert work is not None
        work.wait()


WAYS: list[Callable[[torch.Tensor], None]] = [
    _plain, _beside, _functional, _used, _differentiable, _received,
]  # fmt: skip


def _waiting() -> list[tuple[float, float, dict[str, int]]]:
    """For each way: seconds that it took, seconds found in messages, and calls."""
    found = []
    with process_group() as (device, _):
        assert dist.group.WORLD is not None
        clock = Clock()
        groups: dict[str, Any] = {dist.group.WORLD.group_name: "tensor"}
        for way in WAYS:
            with Exposed(groups, clock, device).watching():
                way(torch.ones(2))  # PyTorch loads parts of itself at their first use
            exposed, x = Exposed(groups, clock, device), torch.ones(2)
            dist.barrier()
            if dist.get_rank() == 1:
                time.sleep(LATE_S)
            with exposed.watching(), clock.phase("forward"):
                start = time.perf_counter()
                way(x)
                took = time.perf_counter() - start
            assert set(exposed.seconds) == {("forward", "tensor")}
            found.append((took, exposed.seconds["forward", "tensor"], dict(exposed.calls)))
            assert not exposed.awaited
        before = dict(exposed.seconds)
        dist.all_reduce(x)
        assert exposed.seconds == before  # outside it sees nothing
    return found


def test_a_late_partner_is_waited_for_in_every_way(pool: Pool) -> None:
    on_time, late = pool.run(_waiting, (), 2)
    for way, (took, exposed, calls) in zip(WAYS, on_time, strict=True):
        assert took / 2 < exposed <= took, way.__name__
        expected = {"_beside": 2, "_differentiable": 2}.get(way.__name__, 1)
        assert calls == {"tensor": expected}, way.__name__
    assert [calls for *_, calls in late] == [calls for *_, calls in on_time]
