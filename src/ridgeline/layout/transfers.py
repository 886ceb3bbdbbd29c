"""A pipeline schedule with its sends and receives, in an order in which nobody waits for ever.

All ranks' lists are replayed together, one action at a time; when an action is done, its send goes
to the end of its own rank's list and the receive to the end of the other's, at the same moment.
So the transfers between two ranks stand in the same order in both lists, and none stands before
one that must come first: no deadlock, on networks that match messages by order (NCCL) too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ridgeline.errors import LayoutError
from ridgeline.layout.schedules import Action, PipelineSchedule


class Transfer(NamedTuple):
    """What one chunk hands to its neighbour: hidden states after F, their gradient after B or I."""

    kind: Literal["send", "receive"]
    what: Literal["F", "B"]
    chunk: int
    """The chunk that computes with it: the one after for F, the one before for B."""
    micro_batch: int
    peer: int
    """The pipeline rank at the other end."""


Step = Action | Transfer
MOST_LEAVING = 8
"""Sends that a rank has under way."""


def with_transfers(
    schedule: PipelineSchedule, *, forward_only: bool = False
) -> tuple[tuple[Step, ...], ...]:
    """Each pipeline rank's actions with what it sends and receives; F alone for an evaluation.

    Chunks that are neighbours on one rank hand over without a transfer. Raises LayoutError for
    lists in which some action waits for ever.
    """
    todo = [
        [action for action in actions if not forward_only or action.kind == "F"]
        for actions in schedule.actions
    ]
    steps: list[list[Step]] = [[] for _ in todo]
    done: set[Action] = set()
    position = [0] * len(todo)
    while any(at < len(actions) for at, actions in zip(position, todo, strict=True)):
        ready = [
            (rank, actions[at])
            for rank, (at, actions) in enumerate(zip(position, todo, strict=True))
            if at < len(actions) and _can_start(actions[at], done, schedule.chunks)
        ]
        if not ready:
            stuck = [str(a[at]) for at, a in zip(position, todo, strict=True) if at < len(a)]
            raise LayoutError(
                f"schedule {schedule.name}", f"its actions wait for each other: {', '.join(stuck)}"
            )
        for rank, action in ready:
            steps[rank].append(action)
            position[rank] += 1
        for rank, action in ready:
            done.add(action)
            _hand_over(schedule, rank, action, steps)
    return tuple(tuple(each) for each in steps)


def _can_start(action: Action, done: set[Action], chunks: int) -> bool:
    kind, chunk, micro_batch = action
    if kind == "F":
        return chunk == 0 or Action("F", chunk - 1, micro_batch) in done
    if kind == "W":
        return Action("I", chunk, micro_batch) in done
    if chunk == chunks - 1:
        return Action("F", chunk, micro_batch) in done
    behind = (Action("B", chunk + 1, micro_batch), Action("I", chunk + 1, micro_batch))
    return any(each in done for each in behind)


def _hand_over(
    schedule: PipelineSchedule, rank: int, action: Action, steps: Sequence[list[Step]]
) -> None:
    kind, chunk, micro_batch = action
    to = chunk + 1 if kind == "F" else chunk - 1
    if kind == "W" or not 0 <= to < schedule.chunks:
        return
    peer = schedule.rank_of_chunk[to]
    if peer != rank:
        what: Literal["F", "B"] = "F" if kind == "F" else "B"
        steps[rank].append(Transfer("send", what, to, micro_batch, peer))
        steps[peer].append(Transfer("receive", what, to, micro_batch, rank))
