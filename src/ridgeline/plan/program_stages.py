"""Memory of every stage of one layout at its fullest moment, as Ridgeline's own program fills it.

Each pipeline rank's list of actions is followed: what the micro-batches in flight keep, what lies
between stages, and the backward passes, any of which may be the fullest moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from ridgeline.layout.stages import Chunk
from ridgeline.layout.transfers import MOST_LEAVING, Transfer
from ridgeline.plan.program import Program
from ridgeline.plan.program_memory import Work


def stage_peaks(program: Program) -> list[Counter[str]]:
    """Bytes by component at the fullest moment of every stage, first to last."""
    known: dict[Hashable, Work] = {}

    def work_of(chunk: Chunk) -> Work:
        experts = tuple(program.shape.experts_at(layer) is None for layer in chunk.layers)
        key = (chunk.first, chunk.last, experts)
        if key not in known:
            known[key] = Work(program, chunk)
        return known[key]

    return [
        _fullest(program, stage, {each.index: work_of(each) for each in program.chunks(stage)})
        for stage in range(program.layout.pipeline)
    ]


def _fullest(program: Program, stage: int, works: Mapping[int, Work]) -> Counter[str]:
    """The fullest moment of all backward passes of a stage."""
    flight = _Flight(program, stage, works)
    handed, fullest = _Handed(), 0.0
    most: Counter[str] = Counter()
    for step in program.steps[stage]:
        if isinstance(step, Transfer):
            handed.transfer(step)
            continue
        kind, index, micro_batch = step
        if kind == "F":
            flight.forward(index)
            handed.arrived.discard(("F", index, micro_batch))
            continue
        # tokens have no gradient: of chunk 0, the weights' half does it all
        if kind == "B" or (kind == "W") == (index == 0):
            handed.arrived.discard(("B", index, micro_batch))
            more, residual = flight.done[index] > 0, works[index].residual
            passing = works[index].backward(kind, more, flight.done[index] + 1 == program.counted)
            total = flight.held + passing.total()
            if total + (len(handed.arrived) + len(handed.leaving)) * residual > fullest:
                states, gradients = handed.beside()
                if total + (states + gradients) * residual > fullest:
                    fullest = total + (states + gradients) * residual
                    most = flight.by_component()
                    most["activations"] += round(states * residual)
                    most["temporary"] += round(gradients * residual)
                    most.update(passing)
        flight.backward(kind, index)
        if kind in "BW":
            handed.done.add((index, micro_batch))
    return most


class _Flight:
    """What a stage holds between two actions."""

    def __init__(self, program: Program, stage: int, works: Mapping[int, Work]) -> None:
        self.works = works
        self.flying: Counter[int] = Counter()
        self.halves: Counter[int] = Counter()
        self.done: Counter[int] = Counter()
        ranks = program.rank_of_chunk
        leaves = {index: index + 1 < len(ranks) and ranks[index + 1] != stage for index in works}
        # what it keeps, and what it hands on
        self.kept = {i: round(w.kept + w.residual * leaves[i]) for i, w in works.items()}
        self.held = float(sum(work.resting.total() for work in works.values()))
        """Bytes in all."""

    def forward(self, index: int) -> None:
        """One more micro-batch on a chunk."""
        self.flying[index] += 1
        self.held += self.kept[index]

    def backward(self, kind: str, index: int) -> None:
        """After a backward pass or a half of one."""
        change = {"I": 1, "W": -1}.get(kind, 0) * (index > 0)
        self.halves[index] += change
        self.held += change * self.works[index].halved.total()
        if kind in "BW":
            self.held -= self.kept[index]
            self.flying[index] -= 1
            self.held += 0 if self.done[index] else self.works[index].gradients
            self.done[index] += 1

    def by_component(self) -> Counter[str]:
        """The same bytes, by whose they are."""
        now: Counter[str] = Counter()
        for index, work in self.works.items():
            now.update(work.resting)
            now["activations"] += self.flying[index] * self.kept[index]
            now["gradients"] += round(work.gradients) if self.done[index] else 0
            for name, size in work.halved.items():
                now[name] += self.halves[index] * size
        return now


class _Handed:
    """What lies between stages: hidden states and gradients that came early or are leaving."""

    def __init__(self) -> None:
        self.arrived: set[tuple[str, int, int]] = set()
        self.leaving: list[tuple[str, int, int]] = []
        self.done: set[tuple[int, int]] = set()

    def transfer(self, step: Transfer) -> None:
        """A message starts; those that left long ago are let go."""
        del self.leaving[: max(0, len(self.leaving) - MOST_LEAVING)]
        key = (step.what, step.chunk, step.micro_batch)
        if step.kind == "send":
            self.leaving.append(key)
        else:
            self.arrived.add(key)

    def beside(self) -> tuple[int, int]:
        """Hidden states, and gradients, that no micro-batch in flight keeps anyway."""
        states = sum(what == "F" for what, _, _ in self.arrived)
        states += sum(
            what == "F" and (chunk - 1, micro_batch) in self.done
            for what, chunk, micro_batch in self.leaving
        )
        gradients = [what for what, _, _ in (*self.arrived, *self.leaving) if what == "B"]
        return states, len(gradients)
