"""`ridgeline audit --calibrate`: the planner's constants corrected by a run that was measured.

Written beside what the probe measured, or into a file of the device's name, never into the
catalogue. What a correction is worth shows on runs that it was not made from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ridgeline.audit.goodput import goodput_of
from ridgeline.audit.history import History, read_history
from ridgeline.audit.witnesses import measured_ledger, question_of, read_witnesses, working_s
from ridgeline.errors import LedgerError, PlanError, RidgelineError
from ridgeline.layout.layout import Layout
from ridgeline.ledger import StepSeconds
from ridgeline.machine.corrections import FACTORS, Correction, write_correction
from ridgeline.machine.local import LOCAL, is_local
from ridgeline.plan.calibrate import fit
from ridgeline.plan.plan import price
from ridgeline.plan.question import Question
from ridgeline.run import Run

ENOUGH = 5
"""Other layouts without which an error says little."""


class _Answer(BaseModel):
    """Frozen, closed, documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Other(_Answer):
    """One run that the correction was not made from."""

    run: str
    layout: str
    measured_s: float
    """Of a step."""
    before: float
    """Planned over measured, less 1, with the constants as they were."""
    after: float
    """The same with those that were written now."""


class Calibrated(_Answer):
    """What a run corrected, and what that did to the planner's error."""

    machine: str
    """The device whose constants they are; `local` whatever the number of processes."""
    precision: str
    source: str
    """From which run and versions."""
    factors: dict[str, float]
    """By what the planner's seconds are multiplied now: compute, link, port, update."""
    left: dict[str, str]
    """What the run did not tell, and why: those stay as they were."""
    file: Path | None
    """What was written; None where nothing was identified."""
    others: tuple[Other, ...]
    skipped: dict[str, str]
    """Runs that are no test of it, and why."""
    error_before: float | None
    """Mean absolute error over the others; None without any."""
    error_after: float | None

    def json(self) -> dict[str, Any]:  # type: ignore[override]
        """The key `calibrated` of `ridgeline audit --calibrate --json`."""
        return self.model_dump(mode="json")


class _Measured(BaseModel):
    """A run folder that can be compared with its plan."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    history: History
    run: Run
    layout: Layout
    asked: Question
    seconds: StepSeconds
    step_s: float


def calibrate(folder: Path, further: Sequence[Path] = ()) -> Calibrated:
    """Correct the machine's constants by the run in `folder`, and test that on the `further` runs.

    Without any, on the run's neighbours that have a ledgers/train.json. Raises RunFolderError,
    LedgerError where the run was not measured, MachineError where its machine cannot be planned.
    """
    own = _read(folder)
    fitted = fit(own.asked, own.layout, own.seconds)
    correction = replace(fitted.correction, source=_source(own))
    found = {name: value for name, value in asdict(correction).items() if name in FACTORS}
    factors = {name: value for name, value in found.items() if name not in fitted.left}
    others: list[Other] = []
    skipped: dict[str, str] = {}
    for path in further or _neighbours(folder):
        try:
            other = _read(path)
        except RidgelineError as error:
            skipped[str(path)] = f"{error.asked}: {error.rule}"
            continue
        if why := _no_test(own, other):
            skipped[str(path)] = why
        else:
            others.append(_compared(other, own.asked.precision, correction))
    file = None
    if factors:
        file = write_correction(own.asked.cluster.device.name, own.asked.precision, correction)
    return Calibrated(
        machine=_machine(own),
        precision=own.asked.precision,
        source=correction.source,
        factors=factors,
        left=fitted.left,
        file=file,
        others=tuple(others),
        skipped=skipped,
        error_before=_mean([each.before for each in others]),
        error_after=_mean([each.after for each in others]),
    )


def _read(folder: Path) -> _Measured:
    """A run that can be planned and was measured. Raises RidgelineError."""
    history = read_history(folder)
    found = read_witnesses(history)
    if found.run is None:
        raise PlanError(f"calibrating by {folder}", f"{history.run_file.name} is no run file", "")
    asked = question_of(found.run, history)
    assert isinstance(found.run.layout, Layout)
    if "train" not in found.ledgers:
        raise LedgerError(
            f"calibrating by {folder}",
            "it holds no ledgers/train.json of its present layout: nothing was measured by cause",
            f"ridgeline train {folder}, beyond the first step that is sampled",
        )
    seconds = measured_ledger(history, found.ledgers["train"], goodput_of(history)).seconds
    step_s = working_s(seconds)
    if not step_s:
        raise LedgerError(f"calibrating by {folder}", "its step time was not measured", "")
    return _Measured(
        history=history, run=found.run, layout=found.run.layout, asked=asked, seconds=seconds,
        step_s=step_s,
    )  # fmt: skip


def _source(own: _Measured) -> str:
    """The run and the versions behind a correction."""
    environment = own.history.environment
    versions = [f"{name} {environment[name]}" for name in ("ridgeline", "torch")
                if environment.get(name)]  # fmt: skip
    said = [f"run {own.run.name} '{own.run.layout}'", *versions, f"{datetime.now(UTC):%Y-%m-%d}"]
    return ", ".join(said)


def _neighbours(folder: Path) -> list[Path]:
    """Other run folders beside this one that were measured."""
    ledgers = folder.resolve().parent.glob("*/ledgers/train.json")
    return sorted(path.parent.parent for path in ledgers)


def _machine(each: _Measured) -> str:
    name = each.asked.cluster.device.name
    return LOCAL if is_local(name) else name


def _no_test(own: _Measured, other: _Measured) -> str | None:
    """Why a run is no test of a correction made from `own`; None where it is one."""
    if (other.layout, other.run.model) == (own.layout, own.run.model):
        return "it has the layout and the model that the correction is made from"
    if _machine(other) != _machine(own):
        return f"it ran on {_machine(other)}, not on {_machine(own)}"
    for name in ("host", "cpu"):
        here, there = (each.history.environment.get(name) for each in (own, other))
        if _machine(own) == LOCAL and here != there:
            return f"it ran on another machine: {name} {there}, not {here}"
    if other.asked.precision != own.asked.precision:
        return f"it is in {other.asked.precision}, the correction in {own.asked.precision}"
    return None


def _compared(other: _Measured, precision: str, correction: Correction) -> Other:
    after = replace(other.asked, corrections={precision: correction})
    before_s, after_s = (price(each, [other.layout])[0].step_s for each in (other.asked, after))
    return Other(
        run=other.run.name,
        layout=str(other.layout),
        measured_s=other.step_s,
        before=before_s / other.step_s - 1,
        after=after_s / other.step_s - 1,
    )


def _mean(differences: list[float]) -> float | None:
    return math.fsum(map(abs, differences)) / len(differences) if differences else None
