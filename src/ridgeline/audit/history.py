"""A run folder read back: what the trainer wrote, as far as it got.

A run may have been killed at any byte, resumed, and killed again. What cannot be read is left
out and said in `History.notes`. Steps rise: a record takes the place of those it goes behind.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tomlkit
from tomlkit import TOMLDocument
from tomlkit.items import Item, Table

from ridgeline.errors import RunFolderError

SAMPLE_CHARACTERS = 20_000  # more than a screen of text, far less than the report may weigh


@dataclass(frozen=True)
class LoggedStep:
    """One logged step; None where the run did not know. `seconds`: mean per step, by phase.

    `time`, here and below: Unix seconds of the record; None in runs of older versions.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    tokens: float | None
    tokens_per_s: float | None
    mfu: float | None
    memory_bytes: float | None
    step_s: float | None
    seconds: dict[str, float]
    steps_covered: int  # since the record before it; its means are over these
    time: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss in nats per token, over all corpora and for each."""

    step: int
    held_out_loss: float | None
    held_out: dict[str, float]
    seconds: float = 0.0
    time: float | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened at a step: started, resumed, checkpoint, interrupted, finished."""

    step: int
    name: str
    fields: Mapping[str, object]

    @property
    def time(self) -> float | None:
        """When it was written down."""
        return number(self.fields.get("time"))


@dataclass
class History:
    """All that a run folder says.

    `run` is the newest of run.toml, run.2.toml, … (`run_file`), with the comments beside its
    values as `reasons` by dotted name; `environment` is environment.json; each is empty when
    missing. `elapsed_s` counts steps and evaluations and is NaN when a logged step does not say
    how long it took. `held`: the job's lock is there, which a killed job leaves behind.
    `notes`: sentences about what could not be read, and about resumptions.
    """

    folder: Path
    run_file: Path
    run: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    steps: list[LoggedStep] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    sample: str | None = None
    elapsed_s: float = 0.0
    last_step: int = 0
    held: bool = False
    notes: list[str] = field(default_factory=list)

    def latest(self, key: str) -> object:
        """What the newest event that carries `key` says, or None. A resumed run says it again."""
        known = (e.fields[key] for e in reversed(self.events) if e.fields.get(key) is not None)
        return next(known, None)


def read_history(folder: Path) -> History:
    """Everything in `folder` that a report shows.

    Raises RunFolderError when `folder` is missing or holds no readable record of metrics.
    """
    path = folder / "metrics.jsonl"
    remedy = "name a run folder that `ridgeline train` wrote, such as runs/<name>"
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder}", "there is no such folder", remedy)
    if not path.is_file():
        rule = "metrics.jsonl, which a run writes before its first step, is missing"
        raise RunFolderError(f"run folder {folder}", rule, remedy)
    history = History(folder, _newest_run_file(folder), held=(folder / "lock.json").exists())
    _read_metrics(path, history)
    if not (history.steps or history.evaluations or history.events):
        rule = "metrics.jsonl holds no readable record: nothing was logged yet, or it is damaged"
        raise RunFolderError(f"run folder {folder}", rule, "let the run reach a logged step")
    _read_description(history)
    folders = (folder / "checkpoints").glob("step-*")
    history.checkpoints = sorted(p for p in folders if p.is_dir())
    return history


def number(value: object) -> float | None:
    """`value` as a float if it is a number (NaN and infinity included), else None.

    Beyond 1e300 it is no measurement either, and sums and differences of such would overflow.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    infinite = isinstance(value, float) and math.isinf(value)
    return None if abs(value) > 1e300 and not infinite else float(value)


def _numbers(value: object) -> dict[str, float]:
    items = value.items() if isinstance(value, dict) else ()
    return {str(k): known for k, v in items if (known := number(v)) is not None}


def _read_metrics(path: Path, history: History) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    damaged = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(record, dict) and type(step) is int and 0 <= step < 2**53:
            _add(record, step, history)
        else:
            damaged.append(i + 1)
    if damaged and damaged[-1] == len(lines):  # a whole line ends with "\n", so this one is torn
        damaged.pop()
        history.notes.append("The last line of metrics.jsonl was cut short and is left out.")
    if damaged:
        which = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        history.notes.append(f"Unreadable lines of metrics.jsonl are left out: {which}.")


def _add(record: dict[str, object], step: int, history: History) -> None:
    seconds = _numbers(record.get("seconds"))
    if "event" in record:
        event = Event(step, str(record["event"]), record)
        if event.name == "resumed":
            _rewind(history, step)
            history.notes.append(f"Resumed at step {step:,}.")
        history.events.append(event)
    elif "held_out_loss" in record or "held_out" in record:
        if history.evaluations and history.evaluations[-1].step == step:
            history.evaluations.pop()
        loss, by_corpus = number(record.get("held_out_loss")), _numbers(record.get("held_out"))
        took, time = seconds.get("evaluation", 0.0), number(record.get("time"))
        history.evaluations.append(Evaluation(step, loss, by_corpus, took, time))
        history.elapsed_s += took
    else:
        _rewind(history, step)
        if history.steps and history.steps[-1].step == step:
            history.steps.pop()
        before = max(history.steps[-1].step if history.steps else 0, _last_start(history))
        covered = max(0, step - before)
        known = {key: number(record.get(key)) for key in _MEASURES}
        logged = LoggedStep(step=step, seconds=seconds, steps_covered=covered, **known)
        history.steps.append(logged)
        history.elapsed_s += math.nan if logged.step_s is None else logged.step_s * covered
    history.last_step = max(history.last_step, step)


_MEASURES = (
    "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_bytes", "step_s", "time",
)  # fmt: skip


def _rewind(history: History, step: int) -> None:
    """Forget what was recorded after `step`: the run goes on from there."""
    while history.steps and history.steps[-1].step > step:
        history.steps.pop()
    while history.evaluations and history.evaluations[-1].step > step:
        history.evaluations.pop()
    history.last_step = min(history.last_step, step)


def _last_start(history: History) -> int:
    starts = (e.step for e in reversed(history.events) if e.name in ("started", "resumed"))
    return next(starts, 0)


def _newest_run_file(folder: Path) -> Path:
    """run.2.toml, run.3.toml, … are of later sessions of the run, which changed something."""
    later = {int(p.suffixes[0][1:]): p for p in folder.glob("run.[0-9]*.toml") if _numbered(p)}
    return later[max(later)] if later else folder / "run.toml"


def _numbered(path: Path) -> bool:
    return len(path.suffixes) == 2 and path.suffixes[0][1:].isdecimal()


def _read_description(history: History) -> None:
    """The files around the metrics; each may be missing, and a damaged one is said, not fatal."""
    run = _parsed(history.run_file, tomllib.loads, history)
    if run:
        history.run = run
        document = tomlkit.parse(history.run_file.read_text(encoding="utf-8"))
        history.reasons = dict(_comments(document))
    history.environment = _parsed(history.folder / "environment.json", json.loads, history)
    sample = history.folder / "sample.txt"
    if sample.is_file():
        with sample.open(encoding="utf-8", errors="replace") as file:
            history.sample = file.read(SAMPLE_CHARACTERS + 1)


def _parsed(path: Path, parse: Callable[[str], object], history: History) -> dict[str, object]:
    try:
        parsed = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        history.notes.append(f"{path.name} is missing from the folder.")
        return {}
    except (ValueError, RecursionError) as error:  # both formats' errors are ValueErrors
        history.notes.append(f"{path.name} cannot be read: {error}.")
        return {}
    if not isinstance(parsed, dict):
        history.notes.append(f"{path.name} does not hold a table.")
        return {}
    return parsed


def _comments(table: TOMLDocument | Table, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The comment beside each value that has one: why a derived value is what it is."""
    for key in table:
        item = table.item(key)
        if isinstance(item, Table):
            yield from _comments(item, f"{prefix}{key}.")
        elif isinstance(item, Item) and item.trivia.comment:
            yield f"{prefix}{key}", item.trivia.comment.lstrip("# ")
