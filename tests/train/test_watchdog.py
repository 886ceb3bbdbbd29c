"""A rank that hangs is named, with its line, and the run ends; real processes that really hang."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ridgeline.run import Run

MakeRun = Callable[..., Run]
LIMIT_S = 8.0  # on a busy machine, a start takes more than a few seconds
SCRIPT = Path(__file__).with_name("slow_loss.py")
START_AGAIN = 75


class Ended(NamedTuple):
    """How a run whose rank 1 was late ended."""

    status: int
    named_after_s: float
    """From the moment at which the rank was late to the words that name it."""
    said: str
    run: Run


def hung(run: Run, kind: str, *launcher: str) -> Ended:
    """Train `run` with rank 1 late from its fourth step on."""
    run.path.parent.mkdir(parents=True)
    file = run.path.parent / "run.toml"
    file.write_text(run.to_toml(), encoding="utf-8")
    words = [sys.executable, *launcher, str(SCRIPT), str(file), kind, "1"]
    said, late, named = [], 0.0, 0.0
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as command:
        assert command.stdout is not None
        for line in command.stdout:
            said.append(line)
            late = time.monotonic() if "from now on late" in line else late
            named = time.monotonic() if "error: longer than" in line else named
        status = command.wait(timeout=60)
    print(f"{kind}: named after {named - late:.1f} s")
    return Ended(status, named - late, "".join(said), run)


@pytest.fixture
def hanging_run(tiny_run: MakeRun) -> MakeRun:
    """A run of two ranks whose steps may take only so long."""
    return lambda **changes: tiny_run(
        **{
            "layout": "dp2 mb2 fp32",
            "budget": {"steps": 40},
            "faults": {"step_limit_s": LIMIT_S},
            **changes,
        }
    )


def test_a_rank_stopped_by_a_signal_is_named_with_its_line_in_time(hanging_run: MakeRun) -> None:
    ended = hung(hanging_run(), "stopped")
    named = re.search(
        r"late: rank 1 on \S+ \(process \d+\)\n"
        r"  rule: rank 1 after step \d in forward at \S+/slow_loss.py:(\d+) loss.*"
        r"its last heartbeat, (\d+\.\d) s old, and it answers no more; "
        r"rank 0 in gloo:all\w+ over (data|all ranks), its call \d+",
        ended.said,
    )
    assert named is not None, ended.said
    assert "two heartbeats" in SCRIPT.read_text().splitlines()[int(named[1]) - 1]
    assert 0.5 < float(named[2]) < LIMIT_S + 5
    assert ended.named_after_s < LIMIT_S + 5, ended.said
    assert ended.status == START_AGAIN
    assert "Traceback" not in ended.said
    living = (ended.run.path / "stacks" / "rank-0.txt").read_text()
    assert "loop.py" in living and "train_loop" in living


def test_a_rank_in_an_endless_loop_is_named_with_its_live_stack(hanging_run: MakeRun) -> None:
    ended = hung(hanging_run(), "endless")
    assert re.search(r"late: rank 1 on \S+ \(process \d+\)\n", ended.said), ended.said
    assert "rank 0 in gloo:all" in ended.said
    assert ended.status == START_AGAIN
    assert ended.named_after_s < LIMIT_S + 5, ended.said
    live = (ended.run.path / "stacks" / "rank-1.txt").read_text()
    at = re.search(r'slow_loss.py", line (\d+) in loss', live)
    assert at is not None, live
    around = SCRIPT.read_text().splitlines()[int(at[1]) - 2 : int(at[1])]
    assert any("endless" in line for line in around)


def test_a_rank_that_works_longer_is_named_with_its_host(
    tiny_run: MakeRun, rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    run = tiny_run(layout="dp2 mb2 fp32", budget={"steps": 12}, logging={"every_steps": 2})
    ended = hung(run, "slow")
    assert ended.status == 0, ended.said
    (event,) = (row for row in rows_of(run, "event") if row["event"] == "straggler")
    assert (event["rank"], event["host"]) == (1, socket.gethostname())
    assert event["busy_s"] > 2 * event["median_s"]
    assert "rank 1 on" in ended.said and "is slow" in ended.said
    spreads = [row["ranks_busy_s"] for row in rows_of(run, "ranks_busy_s")]
    assert all(each["slowest_rank"] == 1 and each["most"] > each["least"] for each in spreads)


# As `ridgeline train`, each rank from prepared data of its own, as on disks of nodes.
OWN_DATA = """
import os, sys
from ridgeline.cli import main
sys.argv[1:] = ["train", sys.argv[1], "--data.folder", f"{sys.argv[2]}-{os.environ['RANK']}"]
main()
"""


def with_damage_on(rank: int, run: Run, folder: Path) -> list[str]:
    """The command that trains `run` where the tokens of one of two ranks' data are damaged."""
    for each in (0, 1):
        shutil.copytree(run.data.folder, folder / f"data-{each}")
    for tokens in (folder / f"data-{rank}").rglob("*train*.bin"):
        tokens.write_bytes(b"\xff" * tokens.stat().st_size)
    (folder / "own_data.py").write_text(OWN_DATA, encoding="utf-8")
    (folder / "run.toml").write_text(run.to_toml(), encoding="utf-8")
    return [str(folder / name) for name in ("own_data.py", "run.toml", "data")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_data_error_of_one_rank_is_what_all_say_when_nobody_supervises_them(
    rank: int, tiny_run: MakeRun, tmp_path: Path
) -> None:
    words = with_damage_on(rank, tiny_run(layout="dp2 mb2 fp32"), tmp_path)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **job, "MASTER_PORT": port, "RANK": str(each)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in (0, 1)
    ]
    said = [each.communicate(timeout=120)[0] for each in ranks]
    assert [each.returncode for each in ranks] == [2, 2], said
    assert "holds the token 65,535" in said[rank] and "failed first" not in said[rank], said
    assert f"error: rank {rank} failed first: " in said[1 - rank], said
    assert "Traceback" not in "".join(said) and "onnection" not in "".join(said), said
