"""Ranks that work longer than others for their part of a step, by name and host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ridgeline.layout.grid import RankGrid
from ridgeline.layout.layout import Layout

DEVIATIONS, SHARE = 5.0, 0.2
"""A rank is slow beyond so many robust deviations from its peers' median, and this share of it."""


class Slow(NamedTuple):
    """A rank that was slow twice running, and its peers."""

    rank: int
    busy_s: float
    """Seconds of work per step."""
    median_s: float


class Stragglers:
    """Every rank's seconds of work per step, exchanged beside the steps and read one log later.

    Work is what a rank does not wait in. On a CPU: processor time of the thread that trains, within
    steps. On an accelerator, whose time the host does not see: what `timed_s` says.
    """

    def __init__(
        self, layout: Layout, group: dist.ProcessGroup | None, timed_s: Callable[[], float] | None
    ) -> None:
        """`timed_s`: on an accelerator, seconds of work per step of those timed finely."""
        self.group, self.timed_s = group, timed_s
        grid = RankGrid(layout)
        stages = [grid.place(rank)["pipeline"] for rank in range(layout.world)]
        self.peers = [
            [rank for rank, stage in enumerate(stages) if stage == number]
            for number in range(layout.pipeline)
        ]
        """Ranks that do the same work: those of one pipeline stage."""
        self.began_s = self.worked_s = 0.0
        self.steps = 0
        self.pending: tuple[Tensor, dist.Work | None] | None = None
        self.slow_before: set[int] = set()
        self.named: set[int] = set()

    def step_begins(self) -> None:
        """What lies between steps is not a step's work."""
        self.began_s = time.thread_time()

    def step_ends(self) -> None:
        """Add up what this thread worked since."""
        self.worked_s += time.thread_time() - self.began_s
        self.steps += 1

    def exchange(self) -> list[float] | None:
        """Send this rank's seconds per step; all ranks', by rank, as of the last time.

        A collective call. None at first, without other ranks, and where a rank knows none.
        """
        if self.group is None:
            return None
        busy_s = self.timed_s() if self.timed_s else self.worked_s / self.steps
        self.worked_s, self.steps = 0.0, 0
        told, seconds = self.pending, torch.zeros(self.group.size(), dtype=torch.float64)
        mine = torch.tensor([busy_s], dtype=torch.float64)
        work = dist.all_gather_into_tensor(seconds, mine, group=self.group, async_op=True)
        self.pending = (seconds, work)
        if told is None:
            return None
        if told[1] is not None:
            told[1].wait()
        found: list[float] = told[0].tolist()
        return found if min(found) > 0 else None

    def settle(self) -> None:
        """Wait for the last message, so that the group can be closed."""
        if self.pending is not None and self.pending[1] is not None:
            self.pending[1].wait()
        self.pending = None

    def named_now(self, busy_s: Sequence[float]) -> list[Slow]:
        """Ranks that were slow twice running and have not been named for it; who recovers may be
        named again."""
        slow = {each.rank: each for peers in self.peers for each in slower(busy_s, peers)}
        lasting = self.slow_before & slow.keys()
        new = lasting - self.named
        self.slow_before, self.named = set(slow), (self.named & slow.keys()) | lasting
        return [slow[rank] for rank in sorted(new)]


def slower(busy_s: Sequence[float], peers: Sequence[int]) -> list[Slow]:
    """Those of `peers` that are slower than the others by the median and the deviations from it.

    Of two peers the faster one is the measure. A deviation: 1.4826 times the median distance from
    the median, which for a normal distribution is its standard deviation.
    """
    median_s = statistics.median_low([busy_s[rank] for rank in peers])
    deviation = 1.4826 * statistics.median_low([abs(busy_s[rank] - median_s) for rank in peers])
    most_s = median_s + max(DEVIATIONS * deviation, SHARE * median_s)
    return [Slow(rank, busy_s[rank], median_s) for rank in peers if busy_s[rank] > most_s]
