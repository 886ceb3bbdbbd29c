"""`ridgeline audit`: what was planned, rehearsed and measured of a run, term by term."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ridgeline.audit.goodput import Goodput, goodput_of
from ridgeline.audit.history import History, read_history
from ridgeline.audit.witnesses import (
    Witnesses,
    measured_ledger,
    plan_witness,
    planned_tokens,
    read_witnesses,
    rehearse_witness,
)
from ridgeline.errors import MachineError
from ridgeline.ledger import Ledger, Witness
from ridgeline.machine.cluster import Cluster, cluster
from ridgeline.machine.local import LOCAL
from ridgeline.run import Run

WITNESSES: tuple[Witness, ...] = ("plan", "rehearse", "train")
BILLION = 1e9
SECONDS_PER_HOUR = 3600.0


class _Answer(BaseModel):
    """Frozen, closed, documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Term(_Answer):
    """One quantity as each witness has it, in the ledger's units; None is not known."""

    name: str
    """As in the ledger: `seconds.bubble_s`, `mfu`; with the stage `memory.0.weights_bytes`."""
    planned: float | None
    rehearsed: float | None
    measured: float | None
    planned_difference: float | None
    """Planned over measured, less 1; None where one is not known, or nothing was measured."""
    rehearsed_difference: float | None
    """Rehearsed over measured, less 1."""
    sources: dict[Witness, str]
    """How each witness that says so came to its number."""


class Audit(_Answer):
    """The answer: every term that somebody knows, and what became of the time held."""

    run: str
    """Name of the run."""
    layout: str | None
    """The sentence of its layout; None where its run file cannot be read."""
    step: int
    """The last that was recorded."""
    tokens: float | None
    """Trained on so far."""
    terms: tuple[Term, ...]
    """In the ledger's order; what no witness knows is left out."""
    per_billion_tokens: tuple[Term, ...]
    """`device_s`, `energy_j` and `money` for a billion tokens of the steps."""
    currency: str | None
    """Of money, ISO 4217."""
    goodput: Goodput
    notes: tuple[str, ...]
    """What could not be read or planned, and what to do about it."""

    def json(self) -> dict[str, Any]:  # type: ignore[override]
        """The object of `ridgeline audit --json`."""
        return self.model_dump(mode="json")


def audit(folder: Path, rehearse: Callable[[Run], Ledger] | None = None) -> Audit:
    """Lay side by side what the run folder's witnesses say; a run that was killed, what there is.

    Plans the run if nobody has yet, and has `rehearse` trace it. Raises RunFolderError for a folder
    that is missing, or holds no readable record of a run.
    """
    history = read_history(folder)
    found = read_witnesses(history)
    plan_witness(history, found)
    if rehearse is not None:
        rehearse_witness(history, found, rehearse)
    return audit_of(history, found)


def audit_of(history: History, found: Witnesses) -> Audit:
    """The audit of witnesses that were read already."""
    goodput = goodput_of(history)
    ledgers = dict(found.ledgers)
    ledgers["train"] = measured_ledger(history, ledgers.get("train"), goodput)
    tokens = next((s.tokens for s in reversed(history.steps) if s.tokens is not None), None)
    machine = _machine(found.run)
    currency = machine.currency if machine and machine.price_per_device_hour else None
    notes = [*history.notes, *found.notes]
    if "rehearse" not in ledgers and not any(note.startswith("Rehearsed") for note in notes):
        notes.append("Rehearsed is a dash until `ridgeline audit` has traced the run.")
    if "train" not in found.ledgers:
        notes.append(
            "The measured step is metrics.jsonl's: the folder holds no ledgers/train.json, which "
            "`ridgeline train` writes after the first step that it samples."
        )
    return Audit(
        run=found.run.name if found.run else history.folder.resolve().name,
        layout=str(found.run.layout) if found.run else None,
        step=history.last_step,
        tokens=tokens,
        terms=_terms({witness: _flat(ledger) for witness, ledger in ledgers.items()}, ledgers),
        per_billion_tokens=_terms(_per_billion(ledgers, found.run, machine, goodput), {}),
        currency=next((each.currency for each in ledgers.values() if each.currency), currency),
        goodput=goodput,
        notes=tuple(notes),
    )


def _flat(ledger: Ledger) -> dict[str, float]:
    """Every known quantity of a ledger by its dotted name."""
    found: dict[str, float | None] = {}
    for name in ("seconds", "sent", "calls"):
        part = getattr(ledger, name)
        found |= {f"{name}.{term}": getattr(part, term) for term in type(part).model_fields}
        if name == "seconds":
            found |= {
                f"memory.{stage}.{term}": getattr(memory, term)
                for stage, memory in enumerate(ledger.memory)
                for term in type(memory).model_fields
            }
    for name in Ledger.model_fields:
        value = getattr(ledger, name)
        if isinstance(value, float | int) and name != "schema_version":
            found[name] = value
    found |= {f"flops_by_module.{name}": flops for name, flops in ledger.flops_by_module.items()}
    return {name: value for name, value in found.items() if value is not None}


def _terms(
    values: dict[Witness, dict[str, float]], ledgers: dict[Witness, Ledger]
) -> tuple[Term, ...]:
    """The terms that somebody knows, in the order of who knows most."""
    columns = [values.get(witness, {}) for witness in WITNESSES]
    names = _in_order([list(column) for column in columns])
    terms = []
    for name in names:
        planned, rehearsed, measured = (column.get(name) for column in columns)
        plain = ".".join(part for part in name.split(".") if not part.isdecimal())
        plain = "flops_by_module" if name.startswith("flops_by_module") else plain
        terms.append(
            Term(
                name=name,
                planned=planned,
                rehearsed=rehearsed,
                measured=measured,
                planned_difference=_difference(planned, measured),
                rehearsed_difference=_difference(rehearsed, measured),
                sources={
                    witness: ledgers[witness].sources[plain]
                    for witness in WITNESSES
                    if name in values.get(witness, {})
                    and witness in ledgers
                    and plain in ledgers[witness].sources
                },
            )
        )
    return tuple(terms)


def _in_order(columns: list[list[str]]) -> list[str]:
    """All names in the ledger's order: groups as they stand there, within a group as first seen."""
    groups = ("seconds", "memory", "sent", "calls")
    seen = list(dict.fromkeys(name for column in columns for name in column))
    plain = [name for name in Ledger.model_fields if name not in groups]

    def place(name: str) -> tuple[int, int, int]:
        head, _, rest = name.partition(".")
        if head == "memory":
            stage, _, term = rest.partition(".")
            return groups.index(head), int(stage), _fields(head).index(term)
        if head in groups:
            return groups.index(head), 0, _fields(head).index(rest)
        return len(groups), plain.index(head) if head in plain else 0, seen.index(name)

    return sorted(seen, key=place)


def _fields(group: str) -> list[str]:
    """Names of a group of the ledger, in its order."""
    empty = Ledger.model_validate({"witness": "plan", "memory": [{}]})
    part = empty.memory[0] if group == "memory" else getattr(empty, group)
    return list(type(part).model_fields)


def _difference(said: float | None, measured: float | None) -> float | None:
    return None if said is None or not measured else said / measured - 1


def _machine(run: Run | None) -> Cluster | None:
    """The run's cluster, where it is one of the catalogue."""
    if run is None or run.cluster.device == LOCAL:
        return None
    try:
        return cluster(run.cluster.device)
    except MachineError:
        return None


def _per_billion(
    ledgers: dict[Witness, Ledger], run: Run | None, machine: Cluster | None, goodput: Goodput
) -> dict[Witness, dict[str, float]]:
    """What a billion tokens take of devices' time, of energy and of money.

    Time and energy are those of the steps. Money is rent for all the time held: planned with the
    failures that are expected, measured with what was lost (at the catalogue's price).
    """
    if run is None:
        return {}
    devices = run.layout.world if run.layout != "auto" else 1
    step_tokens = run.global_batch * run.sequence
    found: dict[Witness, dict[str, float]] = {}
    for witness, ledger in ledgers.items():
        row = {}
        if ledger.tokens_per_s:
            row["device_s"] = devices * BILLION / ledger.tokens_per_s
        if ledger.step_energy_j is not None:
            row["energy_j"] = ledger.step_energy_j / step_tokens * BILLION
        elif ledger.energy_j is not None and (tokens := planned_tokens(ledger)):
            row["energy_j"] = ledger.energy_j / tokens * BILLION
        price = machine.price_per_device_hour if machine else None
        if witness == "plan" and ledger.money is not None and (tokens := planned_tokens(ledger)):
            row["money"] = ledger.money / tokens * BILLION
        elif witness == "train" and price and goodput.fraction and "device_s" in row:
            row["money"] = row["device_s"] / SECONDS_PER_HOUR * price / goodput.fraction
        found[witness] = row
    return found
