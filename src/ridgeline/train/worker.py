"""One rank of a run: process group, model, data, checkpoints, and the loop between them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ridgeline.data.manifest import Baselines
from ridgeline.data.mixture import Mixture
from ridgeline.launch.local import (
    StopFlag,
    local_processes,
    stop_on_signals,
    threads_per_process,
)
from ridgeline.layout.layout import Layout
from ridgeline.machine.device import device as device_named
from ridgeline.machine.device import recognise
from ridgeline.model.counts import flops_per_token
from ridgeline.run import Run
from ridgeline.torch_compat import HashStore, compiled_graphs, name_of
from ridgeline.train import checkpoint
from ridgeline.train.account import Account, held
from ridgeline.train.build import (
    MakeDecoder,
    MakeOptimizer,
    make_job,
    without_memory,
)
from ridgeline.train.checkpoint import Progress
from ridgeline.train.folder import checkpoints_of
from ridgeline.train.loop import Job, LossFunction, held_out_losses, train_loop
from ridgeline.train.schedule import total_steps
from ridgeline.train.stragglers import Stragglers
from ridgeline.train.telemetry import Observation, Recorder, drop_after
from ridgeline.train.watchdog import watched


@dataclass(frozen=True)
class Outcome:
    """How a run, or this part of it, ended."""

    rank: int
    """Which rank says so."""
    complete: bool
    """Whether the budget is spent; else it was asked to stop and can be resumed."""
    step: int
    tokens: int
    held_out_loss: float | None
    """Nats per token; None when the run was stopped before an evaluation."""


def work(
    run: Run,
    decoder: MakeDecoder,
    loss: LossFunction,
    make_optimizer: MakeOptimizer,
    began: float | None = None,
    stop: StopFlag | None = None,
) -> Outcome:
    """Train `run`, resolved, as the rank that the environment says this process is.

    `began`: Unix time since which the command, or this process, runs; left out: now.
    """
    before, began = held(), time.time() if began is None else began
    stop = stop or threading.Event()
    # The fork server loaded torch with threads for all cores; each worker takes its share.
    torch.set_num_threads(threads_per_process(local_processes()))
    with watched(run) as watchdog, process_group() as (device, control), stop_on_signals(stop):
        watchdog.where = lambda: (0, "building the model")
        job = make_job(run, decoder, loss, make_optimizer, device, control, stop.is_set)
        watchdog.where = lambda: (0, "loading the checkpoint")
        progress = _resume(job, control)
        recorder = None
        if job.mesh.rank == 0:
            recorder = _recorder(job, without_memory(decoder, run.model), progress, began)
        account = Account(job, control, peak_flops(run, device), progress, before)
        keeper = Keeper(job, control, recorder, account, watchdog.host_of)
        watchdog.where = lambda: (account.seen.step, job.clock.inside)
        return keeper.run(progress)


def baselines_of(run: Run, mixture: Mixture) -> Baselines | None:
    """What models without context reach; None where they were measured for other weights."""
    baselines = mixture.manifest.baselines
    weights = {corpus.name: corpus.weight for corpus in run.data.corpora}
    return baselines if baselines and baselines.weights == weights else None


@contextmanager
def process_group() -> Iterator[tuple[torch.device, dist.ProcessGroup | None]]:
    """Join the other ranks; yields this rank's device and a host-side group for small agreements.

    One process needs no launcher: its group has one member and no socket. A rank that fails beside
    others leaves the group to the end of its process: closed at once, it would make the others
    fail, and tell of it, before this rank could tell its own error.
    """
    device = torch.device("cpu")
    if torch.accelerator.is_available() and (
        accelerator := torch.accelerator.current_accelerator()
    ):
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device)
    backend = dist.get_default_backend_for_device(device)
    backends = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}"
    if "RANK" in os.environ:
        dist.init_process_group(backends)
    else:
        dist.init_process_group(backends, store=HashStore(), rank=0, world_size=1)
    alone = dist.get_world_size() == 1
    try:
        yield device, None if alone else dist.new_group(backend="gloo")
    except BaseException:
        if alone:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _resume(job: Job, group: dist.ProcessGroup | None) -> Progress:
    """Restore the newest checkpoint of the run's folder, if there is one."""
    path = checkpoint.newest(checkpoints_of(job.run.path))
    if path is None:
        return Progress(data=job.mixture.fingerprint)
    checkpoint.make_state(job.optimizer)
    tensors = checkpoint.tensors_of(job.chunks, job.optimizer, job.loss_scale)
    return checkpoint.load(path, tensors, group)


def peak_flops(run: Run, device: torch.device) -> float | None:
    """Peak of the device the run is on, in its precision; None where that is not known.

    A CPU does not say what it is: it is the cluster's device when that is a CPU of the catalogue
    (one that no accelerator reports to be).
    """
    assert isinstance(run.layout, Layout)
    known = recognise(name_of(device)) if device.type != "cpu" else None
    if device.type == "cpu" and run.cluster.device != "local":
        declared = device_named(run.cluster.device)
        known = None if declared.reported_as else declared
    return known.peak_flops.get(run.layout.precision) if known else None


def _recorder(job: Job, whole: nn.Module, progress: Progress, began: float) -> Recorder:
    """Rank 0's recorder, after saying what is trained, what was lost and what was restored."""
    run, device = job.run, job.mesh.device
    lost = drop_after(run.path / "metrics.jsonl", progress.step)
    flops = flops_per_token(run.model, run.sequence, "causal").total
    recorder = Recorder(run, device, flops, peak_flops(run, device))
    baselines = baselines_of(run, job.mixture)
    parameters = sum(p.numel() for p in whole.parameters())
    # Embeddings and head, as model.counts leaves them out of `non_embedding`; tied ones once.
    ends = [
        part
        for name, part in whole.named_modules()
        if isinstance(part, nn.Embedding) or name == "head"
    ]
    embedding = sum(p.numel() for p in {p for part in ends for p in part.parameters()})
    if lost:
        recorder.event(progress, "lost", lost_steps=lost.steps, lost_s=lost.seconds)
    recorder.event(
        progress,
        "resumed" if progress.step else "started",
        start_s=time.time() - began,
        total_steps=total_steps(run),
        model=run.model.name,
        parameters=parameters,
        embedding_parameters=embedding,
        mfu_convention="causal",
        baselines=baselines.model_dump(include={"unigram_entropy", "bigram_held_out_loss"})
        if baselines
        else None,
    )
    if progress.step:
        recorder.say(
            f"resumed at step {progress.step:,}: weights, optimizer, random state; "
            f"next sample {progress.samples:,}"
        )
    return recorder


class Keeper:
    """What happens around the steps of one rank: logging, evaluation, checkpoints, the verdict."""

    def __init__(
        self,
        job: Job,
        group: dist.ProcessGroup | None,
        recorder: Recorder | None,
        account: Account,
        host_of: Callable[[int], str],
    ) -> None:
        """`host_of`: the host of a rank; rank 0 is asked."""
        self.job = job
        self.host_of = host_of
        timed_s = None if job.mesh.device.type == "cpu" else account.worked_s
        self.stragglers = Stragglers(job.layout, group, timed_s)
        self.account = account
        self.group = group
        self.recorder = recorder
        self.held_out: float | None = None
        self.told_graphs = False

    def run(self, progress: Progress) -> Outcome:
        """Train to the end or to a stop."""
        if self.recorder:
            self.recorder.start(progress)
        self.job.clock.lap()
        self.stragglers.step_begins()
        try:
            before = progress.step
            progress, complete = train_loop(self.job, progress, self.observe, self.after_step)
            if complete and progress.step == before:
                self.evaluate(progress)  # nothing was left to train: measure what is there
            if self.recorder:
                self.recorder.event(progress, "finished" if complete else "interrupted")
            self.stragglers.settle()
        finally:
            self.account.close()
            if self.recorder:
                self.recorder.close()
        return Outcome(self.job.mesh.rank, complete, progress.step, progress.tokens, self.held_out)

    def observe(self, seen: Observation) -> None:
        """Log the step when it is due; the only place where a step waits for its own numbers."""
        self.stragglers.step_ends()
        self.account.observe(seen.progress)
        step = seen.progress.step
        last = step == total_steps(self.job.run)
        if step % self.job.run.logging.every_steps and step != 1 and not last:
            return
        loss = float(seen.loss)
        seconds, busy_s = self.account.take_logged(), self.stragglers.exchange()
        if not self.recorder:
            return
        with self.job.clock.phase("logging"):
            self.recorder.step(seen, loss, seconds, busy_s)
            for slow in self.stragglers.named_now(busy_s) if busy_s else ():
                host = self.host_of(slow.rank)
                self.recorder.event(seen.progress, "straggler", host=host, **slow._asdict())
                self.recorder.say(
                    f"rank {slow.rank} on {host} is slow: {slow.busy_s:.3g} s of work per "
                    f"step, the median of its peers is {slow.median_s:.3g} s"
                )
            if self.job.layout.compile and not self.told_graphs:
                self.told_graphs = True
                graphs, breaks = compiled_graphs()
                self.recorder.event(seen.progress, "compiled", graphs=graphs, graph_breaks=breaks)
                self.recorder.say(f"compiled: {graphs} graphs, {breaks} graph breaks")

    def after_step(self, progress: Progress, complete: bool, stop: bool) -> None:
        """Evaluate and save when due; one who asked to stop waits for the checkpoint only."""
        run = self.job.run
        evaluation, saving = run.evaluation.every_steps, run.checkpoint.every_steps
        evaluated = complete or (evaluation and progress.step % evaluation == 0 and not stop)
        saved = complete or stop or (saving and progress.step % saving == 0)
        if evaluated:
            self.evaluate(progress)
        if saved:
            self.save(progress)
        with self.job.clock.phase("logging"):
            if evaluated or saved or self.account.just_sampled:
                self.account.write(progress)
            if not (complete or stop):
                self.account.prepare()
        self.stragglers.step_begins()

    def evaluate(self, progress: Progress) -> None:
        """Held-out loss of the mixture: the mean of its corpora by weight."""
        start = time.perf_counter()
        with self.job.clock.between("evaluation"):
            losses = held_out_losses(self.job)
        weights = {corpus.name: corpus.weight for corpus in self.job.mixture.corpora}
        mean = sum(losses[name] * weight for name, weight in weights.items())
        self.held_out = mean / sum(weights.values())
        if self.recorder:
            seconds = time.perf_counter() - start
            with self.job.clock.phase("logging"):
                self.recorder.held_out(progress, self.held_out, losses, seconds)

    def save(self, progress: Progress) -> None:
        """Save a checkpoint of all ranks and drop old ones."""
        folder = checkpoints_of(self.job.run.path)
        job, start = self.job, time.perf_counter()
        with job.clock.between("checkpoint"):
            tensors = checkpoint.tensors_of(job.chunks, job.optimizer, job.loss_scale)
            path = checkpoint.save(folder, tensors, progress, self.group)
            if self.recorder:
                checkpoint.keep_newest(folder, job.run.checkpoint.keep)
        if self.recorder:
            seconds = time.perf_counter() - start
            self.recorder.event(progress, "checkpoint", path=path.name, seconds=seconds)
