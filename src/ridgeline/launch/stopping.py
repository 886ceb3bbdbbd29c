"""Wishes to stop: signals, and the coming end of a batch job.

Nothing here ends a process: a wish is a flag, which all ranks agree on, save, and end by.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from ridgeline.errors import RunError, Stopped

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What users, batch systems and closing terminals send to a run that should end."""


class StopFlag(Protocol):
    """A wish to stop."""

    def is_set(self) -> bool:
        """Whether somebody wishes to stop."""

    def set(self) -> None:
        """Wish to stop."""


class Wish:
    """A wish to stop within this process.

    Not a threading.Event: a second signal that comes while the first one's handler holds its lock
    would wait for it forever.
    """

    def __init__(self) -> None:
        self.made = False

    def is_set(self) -> bool:
        """Whether somebody wishes to stop."""
        return self.made

    def set(self) -> None:
        """Wish to stop."""
        self.made = True


@dataclass(frozen=True)
class StopFile:
    """A wish to stop that other processes of this machine see: a file that is there.

    Not a multiprocessing.Event: a process killed while it asks would keep its lock forever.
    """

    path: Path

    def is_set(self) -> bool:
        """Whether somebody wishes to stop."""
        return self.path.exists()

    def set(self) -> None:
        """Wish to stop."""
        self.path.touch()


@contextmanager
def stop_on_signals(*flags: StopFlag, within_s: float | None = None) -> Iterator[None]:
    """The signals of `SIGNALS` set `flags` instead of ending this process, and say so.

    `within_s`: how long ending may take, where it is known. What `nohup` ignores stays ignored.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    limit = "" if within_s is None else f", which may take up to {within_s:g} s"

    def handler(number: int, frame: FrameType | None) -> None:
        hear(number, *flags)
        if speaks:
            name = signal.Signals(number).name
            line = f"{name}: ending after this step, with a checkpoint{limit}\n"
            with contextlib.suppress(OSError):  # nobody listens any more: the wish counts
                os.write(2, line.encode())

    wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def listen(stop: StopFlag, agent: int) -> None:
    """Wait for blocked signals, in a thread of a worker, and set `stop` when one comes.

    SIGTERM from process `agent` means that another worker died: this one ends at once, wherever
    its main thread hangs. The same from anybody else is a wish to stop, as every signal.
    """
    while True:
        told = signal.sigwaitinfo(SIGNALS)
        if told.si_signo == signal.SIGTERM and told.si_pid == agent:
            os._exit(1)
        hear(told.si_signo, stop)


def hear(number: int, *flags: StopFlag) -> None:
    """Set `flags`; after SIGHUP, what can no longer be written to becomes /dev/null.

    A run whose terminal was closed would otherwise fail at its next line instead of saving.
    """
    for flag in flags:
        flag.set()
    if number == signal.SIGHUP:
        for stream in (1, 2):
            try:
                os.write(stream, b"")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def deadline(save_before_s: float) -> float:
    """Unix time at which to save and stop, so long before the batch job ends; inf where none does.

    SLURM_JOB_END_TIME is the Unix time of SLURM's limit, in every job step of SLURM 21 and later.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - save_before_s if end.isdecimal() else math.inf


def refuse_short_job(save_before_s: float) -> None:
    """Raise RunError for a batch job that is no longer than what its end is kept free for.

    Asked to be started again, as a job that merely ends soon is, it would be so forever.
    """
    start = os.environ.get("SLURM_JOB_START_TIME", "")
    if start.isdecimal() and deadline(save_before_s) <= float(start):
        length_s = deadline(save_before_s) + save_before_s - float(start)
        raise RunError(
            f"training in a job of {length_s:g} s",
            f"the run saves and stops faults.save_before_s = {save_before_s:g} s before its end: "
            f"{length_s:g} - {save_before_s:g} leaves nothing to train",
            f"a longer job, or --faults.save_before_s {length_s / 10:g}",
        )


def stop_asked(stop: StopFlag, save_before_s: float, decides: bool) -> Callable[[], bool]:
    """Whether `stop` is wished, or the job ends soon by the clock of the process that `decides`."""
    end = deadline(save_before_s) if decides else math.inf
    return lambda: stop.is_set() or time.time() >= end


def refuse_to_start(asked: bool) -> None:
    """Raise Stopped when one `asked` to stop before anything was trained."""
    if asked:
        raise Stopped(
            "stopped before the first step",
            "a signal came, or the job's time limit is near; nothing was trained since the start, "
            "so there is nothing to save",
            "the same command again",
        )


def end_agent() -> None:
    """End the elastic agent of another program that started this rank, once a run has stopped.

    To the agent every exit status but 0 is a failure, after which it would start the run again.
    """
    told = os.environ.get
    left = int(told("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        told("TORCHELASTIC_RESTART_COUNT", "0")
    )
    if left > 0 and told("LOCAL_RANK") == "0" and os.getppid() > 1:
        os.kill(os.getppid(), signal.SIGTERM)
