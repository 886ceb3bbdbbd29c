"""Is rehearsed memory what real processes take? `python bench/rehearse_memory.py [LAYOUT ...]`

Every layout trains two steps, four times over, each time in fresh processes of this machine:

- tracked: the ranks talk over gloo, watched by the rehearsal's tracker; the second step's peak,
  without copies that gloo makes of what it reduces and scatters;
- gloo: what the peak is higher by with them (no other backend makes them);
- allocator: one rank alone, on real tensors, with a process group that answers nobody; what
  PyTorch's profiler says that its allocator holds, without the tracker. Over gloo the profiler
  misses what gloo's threads free;
- resident: the ranks talk over gloo and nobody watches; the most that the kernel counted, less what
  it counted after the same layout of a model too small to matter: code is loaded when it is first
  needed, and libraries keep buffers of their own;
- mapped: the same, in processes whose C library maps every block of 128 KiB or more by itself and
  gives it back when it is freed. By default glibc raises that bound to whatever was freed, up to
  32 MiB (mallopt(3), M_MMAP_THRESHOLD), and keeps what is smaller in a heap with holes.

A row is of the fullest stage's first rank. Ratios: tracked over rehearsed; allocator over tracked;
resident and mapped over tracked with gloo's copies; the processor's seconds of a step mapped over
those as it is.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

import ridgeline
from ridgeline.data.prepare import prepare
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.run import Data, Run, make_run
from ridgeline.torch_compat import fake_process_group
from ridgeline.train.build import make_job
from ridgeline.train.loop import Job, train_loop
from ridgeline.train.manifest import Progress
from ridgeline.train.messages import groups_of
from ridgeline.train.optimizer import adamw
from ridgeline.train.owners import Owners
from ridgeline.train.tracker import Tracker
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group

LAYOUTS = (
    "mb2 fp32", "mb4 full fp32", "mb2 bf16", "dp2 mb2 zero1 fp32", "dp2 mb1 zero2 selective bf16",
    "dp2 mb2 zero3 fp32", "tp2 mb2 fp32", "cp2 mb2 fp32", "pp2 mb1 1f1b fp32",
    "pp2 mb1 zbh1 fp32", "dp2 tp2 mb2 zero1 fp32", "pp2 v2 dp2 mb1 1f1b zero1 fp32",
    "dp2 tp2 pp2 mb1 zero1 fp32", "dp8 mb1 zero3 fp32",
)  # fmt: skip
VOCAB, SEQUENCE = 8192, 128
MODEL = {
    "layers": 4, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn_hidden": 1408, "vocab": VOCAB,
    "max_sequence": SEQUENCE,
}  # fmt: skip
"""21 million parameters: 16 bytes each are 340 MB."""
SMALL = MODEL | {"hidden": 32, "ffn_hidden": 32, "vocab": 320}
STEP = "second step"
COLUMNS = ("rehearsed", "tracked", "gloo", "allocator", "resident", "mapped")
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 128 * 1024
"""glibc's malloc.h, and its own bound before it raises it."""


def prepared(folder: Path) -> Data:
    """A corpus of a few words, tokenized."""
    choose, source = random.Random(0), folder / "words.jsonl"
    words = ["the", "rank", "gathers", "weights", "reduces", "gradients", "and", "waits"]
    texts = (" ".join(choose.choices(words, k=400)) for _ in range(60))
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    corpora = [{"name": "words", "sources": [str(source)]}]
    values = {"folder": folder / "prepared", "corpora": corpora, "sequence": SEQUENCE, "workers": 1}
    data = Data.model_validate(values)
    prepare(data, 320, seed=0)
    return data


def run_of(data: Data, layout: str, model: dict[str, Any] = MODEL) -> Run:
    """Two steps of eight sequences."""
    return make_run(
        {
            "model": model, "layout": layout, "data": data.model_dump(mode="json"),
            "schedule": {"global_batch": 8, "warmup_steps": 1}, "budget": {"steps": 2},
        }
    )  # fmt: skip


def job_of(run: Run) -> Job:
    """This rank, ready to train."""
    device = torch.device("cpu")
    return make_job(run, Decoder, token_loss, adamw, device, None, lambda: False)


def two_steps(job: Job, between: Callable[[], None]) -> None:
    """Train, and call `between` after each step."""
    train_loop(job, Progress(), lambda _: between(), lambda *_: (False, None))


def tracked(run: Run) -> tuple[int, int]:
    """The most bytes of tensors at any moment of this rank's second step: without, with gloo's."""
    with process_group():
        job = job_of(run)
        tracker, begun = Tracker(groups_of(job.mesh)), []
        with tracker.watching(job.pipeline.chunks.values()):
            Owners(tracker, job.pipeline)
            two_steps(job, lambda: begun.append(tracker.mark()))
    first = begun[0].events
    return highest(tracker, first, gloo=False), highest(tracker, first, gloo=True)


def highest(tracker: Tracker, first: int, gloo: bool) -> int:
    """The most bytes after `first` events. A storage first seen by being split is gloo's own."""
    now = most = 0
    for place, (storage, more) in enumerate(tracker.events):
        if gloo or not tracker.made_by[storage][0].startswith("aten::split"):
            now += more
        if place >= first:
            most = max(most, now)
    return most


def allocated(run: Run, rank: int) -> int:
    """The most bytes that PyTorch's allocator held in the second step of `rank`."""
    assert isinstance(run.layout, Layout)
    with fake_process_group(rank, run.layout.world), profile(profile_memory=True) as seen:
        job = job_of(run)
        steps: list[Any] = []

        def between() -> None:
            if steps:
                steps.pop().__exit__(None, None, None)
            else:
                steps.append(record_function(STEP))
                steps[0].__enter__()

        two_steps(job, between)
    return most_allocated(seen)


def most_allocated(seen: profile) -> int:
    """The most bytes that the allocator held while STEP lasted, of what it gave meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        seen.export_chrome_trace(str(file))
        rows = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    (step,) = (row for row in rows if row["name"] == STEP and row.get("cat") == "user_annotation")
    now = most = 0
    for row in sorted((r for r in rows if r["name"] == "[memory]"), key=lambda row: row["ts"]):
        now += row["args"]["Bytes"]
        if step["ts"] <= row["ts"] <= step["ts"] + step["dur"]:
            most = max(most, now)
    return most


@dataclass(frozen=True)
class Resident:
    """What the kernel counts of a process."""

    grown_bytes: int
    """Its most, over what it had after a model too small to matter."""
    processor_s: float
    """Of the second step, all threads."""


def resident(run: Run, small: Run, mapped: bool) -> Resident:
    """Train unwatched, `small` before; `mapped`: with large blocks mapped by themselves."""
    if mapped:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    with process_group():
        two_steps(job_of(small), lambda: None)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most is now
        before, seconds = most_resident(), []
        two_steps(job_of(run), lambda: seconds.append(time.process_time()))
        return Resident(most_resident() - before, seconds[1] - seconds[0])


def most_resident() -> int:
    """Bytes."""
    words = Path("/proc/self/status").read_text(encoding="ascii").split()
    return int(words[words.index("VmHWM:") + 1]) * 1024


@dataclass(frozen=True)
class Row:
    """Bytes of one rank."""

    layout: str
    rank: int
    rehearsed: float
    tracked: int
    gloo: int
    allocated: int
    resident: Resident
    mapped: Resident

    def __str__(self) -> str:
        most = self.resident.grown_bytes, self.mapped.grown_bytes
        sizes = (self.rehearsed, self.tracked, self.gloo, self.allocated, *most)
        ratios = (
            self.tracked / self.rehearsed,
            self.allocated / self.tracked,
            *(size / (self.tracked + self.gloo) for size in most),
            self.mapped.processor_s / self.resident.processor_s,
        )
        return f"{self.layout:34} {self.rank:4} " + " ".join(
            [*(f"{size / 1e6:10.2f}" for size in sizes), *(f"{ratio:7.3f}" for ratio in ratios)]
        )


def row_of(run: Run, small: Run) -> Row:
    """Rehearse `run`, and train it four times."""
    assert isinstance(run.layout, Layout)
    stage = ridgeline.rehearse(run).fullest
    world, rank = run.layout.world, stage.rank
    peaks: list[tuple[int, int]] = fresh(tracked, (run,), world)
    plain: list[Resident] = fresh(resident, (run, small, False), world)
    mapped: list[Resident] = fresh(resident, (run, small, True), world)
    return Row(
        layout=str(run.layout),
        rank=rank,
        rehearsed=stage.peak_bytes - stage.by_component["framework"],
        tracked=peaks[rank][0],
        gloo=peaks[rank][1] - peaks[rank][0],
        allocated=fresh(allocated, (run, rank), 1)[0],
        resident=plain[rank],
        mapped=mapped[rank],
    )


def fresh(function: Callable[..., Any], arguments: tuple[Any, ...], world: int) -> list[Any]:
    """What `function` returns on each rank of new processes."""
    with Pool() as pool:
        return pool.run(function, arguments, world)


@contextmanager
def corpus() -> Iterator[Data]:
    """Prepared data, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        yield prepared(Path(folder))


def main() -> None:
    """Print a row per layout."""
    head = [f"{name:>10}" for name in COLUMNS]
    head += [f"{name:>7}" for name in ("tr/re", "al/tr", "rs/tr", "mp/tr", "cpu")]
    print(f"{'MB (10⁶ bytes)':34} {'rank':>4} " + " ".join(head), flush=True)
    with corpus() as data:
        for layout in sys.argv[1:] or LAYOUTS:
            print(row_of(run_of(data, layout), run_of(data, layout, SMALL)), flush=True)
    print(f"{platform.platform()}, PyTorch {metadata.version('torch')}")


if __name__ == "__main__":
    main()
