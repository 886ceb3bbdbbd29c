"""Worker processes on this machine, under PyTorch's elastic agent.

Workers fork from a server that has imported torch already, so two of them start as fast as one.
The agent never handles SIGINT or SIGTERM: the parent passes a wish to stop on to the workers
through an event, they agree on the step, save, and end by themselves.
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
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from ridgeline import errors

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAST_WORDS_S = 1.0
"""How long a rank that failed stays, so that the parent sees one that died without a word first.

Gone at once, it would take the others with it, who then complain of lost connections.
"""
WORD = "word.json"
"""The file in which a rank says what it died of."""
PRELOADED = ["torch", "torch.distributed", "ridgeline.train.worker"]


class StopFlag(Protocol):
    """A wish to stop that other processes see, such as a multiprocessing Event."""

    def is_set(self) -> bool:
        """Whether somebody wishes to stop."""

    def set(self) -> None:
        """Wish to stop."""


def warm_up() -> None:
    """Start the fork server, which imports torch beside this process, not after it.

    It and its workers inherit that SIGINT is blocked: Ctrl-C reaches every process of a terminal,
    and the parent alone passes it on. Here it is only held back, so that none is lost.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    multiprocessing.resource_tracker.ensure_running()  # it would unblock what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
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


def run_workers(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> Any:
    """Call `function(*arguments, stop)` in `processes` ranks; what rank 0 returns.

    Raises the RidgelineError that a rank raised first, or LaunchError when one died otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for chatty in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    stop = multiprocessing.get_context("forkserver").Event()
    with tempfile.TemporaryDirectory(prefix="ridgeline-") as folder, stop_on_signals(stop):
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
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGHUP,SIGQUIT",
        )
        try:
            returned = elastic_launch(config, _guarded)(function, arguments, stop)
        except ChildFailedError as failure:
            raise _first_error(failure, Path(folder)) from None
    return returned[0]


def _guarded(function: Callable[..., Any], arguments: tuple[Any, ...], stop: StopFlag) -> Any:
    """Call `function` in a worker; what it raises is left for the parent to raise again."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        return function(*arguments, stop)
    except Exception as error:
        leave_word(error)
        time.sleep(LAST_WORDS_S)
        if isinstance(error, errors.RidgelineError):
            raise SystemExit(error.exit_status) from None
        raise


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
    """What a rank says when something other than a RidgelineError ends it."""
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return errors.LaunchError(
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


@contextmanager
def stop_on_signals(stop: StopFlag) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` instead of ending this process: a wish to end after a step."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _first_error(failure: ChildFailedError, faults: Path) -> errors.RidgelineError:
    """The error of the rank that failed first, as it was raised there.

    A rank that left no word died before those that complain of it; unless they found it stopped,
    and ended it.
    """
    rank, first = failure.get_first_failure()
    told = [json.loads(path.read_text()) for path in faults.rglob(WORD)]
    hangs = [record for record in told if record["kind"] == errors.HangError.__name__]
    if not hangs and rank not in {record["rank"] for record in told}:
        return errors.LaunchError(
            f"rank {rank} (process {first.pid}) died",
            f"exit code {first.exitcode}",
            "what it said stands above",
        )
    record = min(hangs or told, key=lambda each: int(each["at_ns"]))
    sys.stderr.write(record["trace"])
    return error_of(record)
