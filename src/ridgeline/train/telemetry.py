"""Numbers of a run: where a step's time went, the console line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ridgeline import human
from ridgeline.run import Run
from ridgeline.torch_compat import peak_memory_bytes
from ridgeline.train.folder import write_atomically
from ridgeline.train.manifest import Progress
from ridgeline.train.schedule import run_fraction, total_steps


class Span(NamedTuple):
    """One stay in a phase, by `time.perf_counter`."""

    phase: str
    start_s: float
    end_s: float


@dataclass
class Clock:
    """Host seconds by phase since the last `take`.

    On an accelerator kernels run behind the host, so only the sum over a step is device time; in
    the few steps that are timed finely, `settle` makes the host wait for the device where a phase
    begins and ends.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    inside: str = ""
    """The phase that runs now."""
    settle: Callable[[], None] | None = None
    spans: list[Span] | None = None
    """Where it is a list, each stay in a phase is noted there."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`; within another phase it is that one's."""
        if self.inside:
            yield
            return
        if self.settle:
            self.settle()
        start, self.inside = time.perf_counter(), name
        try:
            yield
        finally:
            if self.settle:
                self.settle()
            end, self.inside = time.perf_counter(), ""
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start
            if self.spans is not None:
                self.spans.append(Span(name, start, end))

    @contextmanager
    def between(self, name: str) -> Iterator[None]:
        """A phase between two steps: no lap counts its time."""
        start = time.perf_counter()
        with self.phase(name):
            yield
        self.started += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        lap, self.started = now - self.started, now
        return lap

    def take(self) -> dict[str, float]:
        """The seconds so far, and start again."""
        taken, self.seconds = self.seconds, {}
        return taken


@dataclass(frozen=True)
class Observation:
    """One step's numbers, the whole model's and alike on all ranks; tensors on the device."""

    progress: Progress
    loss: Tensor
    grad_norm: Tensor
    lr: float
    bad: Tensor
    """1 where the step was left out, else 0."""


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: the allocator's on an accelerator, resident on CPU."""
    peak = peak_memory_bytes(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


class Recorder:
    """Rank 0's ears and mouth: one line per logged step to the console and to the run folder."""

    def __init__(
        self, run: Run, device: torch.device, flops_per_token: float, peak_flops: float | None
    ) -> None:
        self.run = run
        self.device = device
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.console = Console(highlight=False, soft_wrap=True)
        self.metrics = (run.path / "metrics.jsonl").open("a", encoding="utf-8")
        self.since = (0, time.perf_counter())
        self.tokens_before = 0
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(run.name, total=1.0)
        self.tensorboard: Any = None

    def start(self, progress: Progress) -> None:
        """Begin timing at `progress`."""
        self.since = (progress.step, time.perf_counter())
        self.tokens_before = progress.tokens
        self.bar.start()

    def event(self, progress: Progress, name: str, **fields: Any) -> None:
        """Write an event to metrics.jsonl."""
        self.write({"step": progress.step, "event": name} | fields)

    def tell(self, progress: Progress, told: Iterable[tuple[str, str]]) -> None:
        """What befell checkpoints: the events' names and words."""
        for name, words in told:
            self.event(progress, name, words=words)
            self.say(f"checkpoint {name}: {words}")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object, and the Unix time, to metrics.jsonl; no finite number: null there."""
        row = _finite(row) | {"time": round(time.time(), 3)}
        self.metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self.metrics.flush()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False)

    def step(
        self,
        seen: Observation,
        loss: float,
        seconds: dict[str, float],
        busy_s: Sequence[float] | None = None,
    ) -> None:
        """Log a step: `loss` is the mean over the global batch; `seconds` since the last one.

        `busy_s`: each rank's seconds of work per step, if known.
        """
        progress, now = seen.progress, time.perf_counter()
        steps = progress.step - self.since[0]
        span = now - self.since[1]
        tokens_per_s = (progress.tokens - self.tokens_before) / span
        peak = self.peak_flops
        mfu = tokens_per_s * self.flops_per_token / (peak * self.devices) if peak else None
        seconds["other"] = max(0.0, span - sum(seconds.values()))
        row = {
            "step": progress.step,
            "loss": loss,
            "grad_norm": float(seen.grad_norm),
            "lr": seen.lr,
            "tokens": progress.tokens,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "memory_bytes": memory_bytes(self.device),
            "step_s": span / steps,
            "seconds": {phase: value / steps for phase, value in seconds.items()},
        }
        if busy_s:
            most_s = max(busy_s)
            spread = {"least": min(busy_s), "median": statistics.median(busy_s), "most": most_s}
            row["ranks_busy_s"] = spread | {"slowest_rank": busy_s.index(most_s)}
        self.since, self.tokens_before = (progress.step, now), progress.tokens
        self.write(row)
        self.say(self.line(row, progress))
        self.bar.update(self.task, completed=self.fraction(progress))
        if self.run.logging.tensorboard:
            for name in ("loss", "grad_norm", "lr", "tokens_per_s", "step_s"):
                self.board().add_scalar(f"train/{name}", row[name], progress.step)

    def held_out(self, progress: Progress, mean: float, losses: dict[str, float], s: float) -> None:
        """Log an evaluation that took `s` seconds."""
        parts = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self.write(
            {
                "step": progress.step,
                "held_out_loss": mean,
                "held_out": losses,
                "seconds": {"evaluation": s},
            }
        )
        self.say(f"step {progress.step:,}: held-out loss {mean:.3f}   ({parts})")
        self.since = (self.since[0], self.since[1] + s)  # tokens/s counts training only
        if self.run.logging.tensorboard:
            self.board().add_scalar("held_out/loss", mean, progress.step)

    def line(self, row: dict[str, Any], progress: Progress) -> str:
        """The console's line for one logged step, aligned, in human units."""
        total = total_steps(self.run)
        of = f"/{total:,}" if total else ""
        width = 2 * len(f"{total:,}") + 1 if total else 7
        count = f"{progress.step:,}{of}"
        mfu = human.DASH if row["mfu"] is None else f"{row['mfu']:.0%}"
        return (
            f"step {count:>{width}}  loss {row['loss']:6.3f}  grad {row['grad_norm']:5.2f}  "
            f"lr {human.scientific(row['lr'])}  {human.short(row['tokens_per_s']):>6} tok/s  "
            f"MFU {mfu:>3}  "
            f"{human.size(row['memory_bytes']):>8}  eta {self.eta(progress)}"
        )

    def fraction(self, progress: Progress) -> float:
        """Share of the budget done."""
        return run_fraction(self.run, progress.step, progress.elapsed_s)

    def eta(self, progress: Progress) -> str:
        """Time left at the pace so far."""
        done = self.fraction(progress)
        return human.duration(progress.elapsed_s * (1 - done) / done if done else None)

    def board(self) -> Any:
        """The TensorBoard writer; imported at its first use, after the first step is on screen."""
        if self.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.run.path / "tensorboard"))
        return self.tensorboard

    @property
    def devices(self) -> int:
        """Devices of the run."""
        layout = self.run.layout
        return 1 if layout == "auto" else layout.world

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.stop()
        self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lost(NamedTuple):
    """What a run did beyond the checkpoint it resumes from, as far as it had written it down."""

    steps: int
    seconds: float | None
    """From the checkpoint's row to the last one; None where a row does not say its time."""


def drop_after(metrics: Path, step: int) -> Lost | None:
    """Remove the rows of steps beyond `step`: they are of a future that a resumed run repeats.

    Returns what is repeated; None where nothing is.
    """
    if not metrics.exists():
        return None
    kept, last, end = [], {}, {"step": step}
    for line in metrics.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed run
        if row["step"] <= step:
            kept.append(line + "\n")
            last = row
        else:
            end = row
    write_atomically(metrics, "".join(kept))
    if end["step"] == step:
        return None
    times = last.get("time"), end.get("time")
    seconds = times[1] - times[0] if times[0] is not None and times[1] is not None else None
    return Lost(end["step"] - step, seconds)
