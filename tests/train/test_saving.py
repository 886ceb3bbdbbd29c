"""Writing checkpoints: beside training, on a node's own disk first, and when there is no room."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.saved import WAITING, bits, blank, some_tensors, write, written

import ridgeline
from ridgeline.errors import CheckpointError
from ridgeline.launch.pool import Pool
from ridgeline.run import Checkpoint, Run
from ridgeline.train.checkpoint import load
from ridgeline.train.exchange import broadcast, gather, scatter, share
from ridgeline.train.manifest import (
    FILES_PER_FOLDER,
    MANIFEST,
    Progress,
    file_of,
    keep_newest,
    newest,
    remove_partial,
)
from ridgeline.train.saving import Saver, drain_left, write_safetensors
from ridgeline.train.worker import process_group


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As good as a full disk: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("settings", [WAITING, Checkpoint()], ids=["waiting", "beside"])
def test_a_write_that_fails_leaves_the_checkpoint_before_it(
    tmp_path: Path, settings: Checkpoint
) -> None:
    first, large = written(tmp_path), {"large": torch.zeros(2**20)}
    with no_file_beyond(2**16):
        failed = write(tmp_path, large, Progress(step=4), settings=settings)
    assert failed.error is not None and "rank 0" in failed.error and "large" in failed.error
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    load(first, there := blank(some_tensors()))
    assert bits(there) == bits(some_tensors())
    second = write(tmp_path, large, Progress(step=4), settings=settings)
    assert second.error is None
    assert newest(tmp_path) == second.path


def test_a_folder_that_is_a_file_is_told_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    failed = write(tmp_path / "checkpoints", some_tensors(), Progress(step=4))
    assert failed.error is not None and "Not a directory" in failed.error
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_training_goes_on_with_other_values_while_a_copy_is_written(tmp_path: Path) -> None:
    """The writer is held back until the state has changed: what is written is what was."""
    tensors, held = some_tensors(), threading.Event()
    saver = Saver(tmp_path, Checkpoint(), None)
    write_now = saver._write

    def write_late(*arguments: Any) -> tuple[str | None, int]:
        assert held.wait(60)
        return write_now(*arguments)

    saver._write = write_late  # type: ignore
    assert saver.save(Progress(step=1), tensors) is None
    assert saver.poll() is None
    before = bits(tensors)
    for value in tensors.values():
        value.zero_()
    held.set()
    saved = saver.finish()
    assert saved is not None and saved.error is None
    load(saved.path, there := blank(tensors))
    assert bits(there) == before
    assert saver.poll() is None  # told once


def test_the_next_checkpoint_waits_for_the_one_before_and_tells_of_it(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Checkpoint(), None)
    saver.save(Progress(step=1), some_tensors())
    before = saver.save(Progress(step=2), some_tensors())
    assert before is not None and before.progress.step == 1
    last = saver.finish()
    assert last is not None and last.progress.step == 2


def test_files_are_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in some_tensors().items()}
    write_safetensors(tmp_path / "ours.safetensors", list(tensors), list(tensors.values()))
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(tensors)


def test_a_checkpoint_is_hardly_larger_than_the_state(tmp_path: Path) -> None:
    state = {f"layer.{n}": torch.randn(512, 256) for n in range(8)}
    path = write(tmp_path, state, Progress(step=1)).path
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert on_disk <= 1.02 * sum(value.nbytes for value in state.values())


def test_files_in_a_folder_are_bounded() -> None:
    names = [file_of(rank) for rank in range(3 * FILES_PER_FOLDER)]
    folders = {name.partition("/")[0] for name in names}
    assert len(set(names)) == len(names)
    assert len(folders) == 3


def test_only_the_newest_and_the_permanent_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 35):
        written(tmp_path, step)
    keep_newest(tmp_path, 2, permanent_every=20)
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["20", "30", "35"]
    keep_newest(tmp_path, 1)
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["35"]


def test_what_an_interrupted_write_left_is_removed(tmp_path: Path) -> None:
    whole = written(tmp_path)
    (tmp_path / ".step-00000200.partial").mkdir()
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    anything: Any = {"setting": "text"}
    with pytest.raises(CheckpointError, match="only tensors"):
        write(tmp_path, anything, Progress(step=1))
    assert newest(tmp_path) is None


def test_a_nodes_own_disk_comes_first_and_keeps_the_last_one(tmp_path: Path) -> None:
    shared, local = tmp_path / "shared", tmp_path / "local"
    for step in (1, 2):
        assert write(shared, some_tensors(step), Progress(step=step), local=local).error is None
    assert sorted(path.name[-1] for path in shared.iterdir()) == ["1", "2"]
    assert [path.name[-1] for path in local.iterdir()] == ["2"]
    load(shared / "step-00000002", there := blank(some_tensors()))
    assert bits(there) == bits(some_tensors(2))


def test_what_a_killed_run_had_only_on_its_disk_is_brought_over(tmp_path: Path) -> None:
    shared, local = tmp_path / "shared", tmp_path / "local"
    write(shared, some_tensors(2), Progress(step=2), local=local)
    shutil.rmtree(shared / "step-00000002")
    written(shared, 1)
    assert drain_left(local, shared, None) == "step-00000002"
    load(shared / "step-00000002", there := blank(some_tensors()))
    assert bits(there) == bits(some_tensors(2))
    assert drain_left(local, shared, None) is None  # nothing is newer


def test_a_run_made_anew_leaves_another_runs_disks_alone(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = tiny_run(checkpoint={"local": str(tmp_path / "disk")})
    assert ridgeline.train(run).step == 4
    shutil.rmtree(run.path / "checkpoints" / "step-00000004")
    assert ridgeline.train(run).step == 4  # from the disk: nothing is left to train
    rows = (run.path / "metrics.jsonl").read_text()
    assert rows.count('"loss"') == 4 and '"drained"' in rows
    shutil.rmtree(run.path)
    assert ridgeline.train(run).step == 4
    assert (run.path / "metrics.jsonl").read_text().count('"loss"') == 4  # all of it anew


@pytest.mark.parametrize("lost", [MANIFEST, file_of(0)])
def test_what_lacks_a_part_is_left_on_its_disk(tmp_path: Path, lost: str) -> None:
    shared, local = tmp_path / "shared", tmp_path / "local"
    write(shared, some_tensors(2), Progress(step=2), local=local)
    shutil.rmtree(shared / "step-00000002")
    (local / "step-00000002" / lost).unlink()
    assert drain_left(local, shared, None) is None
    assert not list(shared.iterdir())


def test_a_full_disk_of_a_node_is_told_as_well(tmp_path: Path) -> None:
    large = {"large": torch.zeros(2**20)}
    with no_file_beyond(2**16):
        failed = write(tmp_path / "shared", large, Progress(step=4), local=tmp_path / "local")
    assert failed.error is not None
    assert newest(tmp_path / "shared") is None


def exchanged() -> list[Any]:
    """As each rank: what every kind of message brings."""
    with process_group() as (_, group):
        rank = int(os.environ["RANK"])
        mine = {"rank": rank, "text": "é" * (10 * rank)}
        parts = [[number] * (number + 1) for number in range(3)] if rank == 0 else None
        return [
            share(mine, group), gather(mine, group), broadcast(mine, group), scatter(parts, group),
        ]  # fmt: skip


def test_ranks_exchange_values_of_any_length(pool: Pool) -> None:
    every = [{"rank": rank, "text": "é" * (10 * rank)} for rank in range(3)]
    for rank, (shared, gathered, sent, part) in enumerate(pool.run(exchanged, (), 3)):
        assert shared == every
        assert gathered == (every if rank == 0 else None)
        assert sent == every[0]
        assert part == [rank] * (rank + 1)


def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(
    tiny_run: Callable[..., Run], rows_of: Callable[..., list[dict[str, Any]]], capsys: Any
) -> None:
    """The folder of checkpoints is a file until step 3; those of steps 4 and 5 are there."""
    from ridgeline.model.decoder import Decoder
    from ridgeline.train.vocabulary import token_loss

    run = tiny_run(budget={"steps": 5}, checkpoint={"every_steps": 1})
    folder, calls = run.path / "checkpoints", 0

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            folder.rmdir()
            folder.write_text("")
        if calls == 3 * 2 + 1:  # two micro-batches a step
            folder.unlink()
        return token_loss(logits, targets)

    assert ridgeline.train(run, decoder=Decoder, loss=loss).complete
    failed = [row["step"] for row in rows_of(run, "words")]
    assert failed and set(failed) <= {1, 2, 3}
    assert newest(folder) == folder / "step-00000005"
    assert "WARNING: no checkpoint of step" in capsys.readouterr().out
