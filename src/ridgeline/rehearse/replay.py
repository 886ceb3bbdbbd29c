"""A whole step of one pipeline rank, put together from what each kind of action does.

Lifetimes of what chunks hand to one another follow `train.pipeline.Pipeline`, line by line: a test
holds both to the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ridgeline.layout.schedules import Action
from ridgeline.layout.transfers import MOST_LEAVING, Step, Transfer
from ridgeline.rehearse.effects import Effect, contexts
from ridgeline.rehearse.trace import AFTER, BEFORE, Trace


@dataclass
class Sums:
    """What a rank does in a step; bytes are those it sends."""

    flops: Counter[str] = field(default_factory=Counter)
    again: float = 0.0
    kernels: float = 0
    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Moment:
    """Bytes of a rank at the highest point of one of its steps, by owner."""

    step: str
    bytes_by_owner: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.bytes_by_owner.values())


@dataclass(frozen=True)
class Replay:
    """A step of one pipeline rank."""

    timeline: tuple[Moment, ...]
    """One moment for each step of its list, what is before it, and after."""
    sums: Sums

    @property
    def peak(self) -> Moment:
        """The moment when most is held."""
        return max(self.timeline, key=lambda moment: moment.total)


class _Handed:
    """What is handed over: who holds it, and when nobody does any more."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.holders: Counter[int] = Counter()
        self.owners: list[str] = []
        self.freed: Counter[str] = Counter()

    def new(self, owner: str) -> int:
        """One more, held once."""
        self.owners.append(owner)
        number = len(self.owners) - 1
        self.holders[number] = 1
        return number

    def hold(self, number: int) -> int:
        """It is held once more."""
        self.holders[number] += 1
        return number

    def release(self, number: int | None) -> None:
        """One holder lets go."""
        if number is not None:
            self.holders[number] -= 1
            if not self.holders[number]:
                self.freed[self.owners[number]] += self.size_bytes


def replay(steps: Sequence[Step], trace: Trace, chunks: int, micro_batches: int) -> Replay:
    """Put the steps of one rank together: `chunks` of the whole model, `micro_batches` of a step.

    Raises KeyError for an action in a context that `trace` has not seen.
    """
    level = Counter(trace.resting)
    sums, timeline = Sums(), []

    def happens(name: str, effect: Effect, more: int = 0) -> None:
        at = level.copy()
        at.update(effect.at_peak)
        at["temporary"] += more
        timeline.append(Moment(name, dict(at)))
        level.update(effect.net)
        _add(sums, effect)

    before = trace.effects[BEFORE]
    further = micro_batches - trace.micro_batches
    happens("before", before, trace.tokens_bytes * further)
    level["temporary"] += trace.tokens_bytes * further
    sums.kernels += trace.tokens_kernels * further

    held = _Handed(trace.hidden_bytes)
    holding = _Holding(held, chunks)
    known = iter(contexts(steps))
    for step in steps:
        if isinstance(step, Transfer):
            holding.transfer(step)
            sums.calls["pipeline"] += 1
            sums.sent_bytes["pipeline"] += trace.hidden_bytes * (step.kind == "send")
            if step.kind == "receive":
                level["activations" if step.what == "F" else "temporary"] += trace.hidden_bytes
        else:
            action, context = next(known)
            happens(str(action), trace.effects[context])
            holding.action(action)
        level.subtract(held.freed)
        held.freed.clear()
        if isinstance(step, Transfer):
            timeline.append(Moment(f"{step.kind} {step.what}{step.micro_batch}", dict(level)))
    holding.settle()
    level.subtract(held.freed)
    happens("after", trace.effects[AFTER])
    return Replay(tuple(timeline), sums)


class _Holding:
    """Who holds what: the tables of `Pipeline`, of numbers in place of tensors."""

    def __init__(self, held: _Handed, chunks: int) -> None:
        self.held = held
        self.chunks = chunks
        self.here: dict[tuple[str, int, int], int] = {}
        self.leaving: list[int] = []
        self.kept: dict[tuple[int, int], list[int | None]] = {}

    def transfer(self, step: Transfer) -> None:
        """A message starts; those that left long ago are waited for."""
        while len(self.leaving) > MOST_LEAVING:
            self.held.release(self.leaving.pop(0))
        key = (step.what, step.chunk, step.micro_batch)
        if step.kind == "send":
            self.leaving.append(self.here.pop(key))
        else:
            self.here[key] = self.held.new("activations" if step.what == "F" else "temporary")

    def action(self, action: Action) -> None:
        """What an action takes, makes, keeps and lets go."""
        kind, chunk, micro_batch = action
        if kind == "F":
            given = self.here.pop(("F", chunk, micro_batch)) if chunk > 0 else None
            made = None
            if chunk < self.chunks - 1:
                made = self.held.new("activations")
                self.here["F", chunk + 1, micro_batch] = self.held.hold(made)
            self.kept[chunk, micro_batch] = [given, made, None]
            return
        kept = self.kept.pop((chunk, micro_batch))
        if kind in "BI" and chunk < self.chunks - 1:
            kept[2] = self.here.pop(("B", chunk, micro_batch))
        if kind in "BI" and chunk > 0:
            self.here["B", chunk - 1, micro_batch] = self.held.new("temporary")
        if kind == "I":
            self.kept[chunk, micro_batch] = kept
        else:
            for each in kept:
                self.held.release(each)

    def settle(self) -> None:
        """All messages are waited for."""
        for number in self.leaving:
            self.held.release(number)
        self.leaving.clear()


def _add(sums: Sums, effect: Effect) -> None:
    sums.flops.update(effect.flops)
    sums.again += effect.again
    sums.kernels += effect.kernels
    sums.calls.update(effect.calls)
    sums.sent_bytes.update(effect.sent_bytes)
