"""What each kind of action does to a rank, and which micro-batches show all kinds.

Two actions of one context (kind, what the chunk did before, how many gradients it has and awaits)
do the same, so a few micro-batches tell of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ridgeline.layout.schedules import Action
from ridgeline.layout.transfers import Step
from ridgeline.train.tracker import Mark, Tracker


class Context(NamedTuple):
    """What decides what an action does."""

    kind: str
    """F, B, I or W; "before" and "after" are what surrounds the pipeline's pass."""
    slot: int
    """Which of the rank's chunks, in their order along the model."""
    after: str | None = None
    """What the chunk did before; None: nothing in this step."""
    gradients: int = 0
    """How often gradients came before these, 2 for more: FSDP2 begins to keep the last reduction
    over copies with the first ones, and the one before that with the second."""
    last: bool = False
    """Whether it gives the step's last gradients of the chunk."""
    first_forward: bool = False
    """Whether FSDP2 takes it for the backward pass of the step's first forward pass, before which
    it gathers nothing ahead: it matches the latest forward pass that has none yet, whichever
    micro-batch that was of."""


def contexts(steps: Iterable[Step]) -> Iterator[tuple[Action, Context]]:
    """The actions of a rank's list, each with its context."""
    actions = [step for step in steps if isinstance(step, Action)]
    left = Counter(action.chunk for action in actions if action.kind in "BW")
    whole = dict(left)
    slots = {chunk: slot for slot, chunk in enumerate(sorted(whole))}
    before: dict[int, str] = {}
    forwards: Counter[int] = Counter()
    unmatched: dict[int, list[int]] = {chunk: [] for chunk in whole}
    for action in actions:
        kind, chunk, _ = action
        first_forward = False
        if kind == "F":
            unmatched[chunk].append(forwards[chunk])
            forwards[chunk] += 1
        elif kind in "BI":
            first_forward = unmatched[chunk].pop() == 0
        gradients, last = 0, False
        if kind in "BW":
            gradients, last = min(2, whole[chunk] - left[chunk]), left[chunk] == 1
            left[chunk] -= 1
        after = before.get(chunk)
        yield action, Context(kind, slots[chunk], after, gradients, last, first_forward)
        before[chunk] = kind


def enough(steps: Sequence[Step]) -> list[int]:
    """Micro-batches whose actions alone show every context of `steps`.

    Those at both ends, more and more of them; then those go without which all is still shown.
    """
    wanted = {context for _, context in contexts(steps)}
    every = sorted({step.micro_batch for step in steps})
    ends = 1
    while not wanted <= _shown(only(steps, _both_ends(every, ends))):
        ends *= 2
    chosen = _both_ends(every, ends)
    short = only(steps, chosen)
    size = len(chosen) // 2
    while size:  # without halves, then quarters, down to single ones
        start = 0
        while start < len(chosen):
            others = [i for i in range(len(chosen)) if not start <= i < start + size]
            fewer = only(short, others)
            if others and wanted <= _shown(fewer):
                short, chosen = fewer, [chosen[each] for each in others]
            else:
                start += size
        size //= 2
    return chosen


def _shown(steps: Iterable[Step]) -> set[Context]:
    return {context for _, context in contexts(steps)}


def _both_ends(values: Sequence[int], count: int) -> list[int]:
    return sorted({*values[:count], *values[-count:]})


def only(steps: Sequence[Step], micro_batches: Sequence[int]) -> tuple[Step, ...]:
    """The steps of some micro-batches, which are numbered anew."""
    number = {micro_batch: index for index, micro_batch in enumerate(micro_batches)}
    kept = (step for step in steps if step.micro_batch in number)
    return tuple(step._replace(micro_batch=number[step.micro_batch]) for step in kept)


@dataclass(frozen=True)
class Effect:
    """What something does to a rank; bytes are above what is held when it starts."""

    net: Mapping[str, int]
    """Bytes more at its end, by owner."""
    peak_bytes: int
    """The most at any moment of it, at least 0."""
    at_peak: Mapping[str, int]
    """By owner, at that moment."""
    flops: Mapping[str, float]
    """By kind of module, attention counted causally."""
    again: float
    """FLOPs among them that backward does a second time."""
    calls: Mapping[str, float]
    """Messages by axis."""
    sent_bytes: Mapping[str, float]
    """By axis."""
    kernels: float


def effect_between(tracker: Tracker, start: Mark, end: Mark, shared: set[int]) -> Effect:
    """What happened between two marks; storages in `shared` are born, but do not end: they are
    handed over, and end when nobody holds them."""
    now: Counter[str] = Counter()
    at_peak: Mapping[str, int] = {}
    total = most = 0
    for storage, more in tracker.events[start.events : end.events]:
        if storage in shared and more < 0:
            continue
        total += more
        now[tracker.owner(storage)] += more
        if total > most:
            most, at_peak = total, dict(now)
    flops: Counter[str] = Counter()
    for work in tracker.work[start.work : end.work]:
        flops[work.kind] += work.flops  # type: ignore[assignment]
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for message in tracker.messages[start.messages : end.messages]:
        calls[message.axis] += 1
        sent[message.axis] += message.sent_bytes  # type: ignore[assignment]
    return Effect(
        net={owner: more for owner, more in now.items() if more},
        peak_bytes=most,
        at_peak=at_peak,
        flops=dict(flops),
        again=sum(work.flops for work in tracker.work[start.work : end.work] if work.again),
        calls=calls,
        sent_bytes=sent,
        kernels=end.kernels - start.kernels,
    )
