"""Ridgeline plans, rehearses, trains and audits the training of large language models.

Each verb of the command is one function here; a script that brings its own block, loss or
optimizer starts exactly like the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The packages `audit`, `plan`, `rehearse`, `train` and the verbs share names: load the (empty)
# packages first, so that importing one of their modules later does not put the package in the
# verb's place.
from ridgeline import audit as _audit_package  # noqa: F401
from ridgeline import plan as _plan_package  # noqa: F401
from ridgeline import rehearse as _rehearse_package  # noqa: F401
from ridgeline import train as _train_package  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from ridgeline.audit.audit import Audit
    from ridgeline.data.manifest import Manifest
    from ridgeline.launch.stopping import StopFlag
    from ridgeline.model.shape import ModelShape
    from ridgeline.plan.cost import Cost
    from ridgeline.plan.plan import Plan
    from ridgeline.plan.validate import Validation
    from ridgeline.rehearse.rehearse import Rehearsal
    from ridgeline.run import Run
    from ridgeline.train.build import MakeDecoder, MakeOptimizer
    from ridgeline.train.loop import LossFunction
    from ridgeline.train.parity import Parity
    from ridgeline.train.worker import Outcome

__all__ = [
    "audit",
    "cost",
    "parity",
    "plan",
    "prepare",
    "read_run",
    "rehearse",
    "report",
    "sample",
    "train",
    "validate",
]


def read_run(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Read a run file; `overrides` such as `["--optimizer.lr", "3e-4"]`."""
    from ridgeline.run import read_run as read

    return read(path, overrides)


def prepare(run: Run, console: Console | None = None) -> Manifest:
    """Tokenize a run's corpora into shards; see `ridgeline.data.prepare.prepare`."""
    from ridgeline.data.prepare import prepare as make

    return make(run.data, run.model.vocab, run.seed, console)


def train(
    run: Run,
    *,
    decoder: MakeDecoder | None = None,
    loss: LossFunction | None = None,
    optimizer: MakeOptimizer | None = None,
    stop: StopFlag | None = None,
) -> Outcome:
    """Train a run, with a decoder, loss or optimizer of one's own where given.

    `decoder(shape)` makes the model, `loss(logits_BLV, targets_BL)` sums over tokens, and
    `optimizer(model, settings)` makes the optimizer; see `ridgeline.train.start.train`. Signals set
    `stop`, as the caller may.
    """
    from ridgeline.launch.local import started_by_launcher, warm_up
    from ridgeline.launch.stopping import Wish, stop_on_signals

    stop = stop or Wish()
    with stop_on_signals(stop, within_s=run.faults.stop_within_s):
        if not started_by_launcher() and (run.layout == "auto" or run.layout.world > 1):
            warm_up()  # the fork server imports torch while this process does
        from ridgeline.train.start import train as start

        parts = {"decoder": decoder, "loss": loss, "optimizer": optimizer}
        own: Any = {name: part for name, part in parts.items() if part is not None}
        return start(run, **own, stop=stop)


def parity(
    run: Run,
    layouts: Sequence[str] = (),
    steps: int = 10,
    *,
    decoder: MakeDecoder | None = None,
    loss: LossFunction | None = None,
    optimizer: MakeOptimizer | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Parity:
    """Train some steps in one process and in each layout, and compare; every part as in `train`.

    `layouts` are sentences such as "dp2 mb2"; none: the usual ones that this run can have. See
    `ridgeline.train.parity.parity`.
    """
    from ridgeline.launch.local import warm_up

    warm_up()  # the fork server imports torch while this process does
    from ridgeline.train.parity import parity as compare

    parts = {"decoder": decoder, "loss": loss, "optimizer": optimizer, "progress": progress}
    own: Any = {name: part for name, part in parts.items() if part is not None}
    return compare(run, layouts, steps, **own)


def rehearse(
    run: Run,
    *,
    decoder: MakeDecoder | None = None,
    loss: LossFunction | None = None,
    optimizer: MakeOptimizer | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Rehearsal:
    """Trace the real training step of a run at its full size, on one CPU; every part as in `train`.

    See `ridgeline.rehearse.rehearse.rehearse`.
    """
    from ridgeline.rehearse.rehearse import rehearse as trace

    parts = {"decoder": decoder, "loss": loss, "optimizer": optimizer, "progress": progress}
    own: Any = {name: part for name, part in parts.items() if part is not None}
    return trace(run, **own)


def sample(folder: Path, prompt: str, **options: Any) -> str:
    """Continue `prompt` with the newest checkpoint; see `ridgeline.train.sample.sample`."""
    from ridgeline.train.sample import sample as draw

    return draw(folder, prompt, **options)


def report(folder: Path) -> Path:
    """Write a run folder's report.html; see `ridgeline.audit.report.write_report`."""
    from ridgeline.audit.report import write_report

    return write_report(folder)


def audit(folder: Path) -> Audit:
    """What was planned, rehearsed and measured of a run; see `ridgeline.audit.audit.audit`.

    Plans and rehearses it where the folder does not hold that yet.
    """
    from ridgeline.audit.audit import audit as compare

    return compare(folder, lambda run: rehearse(run).ledger)


def plan(run: Run, on: str | None = None, **options: Any) -> Plan:
    """The best layouts of a run on its cluster, or on machine `on`; see `ridgeline.plan.plan`."""
    from ridgeline.plan.plan import plan_run

    return plan_run(run, on, **options)


def cost(model: ModelShape | str, tokens: int, on: str, **options: Any) -> Cost:
    """Days, money and energy of training `model` (or the catalogue's of that name) on machine `on`.

    See `ridgeline.plan.cost_text.cost_of`.
    """
    from ridgeline.model.catalogue import entry
    from ridgeline.plan.cost_text import cost_of

    return cost_of(entry(model).shape if isinstance(model, str) else model, tokens, on, **options)


def validate(*files: Path) -> Validation:
    """Predict published or measured runs; see `ridgeline.plan.validate.validate`."""
    from ridgeline.plan.validate import validate as predict

    return predict(list(files))
