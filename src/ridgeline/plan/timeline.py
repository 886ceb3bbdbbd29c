"""When each action of a pipeline schedule runs: a replay with given durations.

What an action waits for:

    F  the forward of the chunk before it (of the first chunk: nothing), sent if on another rank
    B, I  the forward of its own chunk, and B or I of the chunk after it (of the last: nothing more)
    W  the I of its own chunk and micro-batch, which must stand before it in its rank's list

A rank works through its list in order, one action at a time; sending is beside the work and delays
only who waits for it. So the replay is exact for uneven stages too, where the closed forms are not.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import cached_property

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Schedule
from ridgeline.layout.schedules import Action, PipelineSchedule, chunks_per_rank


@dataclass(frozen=True)
class Durations:
    """Seconds of each chunk's work on one micro-batch, along the model."""

    forward_s: tuple[float, ...]
    backward_input_s: tuple[float, ...]
    backward_weight_s: tuple[float, ...]
    send_s: float = 0.0
    """Seconds from the end of an action to the arrival of its result on another rank."""

    def of(self, action: Action) -> float:
        """Seconds of one action; B takes as long as I and W together."""
        if action.kind == "F":
            return self.forward_s[action.chunk]
        weight_s = self.backward_weight_s[action.chunk]
        if action.kind == "W":
            return weight_s
        input_s = self.backward_input_s[action.chunk]
        return input_s if action.kind == "I" else input_s + weight_s


def even_durations(
    chunks: int,
    forward_s: float,
    backward_input_s: float,
    backward_weight_s: float,
    send_s: float = 0.0,
) -> Durations:
    """The same seconds for each of `chunks` chunks."""
    return Durations(
        (forward_s,) * chunks, (backward_input_s,) * chunks, (backward_weight_s,) * chunks, send_s
    )


@dataclass(frozen=True)
class Timeline:
    """Every action of a schedule with its start and end, in seconds from the step's beginning."""

    schedule: PipelineSchedule
    spans: tuple[tuple[tuple[Action, float, float], ...], ...]
    """For each rank: (action, start_s, end_s), in the order of its list."""

    @cached_property
    def step_s(self) -> float:
        """Seconds from the first start to the last end of any rank."""
        return max(end for rank in self.spans for _, _, end in rank)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds each rank works."""
        return tuple(math.fsum(end - start for _, start, end in rank) for rank in self.spans)

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Seconds each rank idles while any rank works."""
        return tuple(self.step_s - busy_s for busy_s in self.busy_s)

    @property
    def inner_bubble_s(self) -> tuple[float, ...]:
        """Seconds each rank idles between its own first start and last end.

        This is what the zero-bubble papers call the bubble: they let ranks step their optimizers
        one after the other, so that the slanted ends of one step fit into the next. A program that
        clips the gradient by its global norm, as ours does, waits for all ranks: `bubble_s`.
        """
        return tuple(
            rank[-1][2] - rank[0][1] - busy_s
            for rank, busy_s in zip(self.spans, self.busy_s, strict=True)
        )

    @property
    def bubble_of_ideal(self) -> float:
        """Idle time of the busiest rank as a fraction of its work: (p-1)/m for 1F1B."""
        return self.step_s / max(self.busy_s) - 1


def replay(schedule: PipelineSchedule, durations: Durations) -> Timeline:
    """Run the lists of `schedule` and note when each action starts and ends.

    Raises LayoutError for durations that do not fit the schedule, for a list that `check` refuses,
    and for lists that wait for each other, naming what waits for what.
    """
    _check_durations(schedule, durations)
    schedule.check()
    forward_end: dict[tuple[int, int], float] = {}
    input_end: dict[tuple[int, int], float] = {}
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]
    left = [deque(actions) for actions in schedule.actions]
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        while left[rank]:
            action = left[rank][0]
            arrival = _arrival(action, schedule, durations.send_s, forward_end, input_end)
            if arrival is None:
                break
            left[rank].popleft()
            start = max(arrival, spans[rank][-1][2] if spans[rank] else 0.0)
            end = start + durations.of(action)
            spans[rank].append((action, start, end))
            if action.kind == "W":
                continue
            forward = action.kind == "F"
            (forward_end if forward else input_end)[action.chunk, action.micro_batch] = end
            waiting = action.chunk + (1 if forward else -1)
            if 0 <= waiting < schedule.chunks:
                ready.append(schedule.rank_of_chunk[waiting])
    _check_finished(schedule, left)
    return Timeline(schedule, tuple(tuple(rank) for rank in spans))


def _arrival(
    action: Action,
    schedule: PipelineSchedule,
    send_s: float,
    forward_end: dict[tuple[int, int], float],
    input_end: dict[tuple[int, int], float],
) -> float | None:
    """When all that `action` waits for has arrived, or None where some of it has not run yet."""
    kind, chunk, micro_batch = action
    if kind == "W":
        return input_end.get((chunk, micro_batch))
    if kind == "F":
        own, neighbour, before = 0.0, forward_end, chunk - 1
    else:
        end = forward_end.get((chunk, micro_batch))
        if end is None:
            return None
        own, neighbour, before = end, input_end, chunk + 1
    if not 0 <= before < schedule.chunks:
        return own
    sent = neighbour.get((before, micro_batch))
    if sent is None:
        return None
    same_rank = schedule.rank_of_chunk[before] == schedule.rank_of_chunk[chunk]
    return max(own, sent if same_rank else sent + send_s)


def _check_durations(schedule: PipelineSchedule, durations: Durations) -> None:
    parts = (durations.forward_s, durations.backward_input_s, durations.backward_weight_s)
    if any(len(part) != schedule.chunks for part in parts):
        raise LayoutError(
            f"durations of {' / '.join(str(len(part)) for part in parts)} chunks",
            f"schedule {schedule.name} has {schedule.chunks}: one forward, backward for the input "
            "and backward for the weights each",
            "even_durations(schedule.chunks, …)",
        )
    for seconds in (*parts[0], *parts[1], *parts[2], durations.send_s):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise LayoutError(
                f"a duration of {seconds} s in a pipeline",
                "seconds are finite and not negative",
                f"{-seconds:g}" if -math.inf < seconds < 0 else "0 or more",
            )
    if sum(parts[0]) <= 0:
        raise LayoutError("forward passes of 0 s in a pipeline", "work takes time", "seconds > 0")


def _check_finished(schedule: PipelineSchedule, left: list[deque[Action]]) -> None:
    stuck = [f"rank {rank} at {actions[0]}" for rank, actions in enumerate(left) if actions]
    if stuck:
        raise LayoutError(
            f"the lists of schedule {schedule.name} wait for each other",
            "each of these waits for work that stands behind another of them: " + ", ".join(stuck),
        )


def closed_form_bubble_s(
    name: Schedule,
    pipeline: int,
    micro_batches: int,
    interleave: int,
    forward_s: float,
    backward_input_s: float,
    backward_weight_s: float,
) -> float | None:
    """Idle seconds of a rank when all chunks take the same time and sending takes none.

    The seconds are those of one chunk. Returns None where no closed form is known to hold.

    gpipe, 1f1b      (p-1)(T_F + T_I + T_W): arXiv:2104.04473 section 2.2
    1f1b, v > 1      the same (a chunk is 1/v of what a rank holds); p divides m
    zbh1             (p-1)(T_F + T_I - T_W): arXiv:2401.10241 section 3; m >= p, T_W <= T_F and T_I
    izb              the same; p divides m
    zbv              max[(p-1)T_I, 2(p-1)(T_I - T_W), T_I + (p-2)T_W]; m >= 2p, T_F <= T_I
    dualpipev        max[(p-1)(T_F + T_I - T_W), 2(p-1)T_I - T_F - (p-1)T_W]; m >= 2p, T_F and
                     T_W <= T_I

    The last two are read off the replay, not a paper: exact on all that the tests draw.
    """
    behind = pipeline - 1
    per_rank = chunks_per_rank(name, interleave)
    if behind == 0:
        return 0.0
    if name in ("zbv", "dualpipev"):
        if micro_batches < 2 * pipeline or forward_s > backward_input_s:
            return None
        split = backward_input_s - backward_weight_s
        if name == "zbv":
            slow_weights = backward_input_s + (behind - 1) * backward_weight_s
            return max(behind * backward_input_s, 2 * behind * split, slow_weights)
        if split < 0:
            return None
        return behind * split + max(behind * forward_s, behind * backward_input_s - forward_s)
    if per_rank > 1 and micro_batches % pipeline:
        return None
    if name in ("gpipe", "1f1b"):
        return behind * (forward_s + backward_input_s + backward_weight_s)
    if micro_batches >= pipeline and backward_weight_s <= min(forward_s, backward_input_s):
        return behind * (forward_s + backward_input_s - backward_weight_s)
    return None
