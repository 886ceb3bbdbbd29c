"""A rank that trains two steps, for real, under the tracker of a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ridgeline.model.decoder import Decoder
from ridgeline.run import Run
from ridgeline.train.build import make_job
from ridgeline.train.loop import Job, train_loop
from ridgeline.train.manifest import Progress
from ridgeline.train.messages import Message, groups_of
from ridgeline.train.optimizer import adamw
from ridgeline.train.owners import Owners
from ridgeline.train.tracker import Mark, Tracker
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group


@dataclass(frozen=True)
class Seen:
    """What the second of two steps did on one rank."""

    peak_bytes: int
    parts: Mapping[str, int]
    flops: float
    messages: list[Message]
    kernels: int


def seen_in_second_step(job: Job, tracker: Tracker, owners: Owners) -> Seen:
    """Train two steps and tell of the second."""
    marks: list[Mark] = []

    def observe(_: Any) -> None:
        owners.moments(job.optimizer)
        marks.append(tracker.mark())

    job.pipeline.around = owners.around
    train_loop(job, Progress(), observe, lambda *_: (False, None))
    owners.claim()
    first, second = marks
    peak, parts = tracker.peak(first.events)
    return Seen(
        peak,
        parts,
        sum(work.flops for work in tracker.work[first.work : second.work]),
        tracker.messages[first.messages : second.messages],
        second.kernels - first.kernels,
    )


def real_rank(run: Run) -> Seen:
    """What this process does in the second step of `run`, of two steps."""
    with process_group() as (device, control):
        job = make_job(run, Decoder, token_loss, adamw, device, control, lambda: False)
        tracker = Tracker(groups_of(job.mesh))
        with tracker.watching(job.pipeline.chunks.values()):
            return seen_in_second_step(job, tracker, Owners(tracker, job.pipeline))
