"""Pipeline schedules as explicit lists of actions, one list per pipeline rank.

The model is cut into chunks, numbered along the model. A rank holds one chunk, or several: chunk c
lies on rank c mod p ("loop": interleaved schedules), or ranks 0 … p-1 hold the first p chunks and
ranks p-1 … 0 the last p ("V": ZBV and DualPipeV).

Kinds of work on one micro-batch of one chunk:

    F  forward
    B  the whole backward
    I  backward for the chunk's input: what the previous chunk waits for
    W  backward for the chunk's weights: what nobody waits for, so it can fill a bubble

A list says only the order. What each action waits for, and when it runs, is `plan.timeline`'s.
Written out (`0F3`: chunk 0, forward, micro-batch 3), an action has the notation of
torch.distributed.pipelining.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout, Schedule

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One piece of work: what kind, on which chunk of the model, for which micro-batch."""

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule: which rank holds which chunk, and the order of every rank's actions."""

    name: str
    micro_batches: int
    rank_of_chunk: tuple[int, ...]
    """The pipeline rank that holds each chunk, along the model."""
    actions: tuple[tuple[Action, ...], ...]
    """Each rank's actions, in their order."""

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.actions)

    @property
    def chunks(self) -> int:
        """Chunks of the model."""
        return len(self.rank_of_chunk)

    def peak_in_flight(self) -> tuple[int, ...]:
        """Most activations each rank holds at once, counted in micro-batches of one chunk.

        An activation lives from F to the end of B, or of W where the backward is split (W still
        needs the chunk's inputs). 1F1B: min(m, p - rank), arXiv:2104.04473 section 2.2.
        """
        peaks = []
        for rank_actions in self.actions:
            held = peak = 0
            for action in rank_actions:
                held += {"F": 1, "I": 0, "W": -1, "B": -1}[action.kind]
                peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)

    def check(self) -> None:
        """Every micro-batch of every chunk has one F and one B (or one I and one W), at home.

        Raises LayoutError naming the first action that is missing, repeated or misplaced.
        """
        if self.micro_batches < 1:
            raise LayoutError(
                f"schedule {self.name} of {self.micro_batches} micro-batches", "1 is least"
            )
        found = Counter(action for actions in self.actions for action in actions)
        for rank, actions in enumerate(self.actions):
            for action in actions:
                inside = 0 <= action.chunk < self.chunks
                home = self.rank_of_chunk[action.chunk] if inside else None
                known = 0 <= action.micro_batch < self.micro_batches
                if home != rank or found[action] > 1 or not known:
                    raise LayoutError(
                        f"action {action} on rank {rank} of schedule {self.name}",
                        f"each action stands once, on the rank of its chunk ({home}), for "
                        f"micro-batches 0 to {self.micro_batches - 1}; this one stands "
                        f"{found[action]} times",
                    )
        for chunk in range(self.chunks):
            for micro_batch in range(self.micro_batches):
                has = "".join(k for k in "FBIW" if found[Action(k, chunk, micro_batch)])  # type: ignore[arg-type]
                if has not in ("FB", "FIW"):
                    raise LayoutError(
                        f"micro-batch {micro_batch} of chunk {chunk} in schedule {self.name}",
                        f"it needs F and B, or F, I and W; it has {has or 'nothing'}",
                    )


def chunks_per_rank(name: Schedule, interleave: int) -> int:
    """Chunks of the model on each rank: `interleave` (v), and always 2 for the V schedules.

    Raises LayoutError where the schedule cannot interleave that way.
    """
    if name in ("zbv", "dualpipev"):
        if interleave in (1, 2):  # 1 is a layout's default: v was not said
            return 2
        raise LayoutError(
            f"{name} v{interleave}", f"{name} folds the model once: 2 chunks per rank", f"{name} v2"
        )
    if name in ("gpipe", "zbh1") and interleave > 1:
        instead = "izb" if name == "zbh1" else "1f1b"
        raise LayoutError(
            f"{name} v{interleave}",
            f"{name} has one chunk per rank",
            f"{name}, or {instead} v{interleave}",
        )
    return interleave


def pipeline_schedule(
    name: Schedule, pipeline: int, micro_batches: int, interleave: int = 1
) -> PipelineSchedule:
    """The lists of actions of schedule `name` over `pipeline` ranks.

    gpipe       arXiv:1811.06965: all forwards, then all backwards
    1f1b        arXiv:2104.04473 section 2.2; with interleave > 1 its interleaved schedule
    zbh1        arXiv:2401.10241 section 3: 1F1B with W put off into the tail, and no more memory
    izb         the same on interleaved chunks
    zbv         arXiv:2401.10241 section 6: two chunks per rank, folded
    dualpipev   DeepSeek's DualPipe (arXiv:2412.19437) cut in half, as in their published code

    Raises LayoutError for counts below 1 and for an `interleave` the schedule has not.
    """
    for what, count in (("pp", pipeline), ("micro-batches", micro_batches), ("v", interleave)):
        if count < 1:
            raise LayoutError(f"{what} {count} in a pipeline schedule", "counts start at 1", "1")
    per_rank = chunks_per_rank(name, interleave)
    ranks = range(pipeline)
    if name in ("zbv", "dualpipev"):
        rank_of_chunk = (*ranks, *reversed(ranks))
        one_rank = _zbv if name == "zbv" else _dualpipev
        lists = [one_rank(rank, pipeline, micro_batches) for rank in ranks]
    else:
        rank_of_chunk = tuple(ranks) * per_rank
        forwards = _rounds(pipeline, micro_batches, per_rank)
        lists = [_looped(name, rank, pipeline, forwards) for rank in ranks]
    return PipelineSchedule(
        name=name if per_rank == interleave == 1 else f"{name} v{per_rank}",
        micro_batches=micro_batches,
        rank_of_chunk=rank_of_chunk,
        actions=tuple(tuple(actions) for actions in lists),
    )


def schedule_of(layout: Layout, micro_batches: int) -> PipelineSchedule:
    """The schedule of a layout. Without a pipeline there is one chunk, also where it would fold."""
    name = layout.schedule if layout.pipeline > 1 else "1f1b"
    return pipeline_schedule(name, layout.pipeline, micro_batches, layout.interleave)


class _Order(NamedTuple):
    """What a looped rank works off: (chunk on the rank, micro-batch), forward and backward."""

    forward: list[tuple[int, int]]
    backward: list[tuple[int, int]]
    lead: int
    """Forwards of earlier chunks before the last chunk sees its first micro-batch."""


def _rounds(pipeline: int, micro_batches: int, chunks: int) -> _Order:
    """Micro-batches go round the chunks in rounds of p (arXiv:2104.04473 section 2.2).

    Where p does not divide m, the rounds are p or a little longer; with m < p there is one.
    """
    if chunks == 1:
        singles = [(0, micro_batch) for micro_batch in range(micro_batches)]
        return _Order(singles, singles, 0)
    rounds = max(1, micro_batches // pipeline)
    edges = [micro_batches * i // rounds for i in range(rounds + 1)]
    groups = [range(a, b) for a, b in pairwise(edges)]
    forward = [(chunk, k) for group in groups for chunk in range(chunks) for k in group]
    backward = [(chunk, k) for group in groups for chunk in reversed(range(chunks)) for k in group]
    return _Order(forward, backward, (chunks - 1) * max(len(group) for group in groups))


def _looped(name: Schedule, rank: int, pipeline: int, order: _Order) -> list[Action]:
    """GPipe, 1F1B and ZB-H1, on one or several chunks: they differ in warm-up and in W."""
    forward = [Action("F", chunk * pipeline + rank, k) for chunk, k in order.forward]
    work = [(chunk * pipeline + rank, k) for chunk, k in order.backward]
    behind = pipeline - 1 - rank
    if name == "gpipe":
        return forward + [Action("B", *item) for item in work]
    split = name in ("zbh1", "izb")
    # An interleaved 1F1B rank needs two forwards in hand for each rank behind it, since a
    # micro-batch's way down and its gradient's way back both pass it while it alternates.
    step = 2 if order.lead and not split else 1
    warm_up = min(len(forward), order.lead + step * behind)
    actions = forward[:warm_up]
    for done, item in enumerate(work):
        actions += forward[warm_up + done : warm_up + done + 1]
        actions.append(Action("I" if split else "B", *item))
        if split and done >= rank:
            actions.append(Action("W", *work[done - rank]))
    if split:
        actions += [Action("W", *item) for item in work[max(0, len(work) - rank) :]]
    return actions


class _Folded:
    """Appends actions of a rank's two chunks, numbering each chunk's micro-batches in turn."""

    def __init__(self, rank: int, pipeline: int) -> None:
        self.chunks = (rank, 2 * pipeline - 1 - rank)
        self.actions: list[Action] = []
        self.pending: list[Action] = []
        """Each W whose I is done, oldest first."""
        self.forwards = [0, 0]
        self.backwards = [0, 0]

    def do(self, *words: str) -> None:
        """`F0`: next forward of the first chunk; `I1`, `B1`: next backward of the second.

        `W0`: oldest weight gradient of the first chunk that is due, if one is; `W`: of either.
        """
        for word in words:
            if word[0] == "W":
                self._weight(*(self.chunks[int(side)] for side in word[1:]))
                continue
            side = int(word[1])
            counts = self.forwards if word[0] == "F" else self.backwards
            kind: Kind = "F" if word[0] == "F" else "B" if word[0] == "B" else "I"
            self.actions.append(Action(kind, self.chunks[side], counts[side]))
            if kind == "I":
                self.pending.append(Action("W", self.chunks[side], counts[side]))
            counts[side] += 1

    def _weight(self, *chunks: int) -> None:
        due = (action for action in self.pending if not chunks or action.chunk in chunks)
        action = next(due, None)
        if action is not None:
            self.pending.remove(action)
            self.actions.append(action)

    def first(self, micro_batches: int) -> list[Action]:
        """The list without the micro-batches that were only there to fill the pipeline."""
        return [action for action in self.actions if action.micro_batch < micro_batches]


def _zbv(rank: int, pipeline: int, micro_batches: int) -> list[Action]:
    """ZB-V: a micro-batch's last chunk is on the rank of its first, so its backward starts soon.

    Full from 2p - 1 micro-batches on; a shorter one is that schedule with the rest left out.
    """
    total, behind = max(2 * pipeline - 1, micro_batches), pipeline - rank
    folded = _Folded(rank, pipeline)
    folded.do(*["F0"] * (2 * behind - 1))
    folded.do(*["F1", "F0"] * rank)
    folded.do(*["F1", "I1", "W1"] * behind)
    while folded.forwards[1] < total:
        if folded.forwards[0] < total:
            folded.do("F0")
        folded.do("I0", "W0", "F1", "I1", "W1")
    folded.do(*["I0", "I1"] * rank)
    folded.do(*["I0", "W0"] * behind)
    folded.do(*["W1"] * rank, *["W0"] * rank)
    return folded.first(micro_batches)


def _dualpipev(rank: int, pipeline: int, micro_batches: int) -> list[Action]:
    """DualPipeV: in the middle a forward of one chunk stands beside a backward of the other.

    That pair is what an expert-parallel program overlaps. Full from 2p micro-batches on; a shorter
    one is that schedule with the rest left out.
    """
    total, behind = max(2 * pipeline, micro_batches), pipeline - 1 - rank
    folded = _Folded(rank, pipeline)
    folded.do(*["F0"] * (2 * behind))
    folded.do(*["F0", "F1"] * (rank + 1))
    folded.do(*["I1", "W", "F1"] * behind)
    folded.do(*["F0", "B1", "F1", "B0"] * (total - 2 * pipeline + rank + 1))
    folded.do(*["B1", "F1", "B0"] * behind)
    # The second half of the last backwards is split, so that W can fill what follows.
    tail = [f"{'B' if n <= rank else 'I'}{1 - n % 2}" for n in range(2 * (rank + 1))]
    folded.do(*tail, *["W", "I0"] * behind, *["W"] * (rank + 1))
    return folded.first(micro_batches)
