"""One rank's account of its steps, and all ranks' together as the ledger in the run's folder.

Every step is timed by phase. One step early in each session, and then one in `EVERY`, is timed
finely: which part of a phase is exposed communication, and when each action of the pipeline runs.
The step after the first of them is counted: memory by component, FLOPs and kernels, of which one
step is as good as any. The first step of a session, which allocates and compiles, and those that
are sampled are left out of the phases.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ridgeline.errors import LedgerError
from ridgeline.layout.transfers import Step
from ridgeline.ledger import read_ledger
from ridgeline.machine.energy import Meter, accelerator_meter, cpu_meter
from ridgeline.model.counts import flops_per_token
from ridgeline.torch_compat import pci_address, peak_memory_bytes
from ridgeline.train.exposed import Exposed
from ridgeline.train.folder import write_atomically
from ridgeline.train.loop import Job
from ridgeline.train.manifest import Progress
from ridgeline.train.measured import (
    BETWEEN,
    Counted,
    Counts,
    Done,
    Idle,
    Known,
    idle_of,
    ledger_of,
    on_one_clock,
)
from ridgeline.train.messages import groups_of
from ridgeline.train.owners import Owners
from ridgeline.train.telemetry import Span
from ridgeline.train.tracker import Tracker

Seconds = defaultdict[str, float]
FIRST, EVERY = 3, 1000
"""Which steps of a session are timed finely: this one, and then every so many.

On a CPU the finely timed step of a very small model takes 2.4 times as long, one of 100 ms 1.2
times (bench/telemetry_overhead.py): one in a thousand costs at most 0.14%.
"""
COUNTED = FIRST + 1
BARRIERS = 5
"""Before a sampled step: ranks leave one at almost the same moment, and one of them may be late."""


def ledgers_of(folder: Path) -> Path:
    """Where a run's ledgers lie."""
    return folder / "ledgers"


class Held(NamedTuple):
    """Memory of this process, in bytes: now, and the most so far."""

    resident_bytes: int
    most_bytes: int


def held() -> Held:
    """What this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Held(pages * resource.getpagesize(), most)


class Account:
    """What this rank counts from step to step of one session."""

    def __init__(
        self,
        job: Job,
        control: dist.ProcessGroup | None,
        peak_flops: float | None,
        progress: Progress,
        before: Held,
    ) -> None:
        """`before`: memory of this process before it built the model."""
        self.job, self.control, self.peak_flops = job, control, peak_flops
        self.first = self.seen = progress
        self.before = before
        self.steps = self.tokens = self.all_steps = 0
        self.wall_s = 0.0
        self.seconds: Seconds = defaultdict(float)
        self.between: Seconds = defaultdict(float)
        self.pending: Seconds = defaultdict(float)
        self.since_logged: Seconds = defaultdict(float)
        self.exposed = Exposed(groups_of(job.mesh), job.clock, job.mesh.device)
        self.timed: list[int] = []
        self.timed_seconds: Seconds = defaultdict(float)
        self.timed_wall_s = 0.0
        self.memory_bytes: float | None = None
        self.sample: ExitStack | None = None
        """Open while a step is sampled."""
        self.tracker: Tracker | None = None
        """While a step is counted."""
        self.counts: Counts | None = None
        self.moments: list[float] = []
        """When this rank left the barriers before the sampled step, by its own clock."""
        self.actions: list[Done] = []
        self.waits: list[Done] = []
        self.idle = [Idle(0.0, 0.0, 0.0)] * job.layout.pipeline
        self.meter = self._meter()
        self.energy_before: float | None = 0.0
        if progress.step and job.mesh.rank == 0:
            self.energy_before = _energy_of(ledgers_of(job.run.path) / "train.json")

    def observe(self, progress: Progress) -> None:
        """A step is done: add it up."""
        wall = time.perf_counter() - self.moments[-1] if self.moments else 0.0
        self._take()
        seconds, self.pending = self.pending, defaultdict(float)
        self.all_steps += 1
        nth = progress.step - self.first.step
        sampled = self.sample is not None
        self.close()
        if self.tracker is not None:
            self.counts = _counts(self.tracker, progress.step)
            self.tracker = None
        elif sampled:
            self.timed.append(progress.step)
            self.timed_wall_s += wall
            _add(self.timed_seconds, seconds)
            self.timed_seconds.pop("logging", None)
            self.memory_bytes = self._memory()
            self._gather_timeline(progress.step)
        elif nth > 1:
            self.steps += 1
            self.tokens += progress.tokens - self.seen.tokens
            self.wall_s += progress.elapsed_s - self.seen.elapsed_s
            _add(self.seconds, seconds)
        self.seen = progress
        if self.meter:
            self.meter.poll()

    def take_logged(self) -> dict[str, float]:
        """Seconds by phase since the last time; an evaluation logs its own."""
        taken, self.since_logged = dict(self.since_logged), defaultdict(float)
        taken.pop("evaluation", None)
        return taken

    def worked_s(self) -> float:
        """Seconds of work per step that was timed finely: outside of messages; 0.0 before one."""
        waited_s = sum(self.exposed.seconds.values())
        return max(0.0, self.timed_wall_s - waited_s) / max(1, len(self.timed))

    @property
    def just_sampled(self) -> bool:
        """Whether the last step was."""
        last = [*self.timed[-1:], *([self.counts.step] if self.counts else [])]
        return self.seen.step in last

    def prepare(self) -> None:
        """Sample the next step when it is its turn; a collective call then."""
        nth = self.seen.step - self.first.step + 1
        if nth != FIRST and nth != COUNTED and nth % EVERY:
            return
        self.sample = ExitStack()
        if nth == COUNTED:
            self.tracker = self.sample.enter_context(self._tracking())
        else:
            self.sample.enter_context(self.exposed.watching())
            self.sample.enter_context(self._timeline())
        torch.zeros(())  # the first operation that a mode sees loads parts of PyTorch
        self.exposed.settle()
        self.moments = []
        for _ in range(BARRIERS):
            if self.control is not None:
                dist.barrier(group=self.control)
            self.moments.append(time.perf_counter())

    def close(self) -> None:
        """Leave a step that is sampled, at its end or in an error."""
        if self.sample is not None:
            self.sample.close()
            self.sample = None

    def write(self, progress: Progress) -> None:
        """Gather all ranks' accounts, and write the ledger on rank 0; a collective call."""
        self._take()
        rows: list[Any] = [self.counted()]
        if self.control is not None:
            rows = _gathered(rows[0], self.job.layout.world, self.control)
        if self.job.mesh.rank == 0:
            run = self.job.run
            flops = flops_per_token(run.model, run.sequence, "causal").total
            known = Known(progress.elapsed_s, self.energy_before, flops, self.peak_flops)
            _write(run.path, "train.json", ledger_of(rows, self.idle, known).to_json())

    def counted(self) -> Counted:
        """This rank's row."""
        return Counted(
            rank=self.job.mesh.rank,
            stage=self.job.mesh.place["pipeline"],
            on_accelerator=self.job.mesh.device.type != "cpu",
            steps=self.steps,
            tokens=self.tokens,
            seconds=dict(self.seconds),
            wall_s=self.wall_s,
            all_steps=self.all_steps,
            between=dict(self.between),
            timed=tuple(self.timed),
            timed_seconds=dict(self.timed_seconds),
            timed_wall_s=self.timed_wall_s,
            exposed=dict(self.exposed.seconds),
            sent=dict(self.exposed.sent),
            calls=dict(self.exposed.calls),
            memory_bytes=self.memory_bytes,
            counts=self.counts,
            energy_j=self._energy(),
            energy_source=self.meter.source if self.meter else "",
        )

    def _take(self) -> None:
        """Add up what the clock has; a step's phases wait for the step to be done."""
        taken = self.job.clock.take()
        _add(self.since_logged, taken)
        for name, seconds in taken.items():
            (self.between if name in BETWEEN else self.pending)[name] += seconds

    @contextmanager
    def _timeline(self) -> Iterator[None]:
        """Note when each action of the pipeline runs."""
        self.actions, self.waits = [], []
        clock, pipeline = self.job.clock, self.job.pipeline
        spans: list[Span] = []
        clock.spans = spans

        @contextmanager
        def around(step: Step) -> Iterator[None]:
            del spans[:]
            yield
            for phase, start, end in spans:
                at = step.chunk, step.micro_batch, start, end
                if phase == "pipeline wait":
                    self.waits.append(Done("F" if step.kind == "F" else "B", *at))
                elif phase in ("forward", "backward"):
                    self.actions.append(Done(step.kind, *at))

        pipeline.around = around
        try:
            yield
        finally:
            clock.spans, pipeline.around = None, nullcontext

    @contextmanager
    def _tracking(self) -> Iterator[Tracker]:
        """Count memory, FLOPs and kernels."""
        tracker, pipeline = Tracker(self.exposed.groups), self.job.pipeline
        owners = Owners(tracker, pipeline)
        owners.moments(self.job.optimizer)
        pipeline.around = owners.around
        try:
            with tracker.watching(self.job.chunks):
                yield tracker
        finally:
            pipeline.around = nullcontext

    def _gather_timeline(self, step: int) -> None:
        """Each pipeline's timeline on its first rank; that of rank 0's is written."""
        ranks: list[Any] = [(self.moments, self.actions, self.waits)]
        if self.job.layout.pipeline > 1:
            ranks = _gathered(ranks[0], self.job.layout.pipeline, self.job.pipeline.group)
        if self.job.mesh.rank == 0:
            timelines = on_one_clock(ranks)
            self.idle = idle_of(timelines)
            lists = [[action._asdict() for action in actions] for actions, _ in timelines]
            _write(self.job.run.path, "timeline.json", json.dumps({"step": step, "ranks": lists}))

    def _memory(self) -> float | None:
        """Most memory so far, of the allocator or resident without what was there before.

        None where this process had held more before than since.
        """
        if (peak := peak_memory_bytes(self.job.mesh.device)) is not None:
            return float(peak)
        most = held().most_bytes
        more = most - self.before.resident_bytes  # the kernel keeps the two not quite at once
        return float(more) if most > self.before.most_bytes and more > 0 else None

    def _meter(self) -> Meter | None:
        """What measures this rank's device; on CPUs, the first rank of a node measures the node."""
        device = self.job.mesh.device
        if device.type == "cpu":
            return cpu_meter() if self._measures_energy else None
        address = pci_address(device)
        return accelerator_meter(address) if address else None

    @property
    def _measures_energy(self) -> bool:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        return first or self.job.mesh.device.type != "cpu"

    def _energy(self) -> float | None:
        """Joules of this session; 0 where another rank measures for this one."""
        if not self._measures_energy:
            return 0.0
        return self.meter.joules() if self.meter else None


def _add(total: Seconds, more: Mapping[str, float]) -> None:
    for name, seconds in more.items():
        total[name] += seconds


def _counts(tracker: Tracker, step: int) -> Counts:
    """What a tracker saw in one step."""
    flops: defaultdict[str, float] = defaultdict(float)
    for work in tracker.work:
        flops[work.kind] += work.flops
    return Counts(step, tracker.kernels, dict(flops), dict(tracker.peak()[1]))


def _gathered(mine: Any, size: int, group: dist.ProcessGroup) -> list[Any]:
    """What each rank of a group has, on its first rank; nothing on the others."""
    first = group.rank() == 0
    rows: list[Any] = [None] * size
    dist.gather_object(mine, rows if first else None, group=group, group_dst=0)
    return rows if first else []


def _write(folder: Path, name: str, text: str) -> None:
    ledgers_of(folder).mkdir(exist_ok=True)
    write_atomically(ledgers_of(folder) / name, text)


def _energy_of(path: Path) -> float | None:
    """Joules of the sessions before this one, by the ledger they left; None: not known."""
    try:
        return read_ledger(path).energy_j
    except LedgerError:
        return None
