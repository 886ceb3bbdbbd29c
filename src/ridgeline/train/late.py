"""Who is late: told from the heartbeats of all ranks, and from what each of them waits for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ridgeline.errors import HangError

MOST_NAMED = 4
"""So many late ranks are described; of more, only how many there are is said."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself once a second."""

    rank: int
    host: str
    process: int
    step: int
    """Steps done."""
    phase: str
    line: str
    """Where the thread that trains is, in the innermost code that is not a library's."""
    inside: str
    """Where it is within a library; empty where it is in none."""
    calls: int
    """Collective calls, sends and receives that it has begun."""
    monotonic_s: float
    """By its machine's clock since boot, which other processes of that machine share."""

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str | bytes) -> Heartbeat:
        """From `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Pending:
    """A collective call that a rank has begun and that is not done."""

    group: str
    """Empty for a message that no group counts."""
    number: int
    """The how manieth of its group."""
    what: str
    ranks: tuple[int, ...]
    """All of the group."""


@dataclass(frozen=True)
class Answer:
    """What a living rank tells when somebody is late."""

    pending: tuple[Pending, ...]
    reached: Mapping[str, int]
    """Number of the last call that it has begun, by group; the oldest may be forgotten."""

    def to_json(self) -> str:
        """One object."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str | bytes) -> Answer:
        """From `to_json`."""
        told: dict[str, Any] = json.loads(text)
        pending = (Pending(**{**each, "ranks": tuple(each["ranks"])}) for each in told["pending"])
        return cls(tuple(pending), told["reached"])


def late_ranks(told: Mapping[int, Answer], beats: Mapping[int, Heartbeat], world: int) -> list[int]:
    """Ranks that keep the others waiting.

    Those that told nothing, which do not run any more. Else those that somebody waits for and that
    wait for nobody: a rank waits for all that have not begun the call it is in. Where all of these
    wait for each other, all of them; where nobody waits, those with the fewest steps and calls.
    """
    if silent := [rank for rank in range(world) if rank not in told]:
        return silent
    awaited: dict[int, set[int]] = {rank: set() for rank in told}
    for rank, answer in told.items():
        for call in answer.pending:
            awaited[rank] |= {
                other
                for other in call.ranks
                if other != rank and told[other].reached.get(call.group, -1) < call.number
            }
    anyone = set().union(*awaited.values())
    if anyone:
        return sorted(rank for rank in anyone if not awaited[rank]) or sorted(anyone)
    done = {rank: (beats[rank].step, beats[rank].calls) for rank in told}
    return sorted(rank for rank in told if done[rank] == min(done.values()))


def verdict(
    told: Mapping[int, Answer],
    beats: Mapping[int, Heartbeat],
    ages_s: Mapping[int, float],
    world: int,
    limit_s: float,
    stacks: Path,
) -> HangError:
    """Names the late ranks, and what the others wait in; `ages_s`: of the heartbeats."""
    late = late_ranks(told, beats, world)
    names, lines = [], []
    for rank in late[:MOST_NAMED]:
        if rank not in beats:
            names.append(f"rank {rank}")
            lines.append(f"rank {rank} has never been heard of")
            continue
        beat = beats[rank]
        names.append(f"rank {rank} on {beat.host} (process {beat.process})")
        within = f" (within {beat.inside})" if beat.inside else ""
        silent = "" if rank in told else ", and it answers no more"
        lines.append(
            f"rank {rank} after step {beat.step:,} in {beat.phase} at {beat.line}{within}, "
            f"call {beat.calls:,}: its last heartbeat, {ages_s[rank]:.1f} s old{silent}"
        )
    if len(late) > MOST_NAMED:
        names.append(f"{len(late) - MOST_NAMED:,} more")
    calls = _waited_in(told, late)
    return HangError(
        f"longer than {limit_s:g} s (faults.step_limit_s) in one step or phase; "
        f"late: {', '.join(names)}",
        "; ".join([*lines, *calls]),
        "start it again: it goes on from its newest checkpoint; what each rank that answered was "
        f"doing stands in {stacks}",
    )


def _waited_in(told: Mapping[int, Answer], late: Sequence[int]) -> list[str]:
    """The calls that ranks which are not late wait in, and which ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, answer in sorted(told.items()):
        for call in answer.pending if rank not in late else ():
            ranks.setdefault(call.what, []).append(rank)
    return [
        f"{'rank' if len(who) == 1 else 'ranks'} {' '.join(map(str, who[:MOST_NAMED]))}"
        f"{' …' if len(who) > MOST_NAMED else ''} in {what}"
        for what, who in list(ranks.items())[:MOST_NAMED]
    ]
