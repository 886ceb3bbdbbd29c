"""Bad steps: what is not finite, or far above the steps before, is left out and told of.

Loss and gradient norm come from one all-reduce, so every rank holds the same bits and decides
alike without asking. The decision stays on the device, where it masks the update; the host reads
it one step late, when the next step is under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ridgeline.errors import NotLearnt
from ridgeline.run import Faults
from ridgeline.train.manifest import Progress
from ridgeline.train.telemetry import Observation

WINDOW, ENOUGH = 100, 20
"""Steps that a limit looks back on, and good ones among them without which there is none."""
LEAST_SPREAD = 0.01
"""Of the median: where the last steps are almost equal, less is noise."""
Limits = tuple[float, float]
"""Largest good loss and gradient norm."""
NO_LIMITS: Limits = (math.inf, math.inf)


class BadStep(NamedTuple):
    """A step that was left out."""

    progress: Progress
    """Behind it."""
    batch: int
    loss: float
    norm: float
    limits: Limits
    in_a_row: int
    """Bad steps, this one too, without a good one beyond them."""

    @property
    def first_sample(self) -> int:
        """Index of its first sample."""
        return self.progress.samples - self.batch

    @property
    def why(self) -> str:
        """What is wrong with it."""
        of_both = zip(("loss", "gradient norm"), (self.loss, self.norm), self.limits, strict=True)
        return ", ".join(
            f"{name} {value:.4g} "
            + (f"above {limit:.4g}" if math.isfinite(value) else "is not finite")
            for name, value, limit in of_both
            if not (math.isfinite(value) and value <= limit)
        )

    def __str__(self) -> str:
        samples = f"samples {self.first_sample:,} to {self.progress.samples - 1:,}"
        return f"step {self.progress.step:,} is bad ({self.why}; {samples})"

    def fields(self) -> dict[str, object]:
        """What metrics.jsonl says of it; numbers that are not finite stand in `why`."""
        return {
            "at_step": self.progress.step,
            "why": self.why,
            "loss": self.loss,
            "grad_norm": self.norm,
            "loss_limit": self.limits[0],
            "grad_norm_limit": self.limits[1],
            "first_sample": self.first_sample,
            "samples": self.batch,
        }

    def error(self, faults: Faults) -> NotLearnt:
        """Why the run stops here."""
        return NotLearnt(
            str(self),
            f"{self.in_a_row} bad steps in a row; faults.bad_step = {faults.bad_step!r}, "
            f"faults.most_bad_steps = {faults.most_bad_steps}",
            "a look at these samples; a lower optimizer.lr; or, from the newest checkpoint, "
            "--faults.bad_step skip",
        )


class BadSteps:
    """Which steps of a run are bad.

    A spike lies `faults.spike` robust deviations (1.4826 median absolute deviations, which is one
    standard deviation of normal numbers) above the median of the good ones among the last steps.
    """

    def __init__(self, faults: Faults | None = None, loss_scaled: bool = False) -> None:
        """`loss_scaled`: gradients that are not finite are the loss scale's to answer for."""
        self.faults = faults or Faults()
        self.loss_scaled = loss_scaled
        self.history: Tensor | None = None
        """Loss and norm of the last steps, NaN of bad ones; for a checkpoint, if spikes count."""
        if self.faults.spike:
            self.history = torch.full((2, WINDOW + 1), math.nan, dtype=torch.float64)
        self.limits = NO_LIMITS
        self.pending: tuple[Progress, int, Limits, Tensor, torch.Event | None] | None = None
        """The last step, and its loss, gradient norm and flag on their way to the host."""
        self.in_a_row = self.furthest = 0

    def flag(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 where a step with these numbers is bad, else 0: float32 (), on their device."""
        most_loss, most_norm = self.limits
        good = ((loss + norm).abs() < math.inf) & (loss <= most_loss) & (norm <= most_norm)
        return (~good).float()

    def update(self, optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
        """Step, unless `bad`.

        A fused optimizer of PyTorch reads the flag on the device, as `torch.amp.GradScaler` hands
        it over; for any other one the host waits to know.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        elif not self.known(bad):
            optimizer.step()

    def known(self, bad: Tensor) -> bool:
        """The flag on the host."""
        return bool(bad)

    def report(self, seen: Observation, batch: int) -> BadStep | None:
        """Send a step's numbers, of `batch` samples, to the host; the step before, if bad."""
        before = self.settle()
        limits = self.limits
        if self.history is not None:
            self.limits = self._limits_after(self.history[:, 1:])
        values = torch.stack((seen.loss, seen.grad_norm, seen.bad.to(seen.loss.dtype)))
        arrived = None
        if values.device.type != "cpu":
            values = values.to("cpu", non_blocking=True)
            arrived = torch.Event(seen.loss.device)
            arrived.record()
        self.pending = seen.progress, batch, limits, values, arrived
        return before

    def settle(self) -> BadStep | None:
        """Read the step that was reported last; that step, if bad."""
        if self.pending is None:
            return None
        (progress, batch, limits, values, arrived), self.pending = self.pending, None
        if arrived is not None:
            arrived.synchronize()
        loss, norm, bad = values.tolist()
        if self.history is not None:
            self.history.copy_(self.history.roll(-1, 1))
            self.history[:, -1] = torch.tensor([math.nan if bad else x for x in (loss, norm)])
        if not bad:
            self.in_a_row *= progress.step <= self.furthest
            return None
        if self.loss_scaled and not math.isfinite(norm):
            return None
        self.in_a_row, self.furthest = self.in_a_row + 1, progress.step
        return BadStep(progress, batch, loss, norm, limits, self.in_a_row)

    def resume(self) -> None:
        """Go on behind a checkpoint, whose history has been restored.

        Its last step was read before it was saved, and limits know a step only one step later.
        """
        self.pending = None
        if self.history is not None:
            self.limits = self._limits_after(self.history[:, :-1])

    def stops(self, bad: BadStep) -> bool:
        """Whether the run ends here."""
        faults = self.faults
        return faults.bad_step == "stop" or bad.in_a_row >= faults.most_bad_steps

    def answer(
        self, bad: BadStep, now: Progress, restore: Callable[[], Progress]
    ) -> tuple[str, Progress | None]:
        """Do what the run says about a bad step: what is done, and where to go on if further back.

        `restore` goes back to the newest checkpoint, or stays, with progress 0, where there is none
        (arXiv:2204.02311, section 5.1, for what rolling back is good for).
        """
        if self.stops(bad):
            return "the run stops", None
        if self.faults.bad_step == "skip":
            return "left out", None
        restored = restore()
        if not restored.step:
            return "left out: there is no checkpoint to go back to", None
        back = replace(restored, samples=now.samples, elapsed_s=now.elapsed_s)
        return f"back to step {back.step:,}, past all data since", back

    def _limits_after(self, history: Tensor) -> Limits:
        """Limits by (2, WINDOW) steps."""
        if int((~history[0].isnan()).sum()) < ENOUGH:
            return NO_LIMITS
        middle = history.nanmedian(1, keepdim=True).values
        spread = 1.4826 * (history - middle).abs().nanmedian(1, keepdim=True).values
        spread = torch.maximum(spread, LEAST_SPREAD * middle.abs())
        loss, norm = (middle + self.faults.spike * spread).flatten().tolist()
        return loss, norm
