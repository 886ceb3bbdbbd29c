"""The training program: one function from top to bottom.

Shape suffixes: B sequences of a micro-batch, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ridgeline.data.mixture import Mixture
from ridgeline.layout.layout import Layout
from ridgeline.run import Run
from ridgeline.torch_compat import drop_gathered
from ridgeline.train.agreement import Agreement
from ridgeline.train.badsteps import BadSteps
from ridgeline.train.experts import set_loss_scale, update_router_bias
from ridgeline.train.manifest import Progress
from ridgeline.train.optimizer import LossScale, clip, totals
from ridgeline.train.parallelize import Mesh
from ridgeline.train.pipeline import LossOf, Pipeline
from ridgeline.train.samples import SampleLog
from ridgeline.train.schedule import batch_at, learning_rate, run_fraction
from ridgeline.train.telemetry import Clock, Observation
from ridgeline.train.tied import sum_tied
from ridgeline.train.vocabulary import IGNORED

MICRO_BATCHES_BETWEEN_WISHES = 32
"""After how many of an evaluation the ranks ask each other whether to stop."""
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits_BLV, targets_BL) -> sum over valid targets; IGNORED targets count nothing."""


@dataclass
class Job:
    """What one rank trains with."""

    run: Run
    mesh: Mesh
    pipeline: Pipeline
    """This rank's chunks of the model."""
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None
    """In fp16."""
    mixture: Mixture
    agreement: Agreement
    clock: Clock
    stop_asked: Callable[[], bool]
    """Whether somebody asked this rank to stop."""
    bad_steps: BadSteps = field(default_factory=BadSteps)
    samples: SampleLog | None = None
    """Notes what this rank reads."""

    @property
    def chunks(self) -> list[nn.Module]:
        """This rank's part of the model; one chunk, the whole of it, without a pipeline."""
        return list(self.pipeline.chunks.values())

    @property
    def layout(self) -> Layout:
        """How the run is divided."""
        return self.mesh.layout

    def counted(self, loss: Tensor) -> Tensor:
        """`loss` where a sum over all ranks should count it: tensor ranks all have the same."""
        return loss if self.mesh.place["tensor"] == 0 else torch.zeros_like(loss)


def train_loop(
    job: Job,
    progress: Progress,
    observe: Callable[[Observation], None],
    after_step: Callable[[Progress, bool, bool], tuple[bool, Progress | None]],
) -> tuple[Progress, bool]:
    """Train from `progress` to the end of the budget; the progress reached, and whether complete.

    `observe` gets every step's numbers, still on the device; `after_step(progress, complete, stop)`
    evaluates and saves; it says whether to stop, for what it was told or heard meanwhile, and where
    to go on when that is elsewhere.
    """
    run, optimizer, clock = job.run, job.optimizer, job.clock
    stop, fraction = False, run_fraction(run, progress.step, progress.elapsed_s)
    while fraction < 1 and not stop:
        step = progress.step
        rate = learning_rate(run, step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate

        with clock.phase("data"):
            inputs, targets = fetch(job, progress)
            valid = job.mesh.sum_over_replicas(valid_tokens(targets))
            factor = job.loss_scale.factor if job.loss_scale else 1.0
            set_loss_scale(job.chunks, factor / valid)

        loss = job.pipeline.run(inputs, mean_loss(job.loss, targets, valid / factor))

        with clock.phase("optimizer"):
            parameters = [p for chunk in job.chunks for p in chunk.parameters()]
            repeated = sum_tied(job.pipeline) if run.model.tied else None
            both = totals(parameters, job.counted(loss), job.layout, repeated)
            norm, loss = (each / factor for each in both)
            clip(parameters, norm, run.optimizer.clip_norm, factor)
            bad = job.bad_steps.flag(loss, norm)
            if job.loss_scale is None or job.loss_scale.accepts(norm):
                job.bad_steps.update(optimizer, bad)
            optimizer.zero_grad(set_to_none=True)
            total = partial(job.mesh.sum_over_replicas, tensor=True)
            update_router_bias(job.chunks, total, 1 - bad)

        batch = batch_at(run, step)
        progress = replace(
            progress,
            step=step + 1,
            samples=progress.samples + batch,
            tokens=progress.tokens + batch * run.sequence,
            elapsed_s=progress.elapsed_s + clock.lap(),
        )
        observe(Observation(progress, loss, norm, rate, bad))
        stop, elapsed_s = job.agreement.report(job.stop_asked(), progress.elapsed_s)
        # The first report of a resumed run agrees on no time yet, but the budget never grows back.
        fraction = max(fraction, run_fraction(run, progress.step, elapsed_s))
        stop, back = after_step(progress, fraction >= 1, stop)
        if back:
            progress, fraction = back, run_fraction(run, back.step, back.elapsed_s)
    job.agreement.settle()
    return progress, fraction >= 1 and not stop


def fetch(job: Job, progress: Progress) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's micro-batches of a step: inputs and targets, each (B, L) int64 on its device.

    Micro-batch i of all ranks together is a contiguous run of samples, so which samples a step
    holds does not depend on the layout.
    """
    size, ranks = job.layout.micro_batch, job.layout.data
    first = progress.samples + job.mesh.place["data"] * size
    starts = range(first, first + batch_at(job.run, progress.step), size * ranks)
    windows = [torch.as_tensor(job.mixture.batch(start, size)) for start in starts]
    if job.samples:
        job.samples.note(progress.step, starts, size)
    return split(job, windows)


def valid_tokens(targets: Sequence[Tensor]) -> Tensor:
    """How many targets of some micro-batches count."""
    return torch.stack([(each != IGNORED).sum() for each in targets]).sum()


def mean_loss(loss: LossFunction, targets: Sequence[Tensor], valid: Tensor | int) -> LossOf:
    """The loss of micro-batch k over its targets, as its share of the mean over `valid` tokens."""
    return lambda logits_BLV, k: loss(logits_BLV, targets[k]) / valid


def split(job: Job, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's part of windows of S + 1 tokens: (inputs_BL, targets_BL), the next tokens."""
    device, here_L = job.mesh.device, job.pipeline.positions
    tokens = [each.to(device, non_blocking=True) for each in windows]
    return [each[:, here_L] for each in tokens], [each[:, here_L + 1] for each in tokens]


@torch.no_grad()
def held_out_losses(job: Job) -> dict[str, float] | None:
    """Mean held-out loss per corpus in nats per token, over the same sequences in every layout.

    None when the ranks were asked to stop meanwhile. Every rank does the same number of
    micro-batches; what is missing is filled with ignored targets.
    """
    losses = {}
    size, ranks = job.layout.micro_batch, job.layout.data
    for chunk in job.chunks:
        chunk.eval()
    stop = False
    for corpus in job.mixture.corpora:
        windows = torch.as_tensor(job.mixture.held_out(corpus.name, job.run.evaluation.sequences))
        every = torch.arange(-(-len(windows) // (size * ranks)) * size * ranks)
        # (micro-batches, B) rows of this rank, the last of them perhaps beyond the windows
        mine = every.view(-1, ranks, size)[:, job.mesh.place["data"]]
        loss, valid = torch.zeros(2, device=job.mesh.device)
        for at in range(0, len(mine), MICRO_BATCHES_BETWEEN_WISHES):
            some = mine[at : at + MICRO_BATCHES_BETWEEN_WISHES]
            stop = stop or job.agreement.ask(job.stop_asked())
            if stop:
                break
            inputs, targets = split(job, [windows[rows % len(windows)] for rows in some])
            for rows, targets_BL in zip(some, targets, strict=True):
                targets_BL[(rows >= len(windows)).to(targets_BL.device)] = IGNORED
            loss += job.counted(job.pipeline.run(inputs, mean_loss(job.loss, targets, 1), False))
            valid += job.mesh.sum_over_replicas(valid_tokens(targets))
        dist.all_reduce(loss)
        losses[corpus.name] = float(loss / valid)
    for chunk in job.chunks:
        drop_gathered(chunk)
        chunk.train()
    return None if stop else losses
