"""Spoilt run files, shards and checkpoints end in one of our errors; few cases of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzzing import fuzz_checkpoints, fuzz_runs, fuzz_shards

from ridgeline.run import Run

CASES = 150


def test_spoilt_run_files_end_in_an_error_of_ours(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    (folder := tmp_path / "alone").mkdir()
    assert CASES / 3 < fuzz_runs(tiny_run(), folder, CASES) < CASES


def test_spoilt_shards_end_in_an_error_of_ours(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    assert fuzz_shards(tiny_run(), tmp_path, CASES) > CASES / 3


def test_spoilt_checkpoints_end_in_an_error_of_ours(tmp_path: Path) -> None:
    assert fuzz_checkpoints(tmp_path / "checkpoints", CASES) > CASES / 3
