"""The measured ledger's arithmetic: causes add up to the step, and the unknown stays unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import schedule_of
from ridgeline.ledger import StepSeconds
from ridgeline.train.measured import (
    AXES,
    Counted,
    Counts,
    Done,
    Idle,
    Known,
    idle_of,
    ledger_of,
    on_one_clock,
    seconds_of,
)

NO_IDLE = Idle(0.0, 0.0, 0.0)
KNOWN = Known(train_s=9.0, energy_before_j=0.0, flops_per_token=1e6, peak_flops=1e12)
ROW = Counted(
    rank=0, stage=0, on_accelerator=False, steps=4, tokens=4000, all_steps=8,
    seconds={"data": 0.4, "forward": 4.0, "backward": 8.0, "optimizer": 2.0, "logging": 0.2},
    wall_s=16.0, between={"checkpoint": 4.0, "evaluation": 1.6}, timed=(3, 200),
    timed_seconds={"data": 0.1, "forward": 3.0, "backward": 5.0, "optimizer": 1.0},
    timed_wall_s=10.0,
    exposed={("forward", "tensor"): 0.6, ("backward", "data"): 1.0, ("optimizer", "world"): 0.2},
    sent={"data": 100.0}, calls={"data": 2},
)  # fmt: skip
CAUSES = [name for name in StepSeconds.model_fields if name not in ("compute_s", "total_s")]
BETWEEN = {"checkpoint_stall_s", "evaluation_s"}


def total(seconds: StepSeconds) -> float:
    values = seconds.model_dump()
    return float(sum(values[name] for name in CAUSES if name not in BETWEEN))


def test_a_phase_is_divided_by_what_the_sampled_steps_waited_for() -> None:
    seconds = seconds_of(ROW, NO_IDLE)
    assert seconds.total_s == 4.0
    assert seconds.forward_s == pytest.approx(1.0 - 0.3)
    assert seconds.tensor_s == pytest.approx(0.3)
    assert seconds.backward_s == pytest.approx(2.0 - 0.5)
    assert seconds.data_s == pytest.approx(0.5)
    assert seconds.compute_s == pytest.approx(0.7 + 1.5)
    assert seconds.optimizer_s == pytest.approx(0.5 - 0.1)
    assert seconds.data_stall_s == pytest.approx(0.1)
    assert seconds.logging_s == pytest.approx(0.05)
    assert seconds.host_s == pytest.approx(4.0 - 3.65 + 0.1)  # the rest, and the world's messages
    assert (seconds.checkpoint_stall_s, seconds.evaluation_s) == (0.5, 0.2)
    assert total(seconds) == pytest.approx(4.0)


def test_on_an_accelerator_the_phases_of_sampled_steps_are_scaled_to_the_mean_step() -> None:
    seconds = seconds_of(replace(ROW, on_accelerator=True), NO_IDLE)
    scale = (4.0 - 0.05) / 10
    assert seconds.forward_s == pytest.approx(scale * (3.0 - 0.6))
    assert seconds.data_s == pytest.approx(scale * 1.0)
    assert total(seconds) == pytest.approx(4.0)


seconds_up_to = st.floats(0, 10)
phases = st.dictionaries(
    st.sampled_from(["data", "forward", "backward", "pipeline wait", "optimizer", "logging"]),
    seconds_up_to,
)
exposed = st.dictionaries(
    st.tuples(
        st.sampled_from(["", "data", "forward", "backward", "optimizer"]),
        st.sampled_from([*AXES, "world"]),
    ),
    seconds_up_to,
)
idles = st.tuples(seconds_up_to, st.floats(0, 1), seconds_up_to).map(
    lambda each: Idle(each[0], each[0] * each[1], each[2])
)


@given(phases, exposed, idles, seconds_up_to, st.booleans())
def test_causes_are_never_negative_and_add_up_to_the_step(
    by_phase: dict[str, float],
    waited: dict[tuple[str, str], float],
    idle: Idle,
    rest: float,
    on_accelerator: bool,
) -> None:
    timed = {name: each for name, each in by_phase.items() if name != "logging"}
    row = Counted(
        rank=0, stage=0, on_accelerator=on_accelerator, steps=1, all_steps=1, timed=(3,),
        seconds=by_phase, wall_s=sum(by_phase.values()) + rest, exposed=waited,
        timed_seconds=timed, timed_wall_s=sum(timed.values()) + rest + 1e-3,
    )  # fmt: skip
    seconds = seconds_of(row, idle)  # a negative one would not be a Quantity
    assert total(seconds) == pytest.approx(row.wall_s, abs=1e-9)


def test_without_a_sampled_step_the_division_is_unknown_and_the_step_is_not() -> None:
    seconds = seconds_of(replace(ROW, timed=()), NO_IDLE)
    known = {name for name, value in seconds.model_dump().items() if value is not None}
    assert known == {"total_s", "logging_s", *BETWEEN}
    assert seconds_of(Counted(0, 0, False), NO_IDLE) == StepSeconds()


def replayed(
    p: int, m: int, forward: float, backward: float, sent: float
) -> list[tuple[list[Done], list[Done]]]:
    """1F1B on p ranks, by hand: each action begins when its rank and what it needs are ready."""
    lists = schedule_of(Layout(pipeline=p, schedule="1f1b"), m).actions
    ranks: list[tuple[list[Done], list[Done]]] = [([], []) for _ in lists]
    ends: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * p
    at = [0] * p
    while any(at[r] < len(lists[r]) for r in range(p)):
        for r in range(p):
            if at[r] == len(lists[r]):
                continue
            kind, chunk, k = lists[r][at[r]]
            source = ("F", chunk - 1, k) if kind == "F" else ("B", chunk + 1, k)
            needs = (chunk > 0) if kind == "F" else (chunk < p - 1)
            if needs and source not in ends:
                continue
            if needs:
                arrives = max(clock[r], ends[source] + sent)
                ranks[r][1].append(Done(kind, chunk, k, clock[r], arrives))
                clock[r] = arrives
            end = clock[r] + (forward if kind == "F" else backward)
            ranks[r][0].append(Done(kind, chunk, k, clock[r], end))
            clock[r] = ends[kind, chunk, k] = end
            at[r] += 1
    return ranks


def test_clocks_that_began_at_other_times_are_told_apart_by_the_barriers() -> None:
    here = [1.0, 2.0, 3.0], [Done("F", 0, 0, 3.5, 4.0)], [Done("B", 0, 0, 5.0, 6.0)]
    late = [101.0, 107.0, 103.0], [Done("F", 1, 0, 104.25, 105.0)], [Done("F", 1, 0, 103.0, 104.0)]
    assert on_one_clock([here, late]) == [
        ([Done("F", 0, 0, 0.5, 1.0)], [Done("B", 0, 0, 2.0, 3.0)]),
        ([Done("F", 1, 0, 1.25, 2.0)], [Done("F", 1, 0, 0.0, 1.0)]),
    ]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 8)])
def test_the_bubble_of_1f1b_is_that_of_the_textbook(p: int, m: int) -> None:
    """(p - 1)(f + b) on every rank (arXiv:2104.04473, section 2.2)."""
    for idle in idle_of(replayed(p, m, forward=1.0, backward=2.0, sent=0.0)):
        assert idle.for_neighbour == idle.waited
        assert idle.waited + idle.at_the_end == pytest.approx((p - 1) * 3.0)


def test_what_is_made_but_not_here_yet_is_communication() -> None:
    first, last = idle_of(replayed(2, 1, forward=1.0, backward=2.0, sent=0.25))
    assert last == pytest.approx(Idle(waited=1.25, for_neighbour=1.0, at_the_end=2.25))
    assert first == Idle(waited=3.5, for_neighbour=3.25, at_the_end=0.0)


def test_a_wait_is_divided_as_in_the_sample_and_the_end_is_taken_from_the_norm() -> None:
    row = replace(
        ROW,
        timed=(3,),
        seconds={"pipeline wait": 4.0, "optimizer": 2.0},
        exposed={("optimizer", "world"): 0.3, ("optimizer", "pipeline"): 0.1},
    )
    seconds = seconds_of(row, Idle(waited=2.0, for_neighbour=1.5, at_the_end=0.35))
    assert seconds.bubble_s == pytest.approx(1.0 * 0.75 + 0.35)
    assert seconds.pipeline_s == pytest.approx(1.0 * 0.25 + 0.05)
    assert seconds.optimizer_s == pytest.approx(0.5 - 0.4)
    assert seconds.host_s == pytest.approx(4.0 - 1.5)


def test_the_rank_that_computes_longest_gives_the_seconds_and_the_fullest_the_memory() -> None:
    slow = replace(ROW, rank=1, stage=1, seconds={**ROW.seconds, "backward": 9.0}, memory_bytes=5.0)
    rows = [replace(ROW, memory_bytes=7.0), slow]
    rows += [replace(ROW, rank=2, memory_bytes=8.0), replace(slow, rank=3, memory_bytes=None)]
    rows[3] = replace(rows[3], seconds=ROW.seconds, sent={"data": 300.0, "tensor": 1.0})
    ledger = ledger_of(rows, [NO_IDLE, NO_IDLE], KNOWN)
    assert ledger.seconds == seconds_of(slow, NO_IDLE)
    assert [stage.total_bytes for stage in ledger.memory] == [8.0, 5.0]
    assert (ledger.sent.data_bytes, ledger.sent.tensor_bytes, ledger.sent.world_bytes) == (
        300,
        1,
        0,
    )
    assert "rank 1, which computes longest of 4" in ledger.sources["seconds.total_s"]
    assert ledger.tokens_per_s == 250
    assert ledger.flops_per_device == 1e6 / 4 * 1000
    assert ledger.mfu == pytest.approx(1e6 / 4 * 250 / 1e12)
    assert ledger.train_s == 9.0


def test_counts_are_the_most_kernels_the_mean_flops_and_the_fullest_rank_of_a_stage() -> None:
    small = Counts(4, kernels=10, flops={"mlp": 2.0, "head": 4.0}, memory={"weights": 5})
    large = Counts(4, kernels=7, flops={"mlp": 6.0}, memory={"weights": 3, "activations": 3})
    rows = [replace(ROW, counts=small), replace(ROW, rank=1, counts=large)]
    found = ledger_of(rows, [NO_IDLE], KNOWN)
    assert found.kernels == 10
    assert found.flops_by_module == {"head": 2.0, "mlp": 4.0}
    assert found.hardware_flops_per_device == 6.0
    assert found.hfu == pytest.approx(6.0 / 4.0 / 1e12)
    (memory,) = found.memory
    assert (memory.weights_bytes, memory.activations_bytes, memory.temporary_bytes) == (3, 3, 0)
    assert memory.total_bytes is None
    assert found.sources["kernels"] == "operations of step 4; the rank with most"


@pytest.mark.parametrize(
    ("energies", "before", "step", "run"),
    [
        ([8.0, 16.0], 100.0, 3.0, 124.0),
        ([8.0, None], 100.0, None, None),
        ([8.0, 0.0], None, 1.0, None),
    ],
)
def test_energy_is_that_of_all_ranks_or_unknown(
    energies: list[float | None], before: float | None, step: float | None, run: float | None
) -> None:
    rows = [
        replace(ROW, rank=k, energy_j=each, energy_source="RAPL") for k, each in enumerate(energies)
    ]
    ledger = ledger_of(rows, [NO_IDLE], replace(KNOWN, energy_before_j=before))
    assert (ledger.step_energy_j, ledger.energy_j) == (step, run)
    assert ("energy_j" in ledger.sources) == (run is not None)


def test_what_is_not_known_has_no_source() -> None:
    ledger = ledger_of([replace(ROW, timed=(), steps=0)], [NO_IDLE], KNOWN)
    assert set(ledger.sources) == {"train_s", "seconds.checkpoint_stall_s", "seconds.evaluation_s"}
    assert ledger.memory == ()
    assert ledger.mfu is None
