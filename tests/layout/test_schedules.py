"""The lists of actions: complete, home, within memory, and no worse than PyTorch's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Schedule
from ridgeline.layout.schedules import (
    Action,
    PipelineSchedule,
    chunks_per_rank,
    pipeline_schedule,
)
from ridgeline.plan.timeline import even_durations, replay

KINDS: list[tuple[Schedule, int]] = [
    ("gpipe", 1),
    *(("1f1b", v) for v in (1, 2, 3, 4)),
    ("zbh1", 1),
    *(("izb", v) for v in (1, 2, 3, 4)),
    ("zbv", 2),
    ("dualpipev", 2),
]
kinds = st.sampled_from(KINDS)
ranks = st.integers(1, 8)
micro_batches = st.integers(1, 32)


@given(kinds, ranks, micro_batches)
def test_each_micro_batch_of_each_chunk_is_done_once(
    kind: tuple[Schedule, int], pipeline: int, count: int
) -> None:
    name, interleave = kind
    schedule = pipeline_schedule(name, pipeline, count, interleave)
    schedule.check()
    assert schedule.ranks == pipeline
    assert schedule.chunks == pipeline * chunks_per_rank(name, interleave)
    done = sorted(action for actions in schedule.actions for action in actions)
    assert len(done) == len(set(done))
    forwards = [action for action in done if action.kind == "F"]
    assert len(forwards) == schedule.chunks * count


@pytest.mark.parametrize(("name", "interleave"), KINDS)
def test_no_list_waits_for_another_forever(name: Schedule, interleave: int) -> None:
    for pipeline in range(1, 9):
        for count in range(1, 33):
            schedule = pipeline_schedule(name, pipeline, count, interleave)
            timeline = replay(schedule, even_durations(schedule.chunks, 1, 1, 1))
            assert timeline.step_s >= 3 * count * chunks_per_rank(name, interleave)


@given(ranks, micro_batches)
def test_in_flight_of_1f1b_and_gpipe(pipeline: int, count: int) -> None:
    one = pipeline_schedule("1f1b", pipeline, count)
    assert one.peak_in_flight() == tuple(min(count, pipeline - i) for i in range(pipeline))
    assert pipeline_schedule("gpipe", pipeline, count).peak_in_flight() == (count,) * pipeline


@given(ranks, st.integers(1, 4), st.integers(1, 3))
def test_in_flight_of_interleaved_1f1b(pipeline: int, interleave: int, rounds: int) -> None:
    # arXiv:2205.05198 section 4.2.3: the first rank holds 1 + (p-1)/(pv) of the layers' worth.
    count = max(2, rounds) * pipeline
    peaks = pipeline_schedule("1f1b", pipeline, count, interleave).peak_in_flight()
    if interleave > 1:
        assert peaks[0] == pipeline * interleave + pipeline - 1


@given(ranks, st.integers(1, 4), micro_batches)
def test_zero_bubble_schedules_hold_no_more_than_the_first_rank_of_1f1b(
    pipeline: int, interleave: int, count: int
) -> None:
    # arXiv:2401.10241: ZB-H1 and ZB-V keep the peak of 1F1B, p micro-batches of a whole rank.
    assert max(pipeline_schedule("zbh1", pipeline, count).peak_in_flight()) <= pipeline
    assert max(pipeline_schedule("zbv", pipeline, count).peak_in_flight()) <= 2 * pipeline
    assert max(pipeline_schedule("dualpipev", pipeline, count).peak_in_flight()) <= 2 * pipeline + 1
    whole = pipeline_schedule("izb", pipeline, pipeline * (count // 8 + 1), interleave)
    assert max(whole.peak_in_flight()) <= pipeline * interleave


def test_1f1b_written_out() -> None:
    schedule = pipeline_schedule("1f1b", 2, 3)
    assert [" ".join(map(str, actions)) for actions in schedule.actions] == [
        "0F0 0F1 0B0 0F2 0B1 0B2",
        "1F0 1B0 1F1 1B1 1F2 1B2",
    ]
    folded = pipeline_schedule("zbv", 2, 4)
    assert folded.rank_of_chunk == (0, 1, 1, 0)
    assert " ".join(map(str, folded.actions[1])).startswith("1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("1f1b", 0, 4, 1), "counts start at 1"),
        (("1f1b", 4, 0, 1), "counts start at 1"),
        (("1f1b", 4, 4, -2), "counts start at 1"),
        (("zbv", 4, 4, 3), "2 chunks per rank"),
        (("gpipe", 4, 4, 2), "1f1b v2"),
        (("zbh1", 4, 4, 2), "izb v2"),
    ],
)
def test_impossible_schedules_are_refused(arguments: Any, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        pipeline_schedule(*arguments)


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        (((Action("F", 0, 0),),), "it needs F and B"),
        (((Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 0)),), "stands 2 times"),
        (((Action("F", 0, 0), Action("B", 1, 0)),), "on the rank of its chunk"),
        (((Action("F", 0, 7), Action("B", 0, 0)),), "micro-batches 0 to 0"),
        (((Action("F", 0, -1), Action("B", 0, 0)),), "micro-batches 0 to 0"),
        (((Action("F", -1, 0), Action("B", 0, 0)),), "on the rank of its chunk"),
        (((Action("F", 0, 0), Action("I", 0, 0)),), "it has FI"),
    ],
)
def test_a_list_that_is_not_a_schedule_is_refused(actions: Any, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        PipelineSchedule("mine", 1, (0,), actions).check()


def _of_torch(name: str, pipeline: int, count: int, chunks: int) -> PipelineSchedule:
    """PyTorch's own list of the same schedule, its overlapped pairs one after the other."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    ranks = tuple(range(pipeline))
    lists = []
    for rank in ranks:
        self = SimpleNamespace(
            pp_group_size=pipeline,
            n_local_stages=chunks,
            num_stages=pipeline * chunks,
            rank=rank,
            _n_microbatches=count,
            microbatches_per_round=count // max(1, count // pipeline),
        )
        calculate = getattr(schedules, name)._calculate_single_rank_operations
        flat = [
            part
            for action in calculate(self, rank)
            if action
            for part in action.sub_actions or [action]
        ]
        actions = [
            Action(p.computation_type.value, p.stage_index, p.microbatch_index) for p in flat
        ]
        assert [str(action) for action in actions] == [repr(part) for part in flat]  # one notation
        lists.append(tuple(actions))
    folded = name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
    home = (*ranks, *reversed(ranks)) if folded else ranks * chunks
    return PipelineSchedule(name, count, home, tuple(lists))


@pytest.mark.parametrize(
    ("theirs", "ours", "chunks"),
    [
        ("ScheduleInterleaved1F1B", "1f1b", 2),
        ("ScheduleInterleaved1F1B", "1f1b", 4),
        ("ScheduleInterleavedZeroBubble", "izb", 1),
        ("ScheduleInterleavedZeroBubble", "izb", 2),
        ("ScheduleInterleavedZeroBubble", "izb", 3),
        ("ScheduleZBVZeroBubble", "zbv", 2),
        ("ScheduleDualPipeV", "dualpipev", 2),
    ],
)
def test_ours_does_the_work_of_torchs_schedule_and_is_never_slower(
    theirs: str, ours: Schedule, chunks: int
) -> None:
    for pipeline, count in ((2, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 32)):
        reference = _of_torch(theirs, pipeline, count, chunks)
        mine = pipeline_schedule(ours, pipeline, count, chunks)
        assert mine.rank_of_chunk == reference.rank_of_chunk
        for my_actions, their_actions in zip(mine.actions, reference.actions, strict=True):
            assert sorted(my_actions) == sorted(their_actions)
        for times in ((1.0, 1.0, 1.0), (1.0, 1.3, 0.8), (0.7, 1.0, 1.2)):
            durations = even_durations(mine.chunks, *times, send_s=0.05)
            my_step, their_step = (replay(s, durations).step_s for s in (mine, reference))
            assert my_step <= their_step * (1 + 1e-12)
        assert max(mine.peak_in_flight()) <= max(reference.peak_in_flight())
