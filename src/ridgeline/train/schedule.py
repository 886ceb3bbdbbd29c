"""Batch and learning rate as closed-form functions of the step: no state, so nothing to restore."""

from __future__ import annotations

import math

from ridgeline.run import Run


def batch_at(run: Run, step: int) -> int:
    """Sequences of step `step` (counted from 0)."""
    ramp = run.schedule.ramp
    if ramp is None:
        return run.global_batch
    return min(run.global_batch, ramp.start + ramp.increment * (step // ramp.every_steps))


def batch_unit(run: Run) -> int:
    """The largest number of sequences that divides every step's batch."""
    ramp = run.schedule.ramp
    return math.gcd(run.global_batch, ramp.start, ramp.increment) if ramp else run.global_batch


def first_sample(run: Run, step: int) -> int:
    """Index of the first sample of step `step`: the sum of all earlier batches.

    With a ramp from S by I every E steps to B, stage k = 0, 1, … holds E steps of S + I·k; the sum
    over the whole stages before `step` is E·(S·k + I·k(k-1)/2).
    """
    ramp = run.schedule.ramp
    if ramp is None:
        return step * run.global_batch
    stages = min(step // ramp.every_steps, (run.global_batch - ramp.start) // ramp.increment)
    before = ramp.every_steps * (ramp.start * stages + ramp.increment * stages * (stages - 1) // 2)
    return before + (step - stages * ramp.every_steps) * (ramp.start + ramp.increment * stages)


def total_steps(run: Run) -> int | None:
    """Steps of the whole run; None when the budget is hours."""
    if run.budget.steps is not None:
        return run.budget.steps
    if run.budget.tokens is None:
        return None
    samples = math.ceil(run.budget.tokens / run.sequence)
    low, high = 0, 1
    while first_sample(run, high) < samples:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first_sample(run, middle) < samples else (low, middle)
    return high


def run_fraction(run: Run, step: int, elapsed_s: float) -> float:
    """How much of the budget is behind `step`, 0 to 1: by steps, or by time when it is hours."""
    steps = total_steps(run)
    if steps is not None:
        return min(1.0, step / steps)
    assert run.budget.hours is not None  # Budget holds exactly one of the three
    return min(1.0, elapsed_s / (run.budget.hours * 3600))


def learning_rate(run: Run, step: int, fraction: float) -> float:
    """Learning rate of `step`, when `fraction` of the budget is behind it.

    Linear warm-up over `warmup_steps`; then cosine, linear, constant, or warm-up-stable-decay
    (linear over the last `decay_fraction`) down to `final_fraction` of the peak.
    """
    schedule, peak = run.schedule, run.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.shape == "constant":
        return peak
    steps = total_steps(run)
    warm = schedule.warmup_steps / steps if steps else 0.0
    start = 1 - schedule.decay_fraction if schedule.shape == "wsd" else min(warm, 1.0)
    done = max(0.0, (fraction - start) / (1 - start)) if start < 1 else 1.0
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.shape == "cosine" else 1 - done
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * share)
