"""What all ranks must decide alike, agreed one step late so that no step waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Agreement:
    """Largest value of every rank's report, as of the step before.

    Each step, every rank reports; the reduction runs on the host beside the step and is read at
    the next one, so all ranks read the same answer at the same step.
    """

    group: dist.ProcessGroup | None
    """A gloo group of all ranks, or None for one process."""
    pending: tuple[Tensor, dist.Work | None] | None = None
    elapsed_s: float = 0.0
    """What all ranks last agreed that the run has taken."""

    def report(self, stop: bool, elapsed_s: float) -> tuple[bool, float]:
        """Report this rank's wish to stop and its clock; (stop, elapsed seconds) agreed before."""
        agreed = (False, 0.0)
        if self.pending is not None:
            values, work = self.pending
            if work is not None:
                work.wait()
            agreed = (bool(values[0] > 0), float(values[1]))
            self.elapsed_s = agreed[1]
        values = torch.tensor([float(stop), elapsed_s], dtype=torch.float64)
        work = None
        if self.group is not None:
            work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (values, work)
        return agreed

    def ask(self, stop: bool) -> bool:
        """Whether any rank wishes to stop now; every rank waits for the slowest."""
        value = torch.tensor(float(stop))
        if self.group is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value > 0)

    def settle(self) -> None:
        """Wait for the last reduction, so that the group can be closed."""
        if self.pending is not None and self.pending[1] is not None:
            self.pending[1].wait()
        self.pending = None
