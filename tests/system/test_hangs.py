"""Hangs under a launcher and in other layouts: who is late is named once, and the run ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train.test_watchdog import LIMIT_S, SCRIPT, hung

from ridgeline.run import Run

MakeRun = Callable[..., Run]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.system
@pytest.mark.parametrize(
    ("layout", "kind", "launcher"),
    [
        ("dp2 mb2 fp32", "endless", TORCHRUN),
        ("dp2 mb2 fp32", "stopped", TORCHRUN),
        ("pp2 mb2 fp32", "endless", ()),
        ("tp2 mb2 fp32", "endless", ()),
        ("dp2 mb2 zero3 fp32", "stopped", ()),
    ],
)
def test_the_late_rank_is_named_once(
    layout: str, kind: str, launcher: tuple[str, ...], tiny_run: MakeRun
) -> None:
    run = tiny_run(layout=layout, budget={"steps": 40}, faults={"step_limit_s": LIMIT_S})
    ended = hung(run, kind, *launcher)
    assert len(re.findall(r"late: rank 1 on \S+ \(process \d+\)\n", ended.said)) == 1, ended.said
    assert ended.named_after_s < LIMIT_S + 5, ended.said
    assert ended.status != 0


@pytest.mark.system
@pytest.mark.parametrize("late", [0, 1])
def test_without_an_agent_even_the_rank_that_holds_the_store_is_named(
    late: int, tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = tiny_run(layout="dp2 mb2 fp32", budget={"steps": 40}, faults={"step_limit_s": LIMIT_S})
    (tmp_path / "run.toml").write_text(run.to_toml(), encoding="utf-8")
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    words = [sys.executable, str(SCRIPT), str(tmp_path / "run.toml"), "stopped", str(late)]
    ranks = [
        subprocess.Popen(
            words,
            env={**os.environ, **job, "MASTER_PORT": port, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [each.communicate(timeout=120)[0] for each in ranks]
    assert ranks[1 - late].returncode == 75, said
    assert ranks[late].returncode == -signal.SIGKILL, said
    told = [len(re.findall(rf"late: rank {late} on \S+ ", each)) for each in said]
    assert told == [late, 1 - late], said
