"""How often to save, and what failures leave of a machine's time.

Symbols: M mean time between failures of the whole job, δ seconds a checkpoint blocks training, τ
seconds of training between two checkpoints, R seconds from a failure until training goes on.
Failures come at random (a Poisson process), and may strike while saving or restarting too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ridgeline.plan.amounts import not_negative, positive

HOUR = 3600.0


def job_mtbf_s(failures_per_device_hour: float, devices: int) -> float:
    """M in seconds: any device's failure stops all of them, so rates add up.

    Raises PlanError for a rate or a number of devices that is not positive.
    """
    positive(failures_per_device_hour, "failures per device-hour")
    return HOUR / (failures_per_device_hour * positive(devices, "devices"))


def failures_per_device_hour(failures: int, devices: int, seconds: float) -> float:
    """The rate behind so many failures seen on so many devices in so many seconds.

    Raises PlanError for a number that is not positive: no failure seen is no rate known.
    """
    device_hours = positive(devices, "devices") * positive(seconds, "time", "s") / HOUR
    return positive(failures, "failures") / device_hours


def young_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """τ = √(2δM): Young, CACM 17 (1974) 530, good while δ is far below M. Raises PlanError."""
    _check(checkpoint_s, mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def daly_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Daly's higher-order estimate, Future Generation Computer Systems 22 (2006) 303, equation 37.

    τ = √(2δM)·[1 + ⅓√(δ/2M) + ⅑(δ/2M)] - δ where δ < 2M, else M. Raises PlanError.
    """
    _check(checkpoint_s, mtbf_s)
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = checkpoint_s / (2 * mtbf_s)
    first = math.sqrt(2 * checkpoint_s * mtbf_s)
    return first * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def best_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """The τ that makes `expected_s` smallest, to rounding: the root of (1 - τ/M)·e^((τ+δ)/M) = 1.

    Does not depend on R, which only scales the time. Raises PlanError.
    """
    _check(checkpoint_s, mtbf_s)
    low, high = 0.0, 1.0  # of τ/M; x + δ/M + log(1 - x) falls from δ/M to -∞ between them
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle * mtbf_s
        if middle + checkpoint_s / mtbf_s + math.log1p(-middle) > 0:
            low = middle
        else:
            high = middle


def expected_s(
    work_s: float, interval_s: float, checkpoint_s: float, restart_s: float, mtbf_s: float
) -> float:
    """Expected seconds until `work_s` of training is done: M·e^(R/M)·(e^((τ+δ)/M) - 1)·W/τ.

    Daly 2006, equation 20. Infinite where a piece between failures is hopelessly long. Raises
    PlanError for numbers that are not finite, or not positive (R may be 0).
    """
    _check(checkpoint_s, mtbf_s)
    positive(interval_s, "seconds between checkpoints", "s")
    not_negative(restart_s, "seconds to restart", "s")
    piece, restart = (interval_s + checkpoint_s) / mtbf_s, restart_s / mtbf_s
    if piece + restart > 700:  # e^709 is the largest float
        return math.inf
    pieces = positive(work_s, "training time", "s") / interval_s
    return mtbf_s * math.exp(restart) * math.expm1(piece) * pieces


@dataclass(frozen=True)
class Goodput:
    """What a failure rate and a checkpoint's cost leave of a job's time."""

    mtbf_s: float
    """Mean seconds between failures of the job."""
    checkpoint_s: float
    """Seconds a checkpoint blocks training."""
    restart_s: float
    """Seconds from a failure until training goes on: notice, reschedule, start, reload."""
    interval_s: float
    """Seconds of training between checkpoints."""
    fraction: float
    """Share of the time that is kept training work."""
    checkpoint_share: float
    """Share spent saving what is kept."""

    @property
    def failure_share(self) -> float:
        """Share lost to failures: work done twice, and restarts."""
        return 1 - self.fraction - self.checkpoint_share


def goodput(
    mtbf_s: float, checkpoint_s: float, restart_s: float, interval_s: float | None = None
) -> Goodput:
    """Goodput at `interval_s` between checkpoints, or at the best interval when none is given.

    Evaluation, data stalls and slow devices are not in it. Raises PlanError for absurd numbers.
    """
    chosen = best_interval_s(checkpoint_s, mtbf_s) if interval_s is None else interval_s
    fraction = chosen / expected_s(chosen, chosen, checkpoint_s, restart_s, mtbf_s)
    return Goodput(
        mtbf_s, checkpoint_s, restart_s, chosen, fraction, fraction * checkpoint_s / chosen
    )


def _check(checkpoint_s: float, mtbf_s: float) -> None:
    positive(checkpoint_s, "seconds a checkpoint blocks training", "s")
    positive(mtbf_s, "mean time between failures", "s")
