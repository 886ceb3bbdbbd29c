"""One rank of a run: process group, model, data, checkpoints, and the loop between them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ridgeline.data.manifest import Baselines
from ridgeline.data.mixture import Mixture
from ridgeline.errors import CheckpointError
from ridgeline.launch.local import Life, local_processes, threads_per_process
from ridgeline.launch.rounds import own_round
from ridgeline.launch.stopping import Wish, refuse_to_start, stop_asked
from ridgeline.layout.layout import Layout
from ridgeline.machine.device import device as device_named
from ridgeline.machine.device import recognise
from ridgeline.model.counts import flops_per_token
from ridgeline.run import Run
from ridgeline.torch_compat import HashStore, compiled_graphs, name_of
from ridgeline.train import checkpoint
from ridgeline.train.account import Account, held
from ridgeline.train.agreement import Agreement
from ridgeline.train.badsteps import BadStep
from ridgeline.train.build import (
    MakeDecoder,
    MakeOptimizer,
    make_job,
    without_memory,
)
from ridgeline.train.corruption import compare_copies, self_test
from ridgeline.train.exchange import broadcast
from ridgeline.train.folder import checkpoints_of
from ridgeline.train.interval import Beside, Interval
from ridgeline.train.loop import Job, LossFunction, held_out_losses, train_loop
from ridgeline.train.manifest import Progress, complete, remove_partial
from ridgeline.train.samples import SampleLog
from ridgeline.train.saving import Saved, Saver, drain_left
from ridgeline.train.schedule import batch_at, total_steps
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
    life: Life | None = None,
) -> Outcome:
    """Train `run`, resolved, as the rank that the environment says this process is."""
    assert isinstance(run.layout, Layout)
    before, life = held(), life or Life(Wish(), time.time())
    # The fork server loaded torch with threads for all cores; each worker takes its share.
    torch.set_num_threads(threads_per_process(local_processes()))
    with watched(run) as watchdog, process_group() as (device, control):
        asked = stop_asked(life.stop, run.faults.save_before_s, decides=dist.get_rank() == 0)
        refuse_to_start(Agreement(control).ask(asked()))
        if run.faults.self_test:
            self_test(device, run.layout, control)
        watchdog.where = lambda: (0, "building the model")
        job = make_job(run, decoder, loss, make_optimizer, device, control, asked)
        watchdog.where = lambda: (0, "loading the checkpoint")
        progress, told = _resume(job, control)
        refuse_to_start(job.agreement.ask(asked()))
        recorder, rank = None, job.mesh.rank
        if run.logging.samples:
            job.samples = SampleLog(run.path / "samples", rank, job.layout.world, progress.step)
        if rank == 0:
            recorder = _recorder(job, without_memory(decoder, run.model), progress, life)
            recorder.tell(progress, told)
        account = Account(job, control, peak_flops(run, device), progress, before)
        keeper = Keeper(job, control, recorder, account, progress, watchdog.host_of)
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
        store, rank, world = next(rendezvous("env://"))
        store = own_round(store, rank, world)
        dist.init_process_group(backends, store=store, rank=rank, world_size=world)
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


def _resume(job: Job, group: dist.ProcessGroup | None) -> tuple[Progress, list[tuple[str, str]]]:
    """Restore the newest sound checkpoint of the run's folder, if there is one.

    Also what there is to tell: what was brought over from the nodes' disks, what was passed over.
    """
    folder, told = checkpoints_of(job.run.path), []
    if job.mesh.rank == 0:
        remove_partial(folder)
    local = local_folder(job.run)
    # A folder without a step of this run is a new one: what lies on the disks is of another.
    begun = broadcast((job.run.path / "metrics.jsonl").exists(), group)
    if local and begun and (name := drain_left(local, folder, group)):
        told.append(("drained", f"{name} was still on the nodes' own disks"))
    if not broadcast(bool(complete(folder)), group):
        return Progress(data=job.mixture.fingerprint), told
    checkpoint.make_state(job.optimizer)
    progress, damaged = checkpoint.restore(folder, _tensors(job), group)
    told += [("damaged", str(fault)) for fault in damaged]
    assert progress is not None  # there are checkpoints, and none that is sound raises
    job.bad_steps.resume()
    return progress, told


def local_folder(run: Run) -> Path | None:
    """Where on each node's own disk this run's checkpoints are written first."""
    return run.checkpoint.local / run.name if run.checkpoint.local else None


def _tensors(job: Job) -> dict[str, Tensor]:
    """All that a checkpoint holds of a job."""
    last_steps = job.bad_steps.history
    return checkpoint.tensors_of(job.chunks, job.optimizer, job.loss_scale, last_steps)


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


def _recorder(job: Job, whole: nn.Module, progress: Progress, life: Life) -> Recorder:
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
    if life.lost:
        recorder.event(progress, "restarted", why=life.lost[-1], restarts=len(life.lost))
    if life.layout_before:
        words = {"layout": str(run.layout), "asked": life.layout_before}
        recorder.event(progress, "fewer devices", **words)
        recorder.say(f"fewer devices: '{run.layout}' instead of '{life.layout_before}'")
    recorder.event(
        progress,
        "resumed" if progress.step else "started",
        start_s=time.time() - life.began,
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
        progress: Progress,
        host_of: Callable[[int], str],
    ) -> None:
        """`host_of`: the host of a rank; rank 0 is asked."""
        self.job = job
        self.host_of = host_of
        timed_s = None if job.mesh.device.type == "cpu" else account.worked_s
        self.stragglers = Stragglers(job.layout, group, timed_s)
        settings = job.run.checkpoint
        # Threads that write have a group of their own: its messages cross no other's.
        writers = None if group is None else dist.new_group(backend="gloo")
        self.saver = Saver(checkpoints_of(job.run.path), settings, writers, local_folder(job.run))
        self.interval = Interval.of(job.run, progress.elapsed_s)
        self.beside, self.elapsed_s = Beside(), progress.elapsed_s
        self.account = account
        self.group = group
        self.recorder = recorder
        self.cost: tuple[float | None, float] = (None, 0.0)
        self.held_out: float | None = None
        self.told_graphs = False
        self.bad: BadStep | None = None
        """The step before the last one, if it was bad."""
        self.totals: list[Tensor] = []
        """Loss and gradient norm of the last step."""

    def run(self, progress: Progress) -> Outcome:
        """Train to the end or to a stop."""
        if self.recorder:
            self.recorder.start(progress)
        self.job.clock.lap()
        self.stragglers.step_begins()
        try:
            before = progress.step
            progress, complete = train_loop(self.job, progress, self.observe, self.after_step)
            self.told(self.saver.finish(), last=True)
            if complete and progress.step == before:
                complete = self.evaluate(progress)  # nothing was left to train: measure what is
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
        self.beside.step(seen.progress.elapsed_s - self.elapsed_s, self.saver.thread is not None)
        self.elapsed_s = seen.progress.elapsed_s
        self.told(self.saver.poll())
        self.bad = self.job.bad_steps.report(seen, batch_at(self.job.run, step - 1))
        self.totals = [seen.loss, seen.grad_norm]
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

    def after_step(
        self, progress: Progress, complete: bool, stop: bool
    ) -> tuple[bool, Progress | None]:
        """Evaluate and save when due: whether to stop, for `stop` or for what was heard meanwhile.

        One who asked to stop waits for the checkpoint only; the evaluation is left to the resumed
        run. Also where to go on when that is at a checkpoint from before a bad step.
        """
        run, steps = self.job.run, self.job.bad_steps
        if self.bad and (back := self.answer(self.bad, progress)):
            return stop, back
        evaluation, comparing = run.evaluation.every_steps, run.faults.compare_every_steps
        due = complete or (evaluation > 0 and progress.step % evaluation == 0)
        saving = self.interval.due(progress.step, self.job.agreement.elapsed_s)
        # A checkpoint must be good: what the run goes back to, or starts again from.
        last = steps.settle() if due or saving or stop else None
        if last and (back := self.answer(last, progress)):
            return stop, back
        if comparing and (complete or stop or saving or progress.step % comparing == 0):
            self.compare(progress)
        evaluated = due and not stop and self.evaluate(progress)
        stop = stop or (due and not evaluated)
        saved = complete or stop or saving
        if saved:
            self.save(progress)
        if saved and not complete and not stop:  # not a step later, with another checkpoint
            stop = self.job.agreement.ask(self.job.stop_asked())
        with self.job.clock.phase("logging"):
            if evaluated or saved or self.account.just_sampled:
                self.account.write(progress)
            if not (complete or stop):
                self.account.prepare()
        self.stragglers.step_begins()
        return stop, None

    def answer(self, bad: BadStep, progress: Progress) -> Progress | None:
        """Write a bad step down and do what the run says; where to go on if that is further back.

        Raises NotLearnt where the run is to stop.
        """
        steps = self.job.bad_steps
        done, back = steps.answer(bad, progress, self.go_back)
        if self.recorder:
            self.recorder.event(back or bad.progress, "bad_step", **bad.fields(), done=done)
            self.recorder.say(f"{bad}: {done}")
            if back:
                self.recorder.start(back)
        if steps.stops(bad):
            raise bad.error(self.job.run.faults)
        self.account.seen = back or self.account.seen
        return back

    def go_back(self) -> Progress:
        """Restore the newest checkpoint, the one that is being written too."""
        self.told(self.saver.finish())
        progress, told = _resume(self.job, self.group)
        if self.recorder:
            self.recorder.tell(progress, told)
        return progress

    def compare(self, progress: Progress) -> None:
        """Compare what several ranks hold; raises CorruptionError where it differs."""
        start = time.perf_counter()
        with self.job.clock.phase("logging"):
            count = compare_copies(self.job, self.totals, self.group)
            if self.recorder:
                seconds = time.perf_counter() - start
                self.recorder.event(progress, "compared", tensors=count, seconds=seconds)

    def evaluate(self, progress: Progress) -> bool:
        """Held-out loss of the mixture: the mean of its corpora by weight. False: stopped."""
        start = time.perf_counter()
        with self.job.clock.between("evaluation"):
            losses = held_out_losses(self.job)
        if losses is None:
            return False
        weights = {corpus.name: corpus.weight for corpus in self.job.mixture.corpora}
        mean = sum(losses[name] * weight for name, weight in weights.items())
        self.held_out = mean / sum(weights.values())
        if self.recorder:
            seconds = time.perf_counter() - start
            with self.job.clock.phase("logging"):
                self.recorder.held_out(progress, self.held_out, losses, seconds)
        return True

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint of all ranks; training waits for the copy of its state."""
        job = self.job
        with job.clock.between("checkpoint"):
            self.told(self.saver.finish())
            self.saver.save(progress, _tensors(job))
            cost = broadcast(self.cost, self.group) if self.interval.mtbf_s else (None, 0.0)
        self.interval.saved(job.agreement.elapsed_s, *cost)
        self.told(self.saver.poll())

    def told(self, saved: Saved | None, *, last: bool = False) -> None:
        """Note how a checkpoint went; one that failed is a warning, unless it was the last."""
        if saved is None:
            return
        lost_s, slower = self.beside.take()
        self.cost = (saved.stall_s + lost_s, saved.write_s)
        if saved.error is not None and last:
            raise CheckpointError(
                f"the last checkpoint, {saved.path}", saved.error,
                "free space and train again: the run goes on from the checkpoint before it",
            )  # fmt: skip
        if not self.recorder:
            return
        if saved.error is not None:
            self.recorder.event(saved.progress, "checkpoint failed", words=saved.error)
            self.recorder.say(
                f"WARNING: no checkpoint of step {saved.progress.step:,}: {saved.error}; "
                "the ones before it stay, and the run goes on"
            )
            return
        self.recorder.event(
            saved.progress, "checkpoint", path=saved.path.name, seconds=saved.stall_s,
            write_s=saved.write_s, bytes=saved.size_bytes, slower=slower,
        )  # fmt: skip
