"""The run folder: whose it is, who may write into it, and what is left after a refusal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.errors import LaunchError, RunFolderError
from ridgeline.run import Run, read_run
from ridgeline.train.folder import (
    LOCK,
    check_folder,
    describe_environment,
    latest_run_file,
    locked,
    write_atomically,
    write_folder,
)
from ridgeline.train.resolve import Host, resolve

MakeRun = Callable[..., Run]
HOST = Host(torch.device("cpu"), devices=0, cores=2, numa_domains=1, bf16=None)


def written(run: Run) -> Run:
    """`run`, resolved, after writing its folder."""
    resolved, reasons = resolve(run, HOST, None)
    resolved.path.mkdir(parents=True, exist_ok=True)
    write_folder(resolved, reasons, {"host": "here"})
    return resolved


def test_the_run_in_the_folder_is_the_run(tiny_run: MakeRun) -> None:
    run = written(tiny_run(layout="auto"))
    assert read_run(run.path / "run.toml") == run
    assert json.loads((run.path / "environment.json").read_text()) == {"host": "here"}
    assert (run.path / "checkpoints").is_dir()
    assert 'layout = "dp2' in (text := (run.path / "run.toml").read_text())
    assert "one process per NUMA domain" in text


def test_a_new_budget_or_layout_is_kept_as_the_next_run_file(tiny_run: MakeRun) -> None:
    run = written(tiny_run())
    assert latest_run_file(run.path).name == "run.toml"
    assert written(tiny_run()).path == run.path  # the same run again writes no second file
    assert sorted(p.name for p in run.path.glob("run*.toml")) == ["run.toml"]
    for number, changes in ((2, {"budget": {"steps": 9}}), (3, {"layout": "dp2 mb2 fp32"})):
        changed = tiny_run(**changes, cluster={"devices": 2} if number == 3 else {})
        check_folder(changed)
        again = written(changed)
        assert latest_run_file(run.path).name == f"run.{number}.toml"
        assert read_run(latest_run_file(run.path)) == again
    assert read_run(run.path / "run.toml") == run


@pytest.mark.parametrize("count", [10, 11])
def test_run_files_are_ordered_by_number(tmp_path: Path, count: int) -> None:
    for number in range(2, count + 1):
        (tmp_path / f"run.{number}.toml").touch()
    assert latest_run_file(tmp_path).name == f"run.{count}.toml"


OTHER_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 9}, "seed: 1 there, 9 here"),
    ({"model": {"layers": 3}}, "model.layers: 2 there, 3 here"),
    ({"model": {"rope_theta": 5e5}}, "model.rope_theta: 10000.0 there, 500000.0 here"),
    ({"data": {"sequence": 16}}, "sequence: 32 there, 16 here"),
    ({"schedule": {"global_batch": 16}}, "global_batch: 8 there, 16 here"),
    (
        {"schedule": {"ramp": {"start": 4, "increment": 4, "every_steps": 5}}},
        "ramp: None there, {'start': 4, 'increment': 4, 'every_steps': 5} here",
    ),
]


@pytest.mark.parametrize(("changes", "difference"), OTHER_RUNS)
def test_another_runs_folder_is_refused_with_the_difference(
    tiny_run: MakeRun, changes: dict[str, Any], difference: str
) -> None:
    run = written(tiny_run())
    before = sorted(run.path.rglob("*"))
    with pytest.raises(RunFolderError) as caught:
        check_folder(tiny_run(**changes))
    assert caught.value.rule.endswith("; " + difference)
    assert caught.value.remedy == "--name tiny-2"
    assert sorted(run.path.rglob("*")) == before


def test_other_corpora_or_weights_are_another_run(tiny_run: MakeRun) -> None:
    run = written(tiny_run())
    heavier = run.data.corpora[0].model_copy(update={"weight": 5.0})
    for corpora, difference in (
        ((heavier, run.data.corpora[1]), "corpora.code: 2.0 there, 5.0 here"),
        (run.data.corpora[:1], "corpora.prose: 1.0 there, None here"),
    ):
        data = run.data.model_copy(update={"corpora": corpora})
        with pytest.raises(RunFolderError) as caught:
            check_folder(run.model_copy(update={"data": data}))
        assert difference in caught.value.rule


def test_a_folder_of_something_else_is_refused(tiny_run: MakeRun) -> None:
    run = tiny_run()
    run.path.mkdir(parents=True)
    check_folder(run)  # an empty one is free
    (run.path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"not empty and holds no run\.toml"):
        check_folder(run)
    assert [p.name for p in run.path.iterdir()] == ["thesis.tex"]


def test_a_living_job_keeps_others_out(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "held"
    with locked(folder):
        holder = json.loads((folder / LOCK).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        with (
            pytest.raises(RunFolderError, match=f"held by process {os.getpid()} on"),
            locked(folder),
        ):
            raise AssertionError("two jobs in one folder")
        assert (folder / LOCK).exists()  # the one who was refused did not take it away
        (folder / "run.toml").touch()
    assert [p.name for p in folder.iterdir()] == ["run.toml"]


def test_a_job_on_another_host_keeps_others_out(tmp_path: Path) -> None:
    holder = {"host": "node0007", "pid": 1, "job": "4711"}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with pytest.raises(RunFolderError, match="process 1 on node0007"), locked(tmp_path):
        raise AssertionError("two jobs in one folder")


def test_the_lock_of_a_dead_job_is_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    holder = {"host": socket.gethostname(), "pid": dead.pid, "job": None}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_refusal_leaves_no_folder_behind_and_a_failure_keeps_what_was_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunFolderError), locked(folder):
        (folder / "checkpoints").mkdir()
        (folder / "run.toml").write_text("")
        raise RunFolderError("refused")
    assert not folder.exists()
    with pytest.raises(LaunchError), locked(folder):
        (folder / "metrics.jsonl").write_text("{}")
        raise LaunchError("a worker died")
    assert [p.name for p in folder.iterdir()] == ["metrics.jsonl"]
    with pytest.raises(RunFolderError), locked(folder):
        raise RunFolderError("refused, into a folder that was there")
    assert [p.name for p in folder.iterdir()] == ["metrics.jsonl"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "run.toml"
    write_atomically(target, "first")
    inode = target.stat().st_ino
    write_atomically(target, "sécond")
    assert target.read_text(encoding="utf-8") == "sécond"
    assert target.stat().st_ino != inode  # replaced, not written into
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


def test_the_environment_says_where_and_with_what() -> None:
    environment = describe_environment("cpu", processes=2, threads=1)
    assert environment["torch"] == torch.__version__
    assert environment["host"] == socket.gethostname()
    assert (environment["processes"], environment["threads"]) == (2, 1)
    assert environment["started"].endswith("+00:00")
    json.dumps(environment)


def test_a_moved_run_folder_keeps_its_run_file(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run()
    write_folder(run, {}, {})
    moved = run.model_copy(update={"name": "moved"})
    run.path.rename(moved.path)
    write_folder(moved, {}, {})
    assert sorted(path.name for path in moved.path.glob("run*.toml")) == ["run.toml"]
