"""Every error a user can meet.

    RidgelineError
    ├── RunError            the run file: not TOML, unknown key, impossible value, two budgets
    ├── ModelError          unknown model, or a shape that cannot be
    ├── MachineError        unknown device
    ├── LayoutError         a layout that cannot be parsed, does not divide, or cannot be trained
    ├── PlanError           a question to the planner with an absurd or contradictory number
    ├── LedgerError         a ledger that is not JSON, or with a term that cannot be
    ├── DataError           anything between text and batches
    │   ├── SourceError     a source that is missing, empty or unreadable
    │   ├── TokenizerError  a tokenizer that does not fit its shards or the model
    │   └── ShardError      a shard that is truncated, foreign or damaged
    ├── RunFolderError      a run folder that belongs to another run, or that another job holds
    ├── CheckpointError     a checkpoint that is foreign, missing, or cannot be written
    │   └── DamagedCheckpoint   one that is not what was written: the one before it is used
    ├── LaunchError         worker processes that could not be started or that died
    │   └── WorkerLost      a worker that was killed, or whose device or connection failed
    ├── CorruptionError     a device that computes wrongly, or copies of one number that differ
    ├── HangError           a step, or a phase beside the steps, that took longer than its limit
    ├── NotLearnt           the run ended without having learnt what its file demands
    └── Stopped             the run was asked to stop before its first step

Each says three things: what was asked, the rule that forbids it (with the arithmetic), and what
would work. The command prints them without a traceback and exits with status 2 (NotLearnt: 1;
Stopped and HangError: 75, as for a run that was saved: start it again).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class RidgelineError(Exception):
    """Base of the tree. `asked`: what was asked; `rule`: why not; `remedy`: what would work."""

    exit_status: ClassVar[int] = 2
    passes: ClassVar[bool] = False
    """Whether the same run, started again from its newest checkpoint, may well not meet it."""

    def __init__(self, asked: str, rule: str = "", remedy: str = "") -> None:
        super().__init__(asked, rule, remedy)  # positional, so that it survives pickling
        self.asked = asked
        self.rule = rule
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.asked]
        if self.rule:
            lines.append(f"  rule: {self.rule}")
        if self.remedy:
            lines.append(f"  try:  {self.remedy}")
        return "\n".join(lines)


class RunError(RidgelineError):
    """The run file cannot be read or says something impossible."""


class ModelError(RidgelineError):
    """No such model, or a shape that cannot be."""


class MachineError(RidgelineError):
    """No such device, or a name that could mean two."""


class LayoutError(RidgelineError):
    """A layout that cannot be parsed, does not divide the run, or cannot be trained."""


class PlanError(RidgelineError):
    """A question to the planner holds an absurd or contradictory number."""


class LedgerError(RidgelineError):
    """A ledger cannot be read, or holds a term that cannot be."""


class DataError(RidgelineError):
    """Something between text and batches is wrong."""


class SourceError(DataError):
    """A source of text is missing, empty or unreadable."""


class TokenizerError(DataError):
    """A tokenizer does not fit its shards or the model."""


class ShardError(DataError):
    """A shard is truncated, foreign or damaged."""


class RunFolderError(RidgelineError):
    """The run folder belongs to another run, or another job holds it."""


class CheckpointError(RidgelineError):
    """A checkpoint is foreign or missing, or cannot be written."""


class DamagedCheckpoint(CheckpointError):  # noqa: N818 - it is a state
    """A checkpoint is not what was written: a run passes it over for the one before it."""


class LaunchError(RidgelineError):
    """Worker processes could not be started, or died."""


class WorkerLost(LaunchError):  # noqa: N818 - it happened to a worker
    """A worker process died of what lies outside the program: killed, or a failed device."""

    passes: ClassVar[bool] = True


class CorruptionError(RidgelineError):
    """A device computes wrongly, or copies of what should be one number differ between ranks."""

    passes: ClassVar[bool] = True


class HangError(RidgelineError):
    """A step, or a phase beside the steps, took longer than its limit; who is late is named."""

    exit_status: ClassVar[int] = 75
    passes: ClassVar[bool] = True


class NotLearnt(RidgelineError):  # noqa: N818 - it is a verdict, not a fault
    """The run ended, but not as far below its baselines as its file demands."""

    exit_status: ClassVar[int] = 1


class Stopped(RidgelineError):  # noqa: N818 - somebody wished it
    """The run was asked to stop before its first step."""

    exit_status: ClassVar[int] = 75
    """sysexits' EX_TEMPFAIL: start me again. A run that stopped later and was saved has it too."""


def nearest(wanted: str, known: Iterable[str]) -> str:
    """'did you mean …?' with the closest of `known`, or the whole list when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
