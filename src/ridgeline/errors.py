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
    ├── CheckpointError     a checkpoint that is damaged, foreign or missing
    ├── LaunchError         worker processes that could not be started or that died
    ├── HangError           a step, or a phase beside the steps, that took longer than its limit
    └── NotLearnt           the run ended without having learnt what its file demands

Each says three things: what was asked, the rule that forbids it (with the arithmetic), and what
would work. The command prints them without a traceback and exits with status 2 (NotLearnt: 1;
HangError: 75, as a run that was asked to stop: start it again).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class RidgelineError(Exception):
    """Base of the tree. `asked`: what was asked; `rule`: why not; `remedy`: what would work."""

    exit_status: ClassVar[int] = 2

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
    """A checkpoint is damaged, foreign or missing."""


class LaunchError(RidgelineError):
    """Worker processes could not be started, or died."""


class HangError(RidgelineError):
    """A step, or a phase beside the steps, took longer than its limit; who is late is named."""

    exit_status: ClassVar[int] = 75


class NotLearnt(RidgelineError):  # noqa: N818 - it is a verdict, not a fault
    """The run ended, but not as far below its baselines as its file demands."""

    exit_status: ClassVar[int] = 1


def nearest(wanted: str, known: Iterable[str]) -> str:
    """'did you mean …?' with the closest of `known`, or the whole list when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
