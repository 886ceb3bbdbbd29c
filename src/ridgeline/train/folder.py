"""The run folder: made once, resumed only by the same run, held by one job at a time.

runs/<name>/run.toml  run.2.toml …  environment.json  metrics.jsonl  checkpoints/  tensorboard/
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ridgeline.errors import (
    CorruptionError,
    HangError,
    LaunchError,
    NotLearnt,
    RidgelineError,
    RunFolderError,
)
from ridgeline.processes import is_alive
from ridgeline.run import Run, read_run

LOCK = "lock.json"
TOLD = (CorruptionError, HangError, LaunchError, NotLearnt)
"""Errors of a run that had begun: what it had told of itself stays."""


def checkpoints_of(folder: Path) -> Path:
    """Where a run's checkpoints lie."""
    return folder / "checkpoints"


def identity(run: Run) -> dict[str, Any]:
    """What must agree for one run to go on with another's folder: model, order of data, seed."""
    return {
        "model": run.model.model_dump(exclude={"source"}),
        "seed": run.seed,
        "sequence": run.sequence,
        "corpora": {corpus.name: corpus.weight for corpus in run.data.corpora},
        "global_batch": run.global_batch,
        "ramp": run.schedule.ramp.model_dump() if run.schedule.ramp else None,
    }


def latest_run_file(folder: Path) -> Path:
    """The newest of run.toml, run.2.toml, … in a run folder."""
    numbers = [path.name.split(".")[1] for path in folder.glob("run.*.toml")]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=1)
    return folder / (f"run.{newest}.toml" if newest > 1 else "run.toml")


def check_folder(run: Run) -> None:
    """Raise RunFolderError when the run's folder holds another run or something else."""
    folder = run.path
    if not folder.exists() or not any(path.name != LOCK for path in folder.iterdir()):
        return
    if not (folder / "run.toml").exists():
        raise RunFolderError(
            f"run folder {folder}", "it is not empty and holds no run.toml", "--name another"
        )
    there, here = identity(read_run(latest_run_file(folder))), identity(run)
    different = [
        f"{name}: {old!r} there, {new!r} here" for name, old, new in _differences("", there, here)
    ]
    if different:
        raise RunFolderError(
            f"run folder {folder} belongs to another run",
            "a run is resumed only when model, data, batch and seed agree; " + "; ".join(different),
            f"--name {run.name}-2",
        )


def _differences(prefix: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(f"{prefix}{key}.", old.get(key), new.get(key))
    elif old != new:
        yield prefix.rstrip("."), old, new


def write_folder(run: Run, reasons: Mapping[str, str], environment: Mapping[str, Any]) -> None:
    """Write the resolved run (as run.2.toml, … when it differs) and the environment."""
    folder = run.path
    checkpoints_of(folder).mkdir(parents=True, exist_ok=True)
    text = run.to_toml(reasons)
    target = folder / "run.toml"
    if target.exists():
        latest = latest_run_file(folder)
        here = {"folder": run.folder, "name": run.name}  # the folder may have been moved
        if read_run(latest).model_copy(update=here) == run:
            target = latest
        else:
            last = 1 if latest.name == "run.toml" else int(latest.name.split(".")[1])
            target = folder / f"run.{last + 1}.toml"
    write_atomically(target, text)
    write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name and rename it, so that readers see all or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this job. Raises RunFolderError when a living job holds it already."""
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    told = (os.environ.get(name) for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    job = next((each for each in told if each not in (None, "none")), None)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
    try:
        with lock.open("x", encoding="utf-8") as file:
            json.dump(me, file)
    except FileExistsError:
        holder = _holder(lock)
        # A job that goes on without the node of its first process holds the folder already.
        elsewhere = holder.get("host") != me["host"] and (job is None or holder.get("job") != job)
        here = holder.get("host") == me["host"] and is_alive(holder.get("pid"))
        if elsewhere or here:
            raise RunFolderError(
                f"run folder {folder} is held by process {holder.get('pid')} on "
                f"{holder.get('host')}",
                "one job at a time writes into a run folder",
                f"wait for it, or remove {lock} when that job is gone",
            ) from None
        write_atomically(lock, json.dumps(me))  # its holder died without cleaning up
    try:
        yield
    except (RidgelineError, KeyboardInterrupt) as error:
        # A run that was refused leaves nothing; one that had begun keeps what it had said.
        saved = any(checkpoints_of(folder).glob("step-*"))
        if created and not saved and not isinstance(error, TOLD):
            shutil.rmtree(folder)
        raise
    finally:
        lock.unlink(missing_ok=True)


def _holder(lock: Path) -> dict[str, Any]:
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def describe_environment(device: str, processes: int, threads: int) -> dict[str, Any]:
    """What a reader of the run folder needs to know of where and with what it ran."""
    return {
        "ridgeline": metadata.version("ridgeline"),
        "source_version": _source_version(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "tokenizers")},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "processes": processes,
        "threads": threads,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _source_version() -> str | None:
    """Commit of the checkout the package runs from, with '+' when it has changes."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        found = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
