"""Sends and receives of all schedules: matched in order, and never waiting for each other."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

import pytest

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Schedule
from ridgeline.layout.schedules import Action, PipelineSchedule, pipeline_schedule
from ridgeline.layout.transfers import Step, Transfer, with_transfers

KINDS: list[tuple[Schedule, int]] = [
    ("gpipe", 1),
    *(("1f1b", v) for v in (1, 2, 3)),
    ("zbh1", 1),
    *(("izb", v) for v in (1, 2, 3)),
    ("zbv", 1),
    ("dualpipev", 1),
]
SIZES = [(pipeline, count) for pipeline in range(1, 6) for count in range(1, 9)]
every_kind = pytest.mark.parametrize(("name", "interleave"), KINDS)
both_ways = pytest.mark.parametrize("forward_only", [False, True], ids=["training", "evaluation"])


def transfers(steps: tuple[Step, ...], kind: str, peer: int) -> list[tuple[str, int, int]]:
    found = (step for step in steps if isinstance(step, Transfer))
    return [step[1:4] for step in found if (step.kind, step.peer) == (kind, peer)]


def replay(schedule: PipelineSchedule, program: tuple[tuple[Step, ...], ...]) -> int:
    """Run the program: a send or receive waits until the other rank stands at its counterpart, and
    an action needs what it computes with on its own rank. How many steps were done."""
    chunks, rank_of = schedule.chunks, schedule.rank_of_chunk
    todo = [deque(steps) for steps in program]
    here: set[tuple[int, str, int, int]] = set()  # on which rank, what, for which chunk and m-b
    done: set[Action] = set()
    count, moved = 0, True
    while moved:
        moved = False
        for rank, steps in enumerate(todo):
            while steps and isinstance(action := steps[0], Action):
                steps.popleft()
                kind, chunk, k = action
                assert rank_of[chunk] == rank
                if kind == "F":
                    assert chunk == 0 or (rank, "F", chunk, k) in here
                elif kind == "W":
                    assert Action("I", chunk, k) in done
                else:
                    assert Action("F", chunk, k) in done
                    assert chunk == chunks - 1 or (rank, "B", chunk, k) in here
                done.add(action)
                if kind == "F" and chunk + 1 < chunks:
                    here.add((rank, "F", chunk + 1, k))
                if kind in "BI" and chunk > 0:
                    here.add((rank, "B", chunk - 1, k))
                count, moved = count + 1, True
            if not steps:
                continue
            step = steps[0]
            assert isinstance(step, Transfer)
            other = todo[step.peer]
            counterpart = step._replace(
                kind="receive" if step.kind == "send" else "send", peer=rank
            )
            if other and other[0] == counterpart:
                sender, receiver = (rank, step.peer)[:: 1 if step.kind == "send" else -1]
                assert (sender, *step[1:4]) in here
                here.add((receiver, *step[1:4]))
                steps.popleft()
                other.popleft()
                count, moved = count + 2, True
    return count


@both_ways
@every_kind
def test_sends_and_receives_of_two_ranks_stand_in_the_same_order(
    name: Schedule, interleave: int, forward_only: bool
) -> None:
    """NCCL matches messages between two ranks by their order alone."""
    for pipeline, micro_batches in SIZES:
        schedule = pipeline_schedule(name, pipeline, micro_batches, interleave)
        program = with_transfers(schedule, forward_only=forward_only)
        crossing: Counter[str] = Counter()
        for a in range(pipeline):
            assert not transfers(program[a], "send", a)
            for b in range(pipeline):
                sent = transfers(program[a], "send", b)
                assert sent == transfers(program[b], "receive", a)
                crossing.update(what for what, *_ in sent)
        homes = schedule.rank_of_chunk
        borders = sum(a != b for a, b in pairwise(homes))
        expected = Counter({"F": borders * micro_batches})
        if not forward_only:
            expected["B"] = borders * micro_batches
        assert crossing == +expected


@both_ways
@every_kind
def test_ranks_that_wait_at_each_message_never_wait_for_ever(
    name: Schedule, interleave: int, forward_only: bool
) -> None:
    """Stricter than the trainer, whose sends do not wait: even then all is done."""
    for pipeline, micro_batches in SIZES:
        schedule = pipeline_schedule(name, pipeline, micro_batches, interleave)
        program = with_transfers(schedule, forward_only=forward_only)
        done = replay(schedule, program)
        assert done == sum(map(len, program)), f"pp{pipeline} m{micro_batches}"


@every_kind
def test_actions_keep_their_order_and_an_evaluation_does_the_forwards(
    name: Schedule, interleave: int
) -> None:
    schedule = pipeline_schedule(name, 4, 6, interleave)
    for forward_only in (False, True):
        program = with_transfers(schedule, forward_only=forward_only)
        for steps, actions in zip(program, schedule.actions, strict=True):
            kept = tuple(step for step in steps if isinstance(step, Action))
            assert kept == tuple(a for a in actions if not forward_only or a.kind == "F")


def test_a_send_follows_what_it_sends() -> None:
    schedule = pipeline_schedule("1f1b", 2, 1)
    assert with_transfers(schedule) == (
        (
            Action("F", 0, 0),
            Transfer("send", "F", 1, 0, 1),
            Transfer("receive", "B", 0, 0, 1),
            Action("B", 0, 0),
        ),
        (
            Transfer("receive", "F", 1, 0, 0),
            Action("F", 1, 0),
            Action("B", 1, 0),
            Transfer("send", "B", 0, 0, 0),
        ),
    )


def test_lists_that_wait_for_each_other_are_refused() -> None:
    first = (Action("B", 0, 0), Action("F", 0, 0))
    last = (Action("F", 1, 0), Action("B", 1, 0))
    with pytest.raises(LayoutError) as caught:
        with_transfers(PipelineSchedule("upside down", 1, (0, 1), (first, last)))
    assert caught.value.asked == "schedule upside down"
    assert caught.value.rule == "its actions wait for each other: 0B0, 1F0"
