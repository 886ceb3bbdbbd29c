"""Worker processes: what they return, which error the parent raises, and how many threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ridgeline.errors import LaunchError
from ridgeline.launch.local import local_processes, started_by_launcher, threads_per_process

# One script for all cases, because a fork server that has imported torch takes seconds to start.
SCRIPT = """
import json, os, sys, time
import torch, torch.distributed as dist
from ridgeline.errors import RidgelineError, ShardError
from ridgeline.launch.local import run_workers, warm_up
from ridgeline.train.agreement import Agreement

def fine(answer, stop):
    return answer, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def agree(stop):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    agreement = Agreement(dist.new_group(backend="gloo"))
    said = [agreement.report(rank == 1 and step == 1, rank + step) for step in range(4)]
    agreement.settle()
    everyone = [None, None]
    dist.all_gather_object(everyone, said)
    dist.destroy_process_group()
    return everyone

def refuse(stop):
    if os.environ["RANK"] == "1":
        raise ShardError("shard x", "1 + 1 = 2", "another")
    time.sleep(60)

def refuse_both(stop):
    raise ShardError(f"shard of rank {os.environ['RANK']}", "", "")

def vanish(stop):
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(60)

def stumble(stop):
    if os.environ["RANK"] == "0":
        raise ZeroDivisionError("by nothing")
    time.sleep(60)

def case(function, *arguments):
    start = time.monotonic()
    try:
        told = {"returned": run_workers(function, arguments, 2)}
    except RidgelineError as error:
        told = {"kind": type(error).__name__, "words": error.args}
    return told | {"seconds": time.monotonic() - start}

if __name__ == "__main__":
    warm_up()
    told = {"fine": case(fine, 42)}
    for function in (agree, refuse, refuse_both, vanish, stumble):
        told[function.__name__] = case(function)
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the script saw, by case."""
    script = tmp_path_factory.mktemp("script") / "workers.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_rank_0s_answer_comes_back(told: dict[str, dict[str, Any]]) -> None:
    assert told["fine"]["returned"] == [42, 0, 2]


def test_ranks_agree_on_the_largest_report_of_the_step_before(
    told: dict[str, dict[str, Any]],
) -> None:
    expected = [[False, 0.0], [False, 1.0], [True, 2.0], [False, 3.0]]
    assert told["agree"]["returned"] == [expected, expected]


def test_a_ranks_own_error_is_raised_in_the_parent(told: dict[str, dict[str, Any]]) -> None:
    assert told["refuse"]["kind"] == "ShardError"
    assert told["refuse"]["words"] == ["shard x", "1 + 1 = 2", "another"]
    assert told["refuse_both"]["kind"] == "ShardError"
    assert told["refuse_both"]["words"][0] in ("shard of rank 0", "shard of rank 1")


@pytest.mark.parametrize(
    ("case", "rank", "rule"), [("vanish", 1, "7"), ("stumble", 0, "by nothing")]
)
def test_a_rank_that_dies_is_named_with_its_reason(
    told: dict[str, dict[str, Any]], case: str, rank: int, rule: str
) -> None:
    assert told[case]["kind"] == ("WorkerLost" if case == "vanish" else "LaunchError")
    asked, why, _ = told[case]["words"]
    assert asked.startswith(f"rank {rank} (process ")
    assert rule in why


def test_the_other_ranks_are_ended_at_once(told: dict[str, dict[str, Any]]) -> None:
    for case in ("refuse", "vanish", "stumble"):  # the other rank would have slept for a minute
        assert told[case]["seconds"] < 30


def test_a_launcher_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not started_by_launcher()
    assert local_processes() == 1
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert started_by_launcher()
    for value in (None, "many"):
        if value is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        with pytest.raises(LaunchError, match="LOCAL_WORLD_SIZE"):
            local_processes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_processes() == 8


def test_threads_are_the_share_of_the_cores_or_what_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_per_process(1) == cores
    assert threads_per_process(cores) == 1
    assert threads_per_process(100 * cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_process(8) == 3
