"""Runs that are stopped and killed at random moments: in the end they are the run that was not."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.launch.commands import (
    Watched,
    check_every_sample_was_read_once,
    hit,
    processes_of,
    wait_for_none,
    workers_of,
)

from ridgeline.layout.layout import Layout
from ridgeline.run import Run
from ridgeline.train.manifest import read_manifest

MakeRun = Callable[..., Run]
StartCommand = Callable[..., subprocess.Popen[str]]
LastTensors = Callable[[Run], dict[str, bytes]]
RowsOf = Callable[..., list[dict[str, Any]]]
SIGNALS = 20
KILLS = 50
WHOLE = 10  # of them, of the whole command or of its first process
STEPS = 400
FOUR = {
    "layout": "dp2 pp2 mb1 fp32",
    "schedule": {"global_batch": 8, "warmup_steps": 2},
    "budget": {"steps": STEPS},
    "evaluation": {"sequences": 2},
    "checkpoint": {"every_steps": 2},
    "logging": {"samples": True},
    "faults": {"restarts": KILLS},
}


def start(start_command: StartCommand, run: Run, *words: object) -> Watched:
    file = run.path.parent / f"{run.name}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run.to_toml())
    return Watched(start_command("train", file, *words))


@pytest.mark.system
def test_signals_at_random_moments_end_in_time_with_a_checkpoint_or_with_nothing(
    tiny_run: MakeRun, start_command: StartCommand, rows_of: RowsOf
) -> None:
    choose, counts, slowest_s = random.Random(20), Counter[str](), 0.0
    changes = {**FOUR, "layout": "dp2 mb1 fp32", "budget": {"steps": 100_000}}
    for number in range(SIGNALS):
        run = tiny_run(name=f"run-{number}", **changes)
        command = start(start_command, run)
        if number % 4:  # at any moment of the start, or while it trains
            command.wait_for(r"step +\d+/") if number % 2 else command.wait_for("run ")
        time.sleep(choose.uniform(0.0, 1.5))
        sent, at = choose.choice(WISHES), time.time()
        if choose.random() < 0.5:
            os.killpg(command.process.pid, sent)
        else:
            os.kill(command.process.pid, sent)
        status, said = command.end(), command.said
        wait_for_none(command.process.pid)
        assert "Traceback" not in said, said
        if not run.path.exists():  # nothing half-written
            # Python itself was still starting, or the command had not come to its verb.
            early = not said and status in (-sent, 130)
            assert early or (status == 75 and "before the first step" in said), (status, said)
            counts["before the first step" if status == 75 else "before the command"] += 1
            continue
        assert status == 75, said
        newest = max((run.path / "checkpoints").iterdir())
        took_s = (newest / "manifest.json").stat().st_mtime - at
        assert not [path.name for path in newest.parent.iterdir() if "partial" in path.name]
        saves = [r["seconds"] for r in rows_of(run, "event") if r["event"] == "checkpoint"]
        steps = [row["step_s"] for row in rows_of(run, "step_s")]
        assert took_s < max(saves) + max(steps) + 2.0, (took_s, max(saves), max(steps))
        slowest_s = max(slowest_s, took_s)
        counts["after it"] += 1
        if number == SIGNALS - 1 or counts["after it"] == 1:
            command = start(start_command, run, "--budget.steps", int(newest.name[5:]) + 1)
            assert command.end() == 0, command.said
    assert counts["before the first step"] >= 3
    assert counts["after it"] >= 3
    print(f"{SIGNALS} signals: {dict(counts)}; the slowest checkpoint came after {slowest_s:.2f} s")


WISHES = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def strike(command: Watched, run: Run, choose: random.Random, seen: int, number: int) -> str:
    """Kill at a random moment: what was hit."""
    moment = number % 5
    if moment == 0:  # while it starts
        time.sleep(choose.uniform(0.0, 2.0))
    else:
        seen = command.wait_for(r"step +\d+/", seen)
        command.wait_for(r"step +\d+/", seen + choose.randrange(4))
    what = "starting" if moment == 0 else "training"
    if moment > 2:
        end = time.monotonic() + 10
        while time.monotonic() < end and command.thread.is_alive():
            if any((run.path / "checkpoints").glob(".step-*.partial")):
                what = "writing a checkpoint"
                break
    if number % (KILLS // WHOLE) == 2:
        if number % 2:
            return what * hit(command.process.pid, signal.SIGKILL, os.killpg)
        return what * hit(command.process.pid, signal.SIGKILL)
    workers = workers_of(command.process.pid)
    return what * bool(workers and hit(choose.choice(workers), signal.SIGKILL))


@pytest.mark.system
def test_50_kills_at_random_moments_end_bit_identical_with_every_token_seen_once(
    tiny_run: MakeRun, start_command: StartCommand, last_tensors: LastTensors, rows_of: RowsOf
) -> None:
    whole = tiny_run(name="whole", **FOUR)
    command = start(start_command, whole)
    assert command.end() == 0, command.said
    run, choose = tiny_run(**FOUR), random.Random(50)
    counts: Counter[str] = Counter()
    commands, seen = 1, 0
    command = start(start_command, run)
    while counts.total() < KILLS:
        seen = len(command.lines)
        what = strike(command, run, choose, seen, counts.total())
        if what:
            counts[what] += 1
        if not processes_of(command.process.pid) or command.process.poll() is not None:
            assert command.end() == -signal.SIGKILL, command.said  # not of itself
            wait_for_none(command.process.pid)
            command = start(start_command, run)
            commands += 1
    assert command.end() == 0, command.said
    events = Counter(row["event"] for row in rows_of(run, "event"))
    assert counts["writing a checkpoint"] >= 5
    assert events["restarted"] >= KILLS // 3
    assert last_tensors(run) == last_tensors(whole)
    check_every_sample_was_read_once(run, STEPS)
    print(f"{KILLS} kills: {dict(counts)}; {commands} commands, {events['restarted']} restarts")


@pytest.mark.system
def test_a_run_whose_second_node_is_lost_goes_on_on_the_first(
    tiny_run: MakeRun, tmp_path: Path, rows_of: RowsOf
) -> None:
    """Two elastic agents on this machine, each with two ranks, stand for two nodes."""
    run = tiny_run(**{**FOUR, "layout": "dp4 mb1 fp32", "budget": {"steps": 200}})
    (tmp_path / "run.toml").write_text(run.to_toml())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
    words += ["--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", endpoint, "--rdzv-id", "lost-node", "--local-addr", "localhost"]
    quick = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=2"
    words += ["--rdzv-conf", quick, "-m", "ridgeline", "train", str(tmp_path / "run.toml")]
    nodes = []
    for _ in range(2):
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        nodes.append(Watched(process))
        time.sleep(1.0)  # the first one opens the store
    while not (run.path / "checkpoints").is_dir() or not any(
        (run.path / "checkpoints").glob("step-*")
    ):
        assert nodes[0].thread.is_alive(), nodes[0].said
        time.sleep(0.1)
    for child in processes_of(nodes[1].process.pid) | children_of(nodes[1].process.pid):
        hit(child, signal.SIGKILL)
    try:
        assert nodes[0].end() == 0, nodes[0].said
    finally:
        for child in [*children_of(nodes[0].process.pid), nodes[0].process.pid]:
            hit(child, signal.SIGKILL)
    assert "fewer devices: 'dp2 fp32' instead of 'dp4 fp32'" in nodes[0].said
    events = [row for row in rows_of(run, "event") if row["event"] == "fewer devices"]
    assert (events[-1]["layout"], events[-1]["asked"]) == ("dp2 fp32", "dp4 fp32")
    assert read_manifest(max((run.path / "checkpoints").iterdir())).progress.samples == 200 * 8
    left = run.model_copy(update={"layout": Layout.model_validate("dp2 mb1 fp32")})
    check_every_sample_was_read_once(left, 200)


def children_of(process: int) -> dict[int, int]:
    """Living children of a process, which may lead groups of their own."""
    file = Path(f"/proc/{process}/task/{process}/children")
    if not file.exists():
        return {}
    return {int(child): process for child in file.read_text().split()}
