"""Whom the others wait for is found through what each waits in, not by who complains first."""

from __future__ import annotations

from pathlib import Path

from ridgeline.train.late import Answer, Heartbeat, Pending, late_ranks, verdict


def beat(rank: int, step: int = 3, calls: int = 20) -> Heartbeat:
    return Heartbeat(rank, f"n{rank}", 100 + rank, step, "forward", "my.py:7 loss", "", calls, 1.0)


def told(*pending: Pending, **reached: int) -> Answer:
    return Answer(pending, reached)


def call(group: str, number: int, *ranks: int) -> Pending:
    return Pending(group, number, f"gloo:all_reduce over {group}", ranks)


ALIKE = {rank: beat(rank) for rank in range(4)}


def test_a_rank_that_says_nothing_is_late_whatever_the_others_wait_for() -> None:
    waiting = told(call("data", 9, 0, 1), data=9)
    assert late_ranks({0: waiting, 1: waiting, 3: waiting}, ALIKE, 4) == [2]


def test_along_a_chain_of_waits_the_one_at_its_end_is_late() -> None:
    # 0 waits for 1 in their tensor group, 1 for 3 in data, 2 for 3 in theirs; 3 is still computing.
    answers = {
        0: told(call("tensor a", 5, 0, 1), **{"tensor a": 5}),
        1: told(call("data", 9, 1, 3), **{"tensor a": 4, "data": 9}),
        2: told(call("tensor b", 5, 2, 3), **{"tensor b": 5}),
        3: told(**{"tensor b": 4, "data": 8}),
    }
    assert late_ranks(answers, ALIKE, 4) == [3]


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    answers = {
        0: told(call("a", 1, 0, 1), a=1, b=0),
        1: told(call("b", 1, 0, 1), a=0, b=1),
    }
    assert late_ranks(answers, ALIKE, 2) == [0, 1]


def test_a_call_that_all_have_begun_keeps_nobody_waiting() -> None:
    both = told(call("data", 9, 0, 1), data=9)
    ahead, behind = beat(0, calls=20), beat(1, calls=18)
    assert late_ranks({0: both, 1: both}, {0: ahead, 1: behind}, 2) == [1]


def test_where_nobody_waits_those_with_the_fewest_steps_are_late() -> None:
    beats = {0: beat(0, step=4), 1: beat(1, step=3), 2: beat(2, step=3)}
    assert late_ranks({rank: told() for rank in range(3)}, beats, 3) == [1, 2]


def test_the_verdict_says_who_where_since_when_and_what_the_others_wait_in() -> None:
    answers = {rank: told(call("data", 9, 0, 1, 2, 3), data=9) for rank in (0, 1, 2)}
    error = verdict(answers, ALIKE, {3: 12.34}, 4, 60.0, Path("runs/x/stacks"))
    assert error.asked == (
        "longer than 60 s (faults.step_limit_s) in one step or phase; "
        "late: rank 3 on n3 (process 103)"
    )
    assert error.rule == (
        "rank 3 after step 3 in forward at my.py:7 loss, call 20: its last heartbeat, 12.3 s old, "
        "and it answers no more; ranks 0 1 2 in gloo:all_reduce over data"
    )
    assert error.exit_status == 75


def test_a_rank_that_never_came_is_named_and_many_are_counted() -> None:
    answers = {0: told()}
    error = verdict(answers, {0: beat(0)}, {}, 9, 60.0, Path("stacks"))
    assert "late: rank 1, rank 2, rank 3, rank 4, 4 more" in error.asked
    assert error.rule.startswith("rank 1 has never been heard of")


def test_what_ranks_say_survives_the_store() -> None:
    answer = told(call("data", 9, 0, 1), data=9)
    assert Answer.read(answer.to_json()) == answer
    assert Heartbeat.read(beat(2).to_json()) == beat(2)
