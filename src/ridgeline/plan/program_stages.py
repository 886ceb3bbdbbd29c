"""Memory of every stage of one layout at its fullest moment, as Ridgeline's own program fills it.

Each pipeline rank's list of actions is followed: what the micro-batches in flight keep, what lies
between stages, and the backward passes, any of which may be the fullest moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping

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

    peaks = []
    for stage in range(program.layout.pipeline):
        works = {chunk.index: work_of(chunk) for chunk in program.chunks(stage)}
        most: Counter[str] = Counter()
        for now in _moments(program, stage, works):
            if now.total() > most.total():
                most = now
        peaks.append(most)
    return peaks


def _moments(program: Program, stage: int, works: Mapping[int, Work]) -> Iterator[Counter[str]]:
    """Bytes by component at the fullest moment of each backward pass that differs from others."""
    in_flight: Counter[int] = Counter()
    done: Counter[int] = Counter()
    halves: Counter[int] = Counter()
    handed, seen = _Handed(), set()
    for step in program.steps[stage]:
        if isinstance(step, Transfer):
            handed.transfer(step)
            continue
        kind, index, micro_batch = step
        if kind == "F":
            in_flight[index] += 1
            handed.arrived.discard(("F", index, micro_batch))
            continue
        # tokens have no gradient: of chunk 0, the weights' half does it all
        if kind == "B" or (kind == "W") == (index == 0):
            handed.arrived.discard(("B", index, micro_batch))
            last, beside = done[index] + 1 == program.counted, handed.beside()
            begun = tuple(bool(done[each]) for each in works)
            counts = tuple((in_flight[each], halves[each]) for each in works)
            state = (kind, index, counts, begun, last, beside)
            if state not in seen:
                seen.add(state)
                now = _held(program, stage, works, in_flight, done, halves)
                now["activations"] += beside[0] * works[index].residual  # type: ignore[assignment]
                now["temporary"] += beside[1] * works[index].residual  # type: ignore[assignment]
                now.update(works[index].backward(kind, done[index] > 0, last))
                yield now
        halves[index] += {"I": 1, "W": -1}.get(kind, 0) * (index > 0)
        if kind in "BW":
            in_flight[index] -= 1
            done[index] += 1
            handed.done.add((index, micro_batch))


def _held(
    program: Program, stage: int, works: Mapping[int, Work], in_flight: Counter[int],
    done: Counter[int], halves: Counter[int],
) -> Counter[str]:  # fmt: skip
    """What is held when a backward pass begins."""
    now: Counter[str] = Counter()
    ranks = program.rank_of_chunk
    for index, work in works.items():
        now.update(work.resting)
        leaves = index + 1 < len(ranks) and ranks[index + 1] != stage
        kept = work.kept + work.residual * leaves  # what it hands on
        now["activations"] += in_flight[index] * kept  # type: ignore[assignment]
        if halves[index]:
            for name, size in work.halved.items():
                now[name] += halves[index] * size
        if done[index]:
            now["gradients"] += work.gradients  # type: ignore[assignment]
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
