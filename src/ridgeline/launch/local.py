"""Worker processes on this machine, under PyTorch's elastic agent.

Workers fork from a server that has imported torch already, so two of them start as fast as one.
The agent handles no signal that means to stop: the parent passes the wish on to the workers through
a file, they agree on the step, save, and end by themselves. When one is lost, all start again under
a new agent, from the newest checkpoint: the agent's own restarts would repeat every error.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline import errors
from ridgeline.launch.stopping import SIGNALS, StopFile, StopFlag, Wish, listen, stop_on_signals
from ridgeline.run import Faults

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAST_WORDS_S = 1.0
"""How long a rank that failed stays, so that the parent sees one that died without a word first.

Gone at once, it would take the others with it, who then complain of lost connections.
"""
LATE = "late"
"""File that is there when workers were killed because they stopped too slowly."""
WORD = "word.json"
"""The file in which a rank says what it died of."""
PRELOADED = ["torch", "torch.distributed", "ridgeline.train.worker"]


@dataclass(frozen=True)
class Life:
    """What a start of a run's processes knows of its command and of the starts before it."""

    stop: StopFlag
    began: float
    """Unix time since which it starts: the command's, or the loss's that it follows."""
    lost: tuple[str, ...] = ()
    """Why each start before it ended."""
    layout_before: str = ""
    """The layout asked for, where fewer devices are left than it needs."""


def warm_up() -> None:
    """Start the fork server, which imports torch beside this process, not after it.

    It and its workers inherit that signals are blocked: what is sent to a whole group of processes
    must not end them; workers listen for it. Here it is only held back, so that none is lost.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the tracker's start unblocks some
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def started_by_launcher() -> bool:
    """Whether torchrun or another launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_processes() -> int:
    """Processes of this run on this machine, as the launcher says; 1 without a launcher."""
    if not started_by_launcher():
        return 1
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not told.isdecimal():
        raise errors.LaunchError(
            "starting under a launcher",
            f"RANK and WORLD_SIZE are set but LOCAL_WORLD_SIZE is {told!r}",
            "torchrun, which sets all three, or none of them",
        )
    return int(told)


def threads_per_process(processes: int) -> int:
    """Threads for each of `processes` on this machine: OMP_NUM_THREADS, else its share of cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else max(1, len(os.sched_getaffinity(0)) // processes)


def run_workers(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    processes: int,
    stop: StopFlag | None = None,
    faults: Faults | None = None,
) -> Any:
    """Call `function(*arguments, life)` in `processes` ranks; what rank 0 returns.

    Lost workers are started again as often as `faults` allows; left out: never. Raises the
    RidgelineError that a rank raised first, or LaunchError when one died otherwise.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    faults, stop = faults or Faults(restarts=0), stop or Wish()
    began, lost = time.time(), list[str]()
    while True:
        with tempfile.TemporaryDirectory(prefix="ridgeline-") as name:
            folder, file = Path(name), StopFile(Path(name, "stop"))
            limit_s = faults.stop_within_s
            with stop_on_signals(stop, file, within_s=limit_s), _ended_within(limit_s, file):
                if stop.is_set():
                    file.set()
                given = (function, arguments, Life(file, began, tuple(lost)), folder)
                try:
                    return _run_agent(given, processes, folder)
                except ChildFailedError as failure:
                    error = _first_error(failure, folder, limit_s)
        if stop.is_set() or not error.passes or len(lost) == faults.restarts:
            raise error
        began = time.time()
        lost.append(f"{error.asked}: {error.rule}")
        again = f"{lost[-1]}; all start again from the newest checkpoint"
        print(f"{again} ({len(lost)} of {faults.restarts} times)", flush=True)


def _run_agent(given: tuple[Any, ...], processes: int, folder: Path) -> Any:
    """Call `_guarded(*given)` in `processes` ranks under an agent; what rank 0 returns."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for chatty in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    warm_up()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        signals_to_handle="SIGQUIT",  # the others are handled already, and must not end the agent
    )
    return elastic_launch(config, _guarded)(*given)[0]


def _guarded(
    function: Callable[..., Any], arguments: tuple[Any, ...], life: Life, folder: Path
) -> Any:
    """Call `function` in a worker; what it raises is left for the parent to raise again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in every thread: one listens for them
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with_parent, daemon=True).start()
    threading.Thread(target=listen, args=(life.stop, parent.pid), daemon=True).start()
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    try:
        return function(*arguments, life)
    except Exception as error:
        leave_word(error)
        time.sleep(LAST_WORDS_S)
        if isinstance(error, errors.RidgelineError):
            raise SystemExit(error.exit_status) from None
        raise


@contextmanager
def _ended_within(seconds: float, stop: StopFile) -> Iterator[None]:
    """Kill the workers, whose numbers lie beside `stop`, when they stop too slowly."""
    ended = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if ended.wait(0.2):
                return
        if ended.wait(seconds):
            return
        (stop.path.parent / LATE).touch()
        while not ended.wait(0.2):  # those that were only starting, too
            for file in stop.path.parent.glob("*.pid"):
                with suppress(ProcessLookupError, ValueError):  # gone, or not yet written
                    os.kill(int(file.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def leave_word(error: Exception) -> None:
    """Write down what this rank dies of where the parent will look: beside the agent's own file.

    A process without such a parent has nowhere to leave it, and says it itself.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        partial = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name("word.partial")
        partial.write_text(json.dumps(record_of(error)))
        partial.rename(partial.with_name(WORD))


def record_of(error: Exception) -> dict[str, Any]:
    """What this rank dies of, and when, by the machine's monotonic clock."""
    rank = int(os.environ.get("RANK", "0"))
    record: dict[str, Any] = {"at_ns": time.monotonic_ns(), "rank": rank, "trace": ""}
    if not isinstance(error, errors.RidgelineError):
        record["trace"] = "".join(traceback.format_exception(error))
        error = died_of(rank, os.getpid(), error)
    return record | {"kind": type(error).__name__, "words": error.args}


def error_of(record: Mapping[str, Any]) -> errors.RidgelineError:
    """The error that a rank wrote down."""
    error: errors.RidgelineError = getattr(errors, record["kind"])(*record["words"])
    return error


def died_of(rank: int, process: int, error: BaseException) -> errors.LaunchError:
    """What a rank says when something other than a RidgelineError ends it.

    PyTorch raises RuntimeError for what devices and connections do; other kinds but OSError are
    mistakes of a program, which it makes again.
    """
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    outside = isinstance(error, RuntimeError | OSError)
    return (errors.WorkerLost if outside else errors.LaunchError)(
        f"rank {rank} (process {process}) died", words, "its traceback stands above"
    )


def end_with_parent() -> None:
    """End this process at once when the one that started it dies.

    Otherwise workers of a killed command would train on unseen, into a folder that the next
    command takes over, and at their end wait for the dead forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _first_error(
    failure: ChildFailedError, faults: Path, stop_within_s: float
) -> errors.RidgelineError:
    """The error of the rank that failed first, as it was raised there.

    A rank that left no word died before those that complain of it; unless they found it stopped,
    and ended it.
    """
    if (faults / LATE).exists():
        return errors.LaunchError(
            "workers that were asked to stop were ended",
            f"they took longer than faults.stop_within_s = {stop_within_s:g} s",
            "a larger one; the newest checkpoint is whole",
        )
    rank, first = failure.get_first_failure()
    told = [json.loads(path.read_text()) for path in faults.rglob(WORD)]
    hangs = [record for record in told if record["kind"] == errors.HangError.__name__]
    if not hangs and rank not in {record["rank"] for record in told}:
        return errors.WorkerLost(
            f"rank {rank} (process {first.pid}) died",
            f"exit code {first.exitcode}",
            "what it said stands above",
        )
    record = min(hangs or told, key=lambda each: int(each["at_ns"]))
    sys.stderr.write(record["trace"])
    return error_of(record)
