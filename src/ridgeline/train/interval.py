"""When the next checkpoint is due: every so many steps, or as Young and Daly say.

The time between two checkpoints that loses least to failures follows from what one costs and from
the mean time between failures (`plan/goodput.py`). The cost is measured: what the last one made
training wait, and by how much it slowed the steps beside its writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from ridgeline.errors import RunError
from ridgeline.layout.layout import Layout
from ridgeline.machine.cluster import cluster
from ridgeline.plan.goodput import HOUR, daly_interval_s, job_mtbf_s
from ridgeline.run import Run

ASSUMED_COST_S = 10.0
"""Until the first checkpoint is measured."""
REMEMBERED = 20
"""Steps whose median says how long one takes without a checkpoint beside it."""


def mtbf_s(run: Run) -> float | None:
    """Mean seconds between failures of the whole job; None where nobody says.

    As the run says, or from the catalogue's rate for one device of its cluster.
    """
    if run.cluster.mtbf_hours is not None:
        return run.cluster.mtbf_hours * HOUR
    if run.cluster.device == "local":
        return None
    rate = cluster(run.cluster.device).failures_per_device_hour
    devices = run.layout.world if isinstance(run.layout, Layout) else run.cluster.devices
    return job_mtbf_s(rate, devices) if rate and devices else None


def check_interval(run: Run) -> None:
    """Raise RunError where the interval is to follow a failure rate that nobody knows."""
    if run.checkpoint.every_steps == "auto" and mtbf_s(run) is None:
        raise RunError(
            "checkpoint.every_steps = 'auto'",
            "the interval follows from how often the job fails, and the catalogue has no failure "
            f"rate of {run.cluster.device!r}",
            "cluster.mtbf_hours = 24, or checkpoint.every_steps = 500",
        )


@dataclass
class Interval:
    """Says when a checkpoint is due; every rank says the same at the same step."""

    every_steps: int
    """0: never by the step."""
    mtbf_s: float | None
    """Where the interval is measured."""
    interval_s: float = 0.0
    saved_at_s: float = 0.0

    @classmethod
    def of(cls, run: Run, elapsed_s: float) -> Interval:
        """The interval of a run that has trained for `elapsed_s`."""
        every = run.checkpoint.every_steps
        if every != "auto":
            return cls(every, None)
        mean_s = mtbf_s(run)
        assert mean_s is not None  # check_interval
        return cls(0, mean_s, daly_interval_s(ASSUMED_COST_S, mean_s), elapsed_s)

    def due(self, step: int, elapsed_s: float) -> bool:
        """Whether step `step` is to be saved; `elapsed_s` as all ranks agree."""
        if self.mtbf_s is not None:
            return elapsed_s - self.saved_at_s >= self.interval_s
        return bool(self.every_steps) and step % self.every_steps == 0

    def saved(self, elapsed_s: float, cost_s: float | None, write_s: float) -> None:
        """A checkpoint begins; `cost_s`, the same on all ranks, is what the last one cost."""
        self.saved_at_s = elapsed_s
        if self.mtbf_s is not None and cost_s is not None:
            # no more often than the writing keeps up with
            self.interval_s = max(write_s, daly_interval_s(max(cost_s, 1e-3), self.mtbf_s))


class Beside:
    """How much slower steps are while a checkpoint is written beside them."""

    def __init__(self) -> None:
        self.alone: list[float] = []
        self.slow: list[float] = []

    def step(self, seconds: float, writing: bool) -> None:
        """One step took so long."""
        (self.slow if writing else self.alone).append(seconds)
        del self.alone[:-REMEMBERED]

    def take(self) -> tuple[float, float | None]:
        """Seconds lost beside the last writing, and by what share steps were slower; then anew.

        No share is known without a step of each kind.
        """
        slow, self.slow = self.slow, []
        if not slow or not self.alone:
            return 0.0, None
        usual = median(self.alone)
        lost = sum(slow) - usual * len(slow)
        return max(0.0, lost), lost / (usual * len(slow))
