"""The training program: one function from top to bottom.

Shape suffixes: B sequences of a micro-batch, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ridgeline.data.mixture import Mixture
from ridgeline.run import Run
from ridgeline.torch_compat import drop_gathered, set_gradient_sync
from ridgeline.train.agreement import Agreement
from ridgeline.train.checkpoint import Progress
from ridgeline.train.optimizer import IGNORED, clip_gradients
from ridgeline.train.parallelize import Mesh
from ridgeline.train.schedule import batch_at, first_sample, learning_rate, run_fraction
from ridgeline.train.telemetry import Clock, Observation

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits_BLV, targets_BL) -> sum over valid targets; IGNORED targets count nothing."""


@dataclass
class Job:
    """What one rank trains with."""

    run: Run
    mesh: Mesh
    model: nn.Module
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    mixture: Mixture
    agreement: Agreement
    clock: Clock
    stop_asked: Callable[[], bool]
    """Whether somebody asked this rank to stop."""

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch of this rank."""
        assert self.run.layout != "auto"  # resolved before any process starts
        return self.run.layout.micro_batch


def train_loop(
    job: Job,
    progress: Progress,
    observe: Callable[[Observation], None],
    after_step: Callable[[Progress, bool, bool], None],
) -> tuple[Progress, bool]:
    """Train from `progress` to the end of the budget; the progress reached, and whether complete.

    `observe` gets every step's numbers, still on the device; `after_step(progress, complete, stop)`
    evaluates and saves.
    """
    run, model, optimizer, clock = job.run, job.model, job.optimizer, job.clock
    stop, fraction = False, run_fraction(run, progress.step, progress.elapsed_s)
    while fraction < 1 and not stop:
        step = progress.step
        rate = learning_rate(run, step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate

        with clock.phase("data"):
            micro_batches = list(fetch(job, step))
            valid = torch.stack([(targets >= 0).sum() for _, targets in micro_batches]).sum()
            dist.all_reduce(valid, group=job.mesh.data.get_group())

        loss = torch.zeros((), device=job.mesh.device)
        for index, (inputs_BL, targets_BL) in enumerate(micro_batches):
            set_gradient_sync(model, index == len(micro_batches) - 1)
            with clock.phase("forward"):
                micro_loss = job.loss(model(inputs_BL), targets_BL) / valid
            with clock.phase("backward"):
                torch.autograd.backward(micro_loss)
            loss += micro_loss.detach()

        with clock.phase("optimizer"):
            norm = clip_gradients(model.parameters(), run.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        batch = batch_at(run, step)
        progress = replace(
            progress,
            step=step + 1,
            samples=first_sample(run, step + 1),
            tokens=progress.tokens + batch * run.sequence,
            elapsed_s=progress.elapsed_s + clock.lap(),
        )
        observe(Observation(progress, loss, norm, rate))
        stop, elapsed_s = job.agreement.report(job.stop_asked(), progress.elapsed_s)
        # The first report of a resumed run agrees on no time yet, but the budget never grows back.
        fraction = max(fraction, run_fraction(run, progress.step, elapsed_s))
        after_step(progress, fraction >= 1, stop)
    job.agreement.settle()
    return progress, fraction >= 1


def fetch(job: Job, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of `step`: (inputs_BL, targets_BL), int64, on its device.

    Micro-batch i of all ranks together is a contiguous run of samples, so which samples a step
    holds depends on the step alone.
    """
    size, ranks = job.micro_batch, job.mesh.data_size
    start = first_sample(job.run, step)
    for offset in range(0, batch_at(job.run, step), size * ranks):
        first = start + offset + job.mesh.data_rank * size
        yield split(job.mixture.batch(first, size), job.mesh.device)


def split(windows: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of L + 1 tokens as (inputs_BL, targets_BL): targets are the next tokens."""
    tokens = torch.as_tensor(windows).to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def held_out_losses(job: Job) -> dict[str, float]:
    """Mean held-out loss per corpus in nats per token, over the same sequences in every layout.

    Every rank does the same number of micro-batches; what is missing is filled with ignored
    targets.
    """
    losses = {}
    size, ranks = job.micro_batch, job.mesh.data_size
    job.model.eval()
    for corpus in job.mixture.corpora:
        windows = torch.as_tensor(job.mixture.held_out(corpus.name, job.run.evaluation.sequences))
        total = torch.zeros(2, dtype=torch.float64, device=job.mesh.device)
        for start in range(0, len(windows), size * ranks):
            first = start + job.mesh.data_rank * size
            rows = windows[torch.arange(first, first + size) % len(windows)]
            inputs_BL, targets_BL = split(rows, job.mesh.device)
            surplus = torch.arange(first, first + size) >= len(windows)
            targets_BL = targets_BL.masked_fill(surplus[:, None].to(targets_BL.device), IGNORED)
            total[0] += job.loss(job.model(inputs_BL), targets_BL)
            total[1] += (targets_BL >= 0).sum()
        dist.all_reduce(total, group=job.mesh.data.get_group())
        losses[corpus.name] = float(total[0] / total[1])
    drop_gathered(job.model)
    job.model.train()
    return losses
