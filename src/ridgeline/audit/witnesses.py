"""The three ledgers of a run folder, and the two timelines of its pipeline.

ledgers/plan.json  rehearse.json  train.json  plan_timeline.json  timeline.json

`ridgeline train` writes what it measured. What is planned and rehearsed is written once for a
layout and then stays, so that a forecast remains one after the machine was probed or calibrated
anew; without the file it is made again.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ridgeline.audit.goodput import Goodput
from ridgeline.audit.history import History
from ridgeline.errors import LedgerError, MachineError, RidgelineError
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import Kind
from ridgeline.ledger import Ledger, StepSeconds, Witness, read_ledger
from ridgeline.machine.local import LOCAL
from ridgeline.plan.explore import chunk_durations
from ridgeline.plan.plan import price
from ridgeline.plan.question import Question, question_of_run
from ridgeline.plan.timeline import replay
from ridgeline.plan.timeline_picture import replayable
from ridgeline.run import Run, read_run

MOST_SPANS = 20_000
"""Actions of a timeline that is kept; more than a picture shows."""
SETTLING = 2
"""Logged steps at the beginning that the median leaves out: they warm up."""


class Span(BaseModel):
    """One action of a pipeline, in seconds from the step's start."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    kind: Kind
    chunk: int = Field(ge=0)
    micro_batch: int = Field(ge=0)
    start_s: float = Field(ge=0, allow_inf_nan=False)
    end_s: float = Field(ge=0, allow_inf_nan=False)


class Spans(BaseModel):
    """The actions of one step, a list for each pipeline rank."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    step: int | None = None
    """The sampled step; None in a plan."""
    layout: str | None = None
    """The sentence of the layout."""
    ranks: tuple[tuple[Span, ...], ...] = Field(min_length=1)


@dataclass
class Witnesses:
    """What is known of one run, by whom; None: nothing. `notes` say what to do about it."""

    run: Run | None = None
    ledgers: dict[Witness, Ledger] = field(default_factory=dict)
    planned_spans: Spans | None = None
    measured_spans: Spans | None = None
    notes: list[str] = field(default_factory=list)


def run_of(history: History) -> Run | None:
    """The run of a folder, or None where its run file is missing or says something impossible."""
    try:
        return read_run(history.run_file)
    except RidgelineError:
        return None


def read_witnesses(history: History) -> Witnesses:
    """Every ledger and timeline that lies in the folder and is of the run's present layout."""
    found = Witnesses(run_of(history))
    folder, layout = history.folder / "ledgers", _sentence(found.run)
    for witness in ("plan", "rehearse", "train"):
        ledger = _kept(folder / f"{witness}.json", layout, found.notes)
        if ledger is not None and not (witness == "plan" and _other_budget(ledger, found.run)):
            found.ledgers[ledger.witness] = ledger
    found.planned_spans = _spans(folder / "plan_timeline.json", layout, found.notes)
    found.measured_spans = _spans(folder / "timeline.json", layout, found.notes)
    return found


def plan_witness(history: History, found: Witnesses) -> None:
    """Plan the run's layout on its cluster, and keep it, where that is not done yet.

    What stands in the way becomes a note.
    """
    run = found.run
    if "plan" in found.ledgers:
        return
    if run is None:
        found.notes.append(
            f"Planned is a dash: {history.run_file.name} is missing or is not a run."
        )
        return
    try:
        asked = question_of(run, history)
        assert isinstance(run.layout, Layout)
        ledger = price(asked, [run.layout])[0].ledger
    except RidgelineError as error:
        remedy = f"; try: {error.remedy}" if error.remedy else ""
        found.notes.append(f"Planned is a dash: {error.asked}: {error.rule}{remedy}.")
        return
    keep(history.folder, ledger, run)
    found.ledgers["plan"] = ledger
    if run.layout.pipeline > 1:
        found.planned_spans = _planned_spans(asked, run.layout)
        if found.planned_spans is not None:
            text = found.planned_spans.model_dump_json() + "\n"
            _write(history.folder / "ledgers" / "plan_timeline.json", text)


def rehearse_witness(history: History, found: Witnesses, rehearse: Callable[[Run], Ledger]) -> None:
    """Rehearse the run, and keep that, where it is not done yet. What refuses it becomes a note."""
    if found.run is None or "rehearse" in found.ledgers:
        return
    try:
        ledger = rehearse(found.run)
    except RidgelineError as error:
        found.notes.append(f"Rehearsed is a dash: {error.asked}: {error.rule}.")
        return
    keep(history.folder, ledger, found.run)
    found.ledgers["rehearse"] = ledger


def keep(folder: Path, ledger: Ledger, run: Run) -> None:
    """Write a witness' ledger into a run folder, as one of the run's present layout."""
    said = ledger.model_copy(update={"layout": _sentence(run)})
    _write(folder / "ledgers" / f"{ledger.witness}.json", said.to_json())


def measured_ledger(history: History, ledger: Ledger | None, goodput: Goodput) -> Ledger:
    """What was measured: train.json, and from metrics.jsonl what it lacks."""
    later = history.steps[SETTLING:] or history.steps
    paces = [step.step_s for step in later if step.step_s]
    told: dict[str, float | None] = {
        "goodput": goodput.fraction,
        "tokens_per_s": _median([step.tokens_per_s for step in later]),
        "mfu": _median([step.mfu for step in later]),
    }
    base = ledger or Ledger(witness="train")
    sources = dict(base.sources)
    new: dict[str, Any] = {}
    for name, value in told.items():
        if getattr(base, name) is None and value is not None:
            new[name] = value
            sources[name] = "metrics.jsonl: median of the logged steps"
    if "goodput" in new:
        sources["goodput"] = "metrics.jsonl: useful time over time held"
    if base.seconds.total_s is None and paces:
        new["seconds"] = base.seconds.model_copy(update={"total_s": statistics.median(paces)})
        sources["seconds.total_s"] = "metrics.jsonl: median of the logged steps"
    return base.model_copy(update={**new, "sources": sources})


def working_s(seconds: StepSeconds) -> float | None:
    """A measured step without waiting for data and writing down, which the planner leaves out."""
    if seconds.total_s is None:
        return None
    beside = (seconds.data_stall_s or 0.0) + (seconds.logging_s or 0.0)
    return max(0.0, seconds.total_s - beside)


def planned_tokens(ledger: Ledger) -> float | None:
    """The tokens that a plan's whole run is of; None where it has no total."""
    if ledger.tokens_per_s is None or ledger.train_s is None:
        return None
    return ledger.tokens_per_s * ledger.train_s * (ledger.goodput or 1.0)


def _other_budget(ledger: Ledger, run: Run | None) -> bool:
    """Whether a plan's totals are of another number of tokens than the run's budget is now."""
    tokens = planned_tokens(ledger)
    if run is None or tokens is None:
        return False
    budget = run.budget.tokens or (run.budget.steps or 0) * run.global_batch * run.sequence
    return abs(tokens - budget) > 0.01 * budget


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and 0 <= value < float("inf")]
    return statistics.median(known) if known else None


def _sentence(run: Run | None) -> str | None:
    return str(run.layout) if run is not None else None


def question_of(run: Run, history: History) -> Question:
    """The planner's question. Raises RidgelineError, as where `local` would not be the device."""
    device = history.environment.get("device")
    if not isinstance(run.layout, Layout):
        raise MachineError("planning layout 'auto'", "the run never said which one it chose", "")
    if run.cluster.device == LOCAL and isinstance(device, str) and not device.startswith("cpu"):
        raise MachineError(
            f"planning for {device!r}",
            "the run file's [cluster] does not say which device that is",
            'its name in the catalogue, such as cluster.device = "H100-SXM-80GB"',
        )
    return question_of_run(run)


def _kept(path: Path, layout: str | None, notes: list[str]) -> Ledger | None:
    if not path.exists():
        return None
    try:
        ledger = read_ledger(path)
    except LedgerError as error:
        notes.append(f"{path.name} is left out: {error.rule}.")
        return None
    if layout is not None and ledger.layout not in (None, layout):
        if ledger.witness == "train":
            notes.append(f"{path.name} is of layout '{ledger.layout}', before the run went on.")
        return None
    return ledger


def _spans(path: Path, layout: str | None, notes: list[str]) -> Spans | None:
    try:
        spans = Spans.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as fault:
        reason = str(fault).splitlines()[0]
        notes.append(f"{path.name} is left out, it cannot be read: {reason}.")
        return None
    return None if layout is not None and spans.layout not in (None, layout) else spans


def _planned_spans(asked: Question, layout: Layout) -> Spans | None:
    """The step's actions as planned; None where they are too many to keep."""
    micro_batches = asked.global_batch // (layout.data * layout.micro_batch)
    schedule = replayable(layout, micro_batches)
    if sum(map(len, schedule.actions)) > MOST_SPANS:
        return None
    timeline = replay(schedule, chunk_durations(asked, layout, schedule.chunks))
    return Spans(
        layout=str(layout),
        ranks=tuple(
            tuple(Span(**action._asdict(), start_s=start, end_s=end) for action, start, end in rank)
            for rank in timeline.spans
        ),
    )


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader sees the old file or the new one."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
