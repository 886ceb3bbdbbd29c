"""`ridgeline.train`: resolve a run, check all that can be checked, and start its processes."""

from __future__ import annotations

import math
import os
import time

from rich.console import Console

from ridgeline.data.mixture import Mixture
from ridgeline.errors import LayoutError, NotLearnt, RunError, RunFolderError
from ridgeline.launch.idle import tell_idle, wait_idle
from ridgeline.launch.local import (
    Life,
    local_processes,
    run_workers,
    started_by_launcher,
    threads_per_process,
)
from ridgeline.launch.stopping import (
    StopFlag,
    Wish,
    refuse_short_job,
    refuse_to_start,
    stop_asked,
)
from ridgeline.layout.arithmetic import check
from ridgeline.layout.grid import RankGrid
from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import chunks_of
from ridgeline.layout.trainable import trainable
from ridgeline.machine.device import device as device_named
from ridgeline.model.decoder import Decoder
from ridgeline.processes import process_start
from ridgeline.run import Run
from ridgeline.torch_compat import multiplies_fp8
from ridgeline.train.build import (
    MakeDecoder,
    MakeOptimizer,
    check_decoder,
    mixture_of,
    without_memory,
)
from ridgeline.train.float8 import check_float8
from ridgeline.train.folder import (
    check_folder,
    checkpoints_of,
    describe_environment,
    locked,
    write_folder,
)
from ridgeline.train.interval import check_interval
from ridgeline.train.loop import LossFunction
from ridgeline.train.manifest import complete, is_sound, read_manifest
from ridgeline.train.optimizer import adamw
from ridgeline.train.resolve import Host, resolve, this_host
from ridgeline.train.schedule import batch_unit
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import Outcome, baselines_of, work

LOCAL_RANKS_PER_CORE = 4


def train(
    run: Run,
    *,
    decoder: MakeDecoder = Decoder,
    loss: LossFunction = token_loss,
    optimizer: MakeOptimizer = adamw,
    stop: StopFlag | None = None,
) -> Outcome:
    """Train `run`, resuming what its folder holds; starts local processes when it needs several.

    `decoder(shape)` makes the model, `loss(logits_BLV, targets_BL)` sums over tokens, and
    `optimizer(model, settings)` makes the optimizer; with several processes they must be
    importable from a module or a script with an `if __name__ == "__main__":` guard.
    Raises the errors of `ridgeline.errors`, before any process starts wherever that is possible,
    Stopped when `stop` was set before the first step, and NotLearnt after everything is saved.
    """
    launched, stop, save_before_s = started_by_launcher(), stop or Wish(), run.faults.save_before_s
    began = process_start() if launched else time.time()
    refuse_short_job(save_before_s)
    world = int(os.environ["WORLD_SIZE"]) if launched else None
    host = this_host()
    resolved, reasons = resolve(run, host, world)
    assert isinstance(resolved.layout, Layout)
    processes = resolved.layout.world
    life = Life(stop, began, restarts_by_launcher(), layout_before(run, world))
    mixture = refuse_impossible(resolved, host, processes if life.layout_before else world)
    # A model that can only be planned raises here, too.
    check_decoder(without_memory(decoder, resolved.model), resolved.layout)
    arguments = (resolved, decoder, loss, optimizer)
    rank = int(os.environ["RANK"]) if launched else 0
    if launched:
        os.environ["WORLD_SIZE"] = str(processes)
    if rank >= processes:
        return Outcome(rank, wait_idle(stop), step=0, tokens=0, held_out_loss=None)
    if rank != 0:
        return work(*arguments, life)
    # Ranks of a launcher agree on it first: one that left would keep the others waiting.
    refuse_to_start(not launched and stop_asked(stop, save_before_s, decides=True)())
    threads = threads_per_process(local_processes() if launched else processes)
    with locked(resolved.path):
        check_folder(resolved)
        refuse_foreign_checkpoint(resolved, mixture)
        environment = describe_environment(str(host.device), processes, threads)
        write_folder(resolved, reasons, environment)
        _announce(resolved, reasons, local_processes() if launched else None)
        if launched or processes == 1:
            outcome = work(*arguments, life)
        else:
            outcome = run_workers(work, arguments, processes, stop, run.faults)
    if world and world > processes:
        tell_idle(outcome.complete)
    if outcome.complete:
        judge(resolved, outcome)
    return outcome


def restarts_by_launcher() -> tuple[str, ...]:
    """One word for each restart by the elastic agent that started this rank, if one did."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return ("a worker was lost, or the number of nodes changed",) * count


def layout_before(run: Run, world: int | None) -> str:
    """The layout that a run asks for, where its launcher has fewer devices and it goes on."""
    fewer = isinstance(run.layout, Layout) and world is not None and world < run.layout.world
    return str(run.layout) if fewer and run.faults.fewer_devices else ""


def refuse_foreign_checkpoint(run: Run, mixture: Mixture) -> None:
    """Raise when the run would resume from a checkpoint of other prepared data."""
    path = next((p for p in complete(checkpoints_of(run.path))[::-1] if is_sound(p)), None)
    if path and read_manifest(path).progress.data != mixture.fingerprint:
        raise RunFolderError(
            f"resuming {run.path}",
            f"its checkpoints were trained on other data than lie in {run.data.folder} now",
            f"prepare the data as they were, or --name {run.name}-2",
        )


def refuse_impossible(run: Run, host: Host, world: int | None) -> Mixture:
    """Raise for what can be known before any process starts and anything is written."""
    assert isinstance(run.layout, Layout)
    if not run.data.corpora:
        raise RunError(
            "training without data", "[[data.corpora]] names what to train on", "one corpus"
        )
    if run.cluster.device != "local":
        device_named(run.cluster.device)
    refuse_layout(run, run.layout, world)
    check_interval(run)
    if run.layout.precision == "fp8":
        check_float8(host.device, host.device.type != "cpu" and multiplies_fp8(host.device))
    room = host.devices or LOCAL_RANKS_PER_CORE * host.cores
    if world is None and run.layout.world > room:
        what = f"{host.devices or host.cores} {host.device.type if host.devices else 'CPU'} "
        what += "devices" if host.devices else "cores"
        raise LayoutError(
            f"layout '{run.layout}' on this machine",
            f"it needs {run.layout.world} devices and this machine has {what}",
            "start it on the cluster it is meant for, or --layout auto --cluster.devices 0",
        )
    mixture = mixture_of(run)
    for corpus in mixture.corpora:
        mixture.held_out(corpus.name, 1)  # now, not after the last step
    return mixture


def refuse_layout(run: Run, layout: Layout, world: int | None = None) -> None:
    """Raise LayoutError for a layout that no arithmetic or no program divides `run` by."""
    check(layout, run.model, run.sequence, batch_unit(run), world or run.cluster.devices or None)
    trainable(layout, run.model, run.sequence)


def judge(run: Run, outcome: Outcome) -> None:
    """Print the last held-out loss beside its baselines; NotLearnt when the run demands more."""
    baselines, margin = baselines_of(run, mixture_of(run)), run.evaluation.must_learn_nats
    if outcome.held_out_loss is None or baselines is None:
        return
    loss = outcome.held_out_loss
    if not math.isfinite(loss):
        raise NotLearnt(
            f"held-out loss {loss}", "the loss is no longer a number", "a lower optimizer.lr"
        )
    unigram, bigram = baselines.unigram_entropy, baselines.bigram_held_out_loss
    verdict = (
        f"held-out loss {loss:.3f} nats per token: {_beside(loss, unigram)} the unigram entropy "
        f"({unigram:.3f}), {_beside(loss, bigram)} a smoothed bigram model ({bigram:.3f})"
    )
    if margin is not None and not (loss <= unigram - margin and loss < bigram):
        raise NotLearnt(
            verdict,
            f"evaluation.must_learn_nats = {margin}: at least that far below the unigram entropy, "
            "and below the bigram model",
            "train longer, or look at the loss in report.html",
        )
    Console(highlight=False, soft_wrap=True).print(verdict, markup=False)


def _beside(loss: float, baseline: float) -> str:
    return f"{abs(baseline - loss):.3f} {'below' if loss <= baseline else 'above'}"


def _announce(run: Run, reasons: dict[str, str], node: int | None) -> None:
    """Say what is trained, how and why, and who sits where; `node`: ranks of a node, if known."""
    assert isinstance(run.layout, Layout)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"run {run.path}  model {run.model.name}  layout {run.layout}", markup=False)
    for name, reason in reasons.items():
        console.print(f"  {name}: {reason}", markup=False)
    for line in RankGrid(run.layout).describe(node):
        console.print(f"  {line}", markup=False)
    if run.layout.pipeline > 1:
        cuts = chunks_of(run.layout, run.model, run.sequence)
        layers = " ".join(str(len(chunk.layers)) for chunk in cuts)
        console.print(f"  layers of each chunk, along the model: {layers}", markup=False)
