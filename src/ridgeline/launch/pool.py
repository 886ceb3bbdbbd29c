"""Worker processes that are started once and run one call after another, as its ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Self

from ridgeline import errors
from ridgeline.launch.local import died_of, end_with_parent, threads_per_process, warm_up

OTHERS_S = 0.2
"""How long a failed call listens to its other ranks, to learn which of them failed first."""


@dataclass(frozen=True)
class _Failure:
    """What a rank says before it dies; `at_s`: the machine's monotonic clock."""

    at_s: float
    error: errors.RidgelineError


@dataclass(frozen=True)
class _Worker:
    process: ForkServerProcess
    connection: Connection


class Pool:
    """Worker processes of this machine, forked from a server that has imported torch.

    They are started by the first call that needs as many and reused by the next ones, which saves
    the seconds of starting. They end with `close`, at the end of a `with` block, or with this
    process, however it ends.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], arguments: Sequence[Any], world: int) -> list[Any]:
        """Call `function(*arguments)` as each of `world` ranks; what they return, by rank.

        The ranks find the variables that PyTorch's elastic agent sets (RANK, WORLD_SIZE,
        LOCAL_RANK, MASTER_ADDR, …) and a store of this call alone behind them, so
        `init_process_group` works and must be undone by `destroy_process_group`. `function`,
        its arguments and results go through multiprocessing: importable, picklable.

        When a rank raises or dies, the call ends at once, and every process is replaced before
        the next. Raises the RidgelineError of the rank that failed first, or LaunchError with what
        another error said.
        """
        from ridgeline.torch_compat import TCPStore

        self._start(world)
        # Held here, because a port that rank 0 is told to open could be taken meanwhile.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        try:
            for rank, worker in enumerate(self._workers[:world]):
                environment = _environment(rank, world, store.port)
                worker.connection.send((function, tuple(arguments), environment))
            return self._answers(world)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; another `run` would start new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self, world: int) -> None:
        missing = world - len(self._workers)
        if missing > 0:
            warm_up()
        for _ in range(missing):
            context = multiprocessing.get_context("forkserver")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()  # so that the worker's death closes its end
            self._workers.append(_Worker(process, here))

    def _answers(self, world: int) -> list[Any]:
        """What every rank returned; raises the first failure."""
        ranks = {worker.connection: rank for rank, worker in enumerate(self._workers[:world])}
        answers: list[Any] = [None] * world
        failures: list[_Failure] = []
        while ranks and (ready := wait(list(ranks), OTHERS_S if failures else None)):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks.pop(connection)
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = self._death(rank)
                if isinstance(answer, _Failure):
                    failures.append(answer)
                answers[rank] = answer
        if failures:
            raise min(failures, key=lambda failure: failure.at_s).error
        return answers

    def _death(self, rank: int) -> _Failure:
        """A rank that died without a word did so before the others complained of its silence."""
        process = self._workers[rank].process
        process.join()
        error = errors.LaunchError(
            f"rank {rank} (process {process.pid}) died",
            f"exit code {process.exitcode}",
            "what it said stands above",
        )
        return _Failure(0.0, error)


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch's env:// and `ridgeline.launch.local` read."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 joins the store, it does not open one
    }


def _serve(connection: Connection) -> None:
    """A worker: answer calls until one fails, or until the parent closes or dies."""
    import torch

    from ridgeline.torch_compat import forget_meshes

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # by which a parent's exit ends it
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments, environment = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        torch.set_num_threads(threads_per_process(int(environment["LOCAL_WORLD_SIZE"])))
        try:
            connection.send(function(*arguments))
            forget_meshes()  # the next call's groups are others
        except errors.RidgelineError as error:
            connection.send(_Failure(time.monotonic(), error))
            raise SystemExit(error.exit_status) from None
        except BaseException as error:
            at_s = time.monotonic()
            died = died_of(int(environment["RANK"]), os.getpid(), error)
            connection.send(_Failure(at_s, died))
            raise
