"""A pool of processes: reused between calls, replaced after a failure, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ridgeline.errors import LaunchError, ShardError
from ridgeline.launch.pool import Pool
from ridgeline.processes import is_alive

LONG_S = 60  # what a rank would sleep if it were left hanging


def who(answer: int) -> tuple[int, int, dict[str, str]]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return os.getpid(), answer, {name: os.environ[name] for name in names}


def total(value: float) -> float:
    """Sum over ranks of value · (rank + 1), by a group made and destroyed here."""
    dist.init_process_group("gloo")
    number = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(number)
    dist.destroy_process_group()
    return float(number)


def threads() -> int:
    return torch.get_num_threads()


def refuse(rank: int) -> None:
    """One rank refuses while the others wait for it in a collective."""
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ShardError("shard x", "1 + 1 = 2", "another")
    dist.barrier()


def stumble(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ZeroDivisionError("by nothing\nat all")
    dist.barrier()


def vanish(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_beside(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ShardError("the awake one", "", "")
    time.sleep(LONG_S)


def return_what_cannot_be_sent() -> Callable[[], None]:
    return lambda: None


def test_ranks_are_told_who_they_are_and_answer_in_their_order(pool: Pool) -> None:
    answers = pool.run(who, (42,), 3)
    assert [answer for _, answer, _ in answers] == [42] * 3
    for rank, (_, _, environment) in enumerate(answers):
        assert environment == {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3",
        }  # fmt: skip


def test_processes_are_reused_and_groups_are_not(pool: Pool) -> None:
    before = [process for process, *_ in pool.run(who, (0,), 3)]
    assert pool.run(total, (1.0,), 3) == [6.0] * 3
    assert pool.run(total, (10.0,), 2) == [30.0] * 2
    assert pool.run(total, (1.0,), 1) == [1.0]
    assert pool.run(total, (1.0,), 3) == [6.0] * 3
    assert [process for process, *_ in pool.run(who, (0,), 3)] == before
    assert [process for process, *_ in pool.run(who, (0,), 2)] == before[:2]


def test_each_rank_has_its_share_of_threads(pool: Pool) -> None:
    asked = os.environ["OMP_NUM_THREADS"]  # set by the tests' conftest, so workers keep to it
    assert pool.run(threads, (), 2) == [int(asked)] * 2


FAILURES: list[tuple[Callable[..., Any], type[Exception], str, str]] = [
    (refuse, ShardError, "shard x", "1 + 1 = 2"),
    (stumble, LaunchError, r"rank 1 \(process \d+\) died", "ZeroDivisionError: by nothing"),
    (vanish, LaunchError, r"rank 1 \(process \d+\) died", "exit code -9"),
    (sleep_beside, ShardError, "the awake one", ""),
]


@pytest.mark.parametrize(("function", "kind", "asked", "rule"), FAILURES)
def test_the_rank_that_failed_is_heard_at_once_and_the_pool_goes_on(
    pool: Pool, function: Callable[..., Any], kind: type[Exception], asked: str, rule: str
) -> None:
    before = {process for process, *_ in pool.run(who, (0,), 3)}
    start = time.monotonic()
    with pytest.raises(kind, match=asked) as raised:
        pool.run(function, (1,), 3)
    assert time.monotonic() - start < LONG_S / 2
    assert raised.value.args[1] == rule
    assert not any(map(is_alive, before))  # no rank is left hanging
    assert pool.run(total, (1.0,), 3) == [6.0] * 3


def test_an_answer_that_cannot_be_sent_is_an_error_and_not_a_wait(pool: Pool) -> None:
    with pytest.raises(LaunchError, match="rank 0"):
        pool.run(return_what_cannot_be_sent, (), 1)


def test_a_closed_pool_leaves_no_process(pool: Pool) -> None:
    assert pool is not None  # the fork server runs already, so this costs little
    with Pool() as own:
        processes = [process for process, *_ in own.run(who, (0,), 2)]
        assert all(map(is_alive, processes))
    assert not any(map(is_alive, processes))


SCRIPT = """
import os, time
from ridgeline.launch.pool import Pool

def tell():
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    Pool().run(tell, (), 2)
"""


def test_a_killed_parent_takes_its_busy_workers_with_it(tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    workers = [int(command.stdout.readline()) for _ in range(2)]
    assert all(map(is_alive, workers))
    command.kill()
    assert command.stdout.read() == ""  # workers hold the other end: it closes when they have ended
    command.wait()
