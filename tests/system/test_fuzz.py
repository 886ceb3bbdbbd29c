"""Ten thousand spoilt run files, shards and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fuzzing import fuzz_checkpoints, fuzz_runs, fuzz_shards

from ridgeline.run import Run


@pytest.mark.system
def test_ten_thousand_spoilt_files_end_in_an_error_of_ours(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    (folder := tmp_path / "alone").mkdir()
    refused = {
        "run files": (4000, fuzz_runs(tiny_run(), folder, 4000)),
        "shards": (3000, fuzz_shards(tiny_run(), tmp_path, 3000)),
        "checkpoints": (3000, fuzz_checkpoints(tmp_path / "checkpoints", 3000)),
    }
    assert sum(cases for cases, _ in refused.values()) >= 10_000
    print({name: f"{number} of {cases} refused" for name, (cases, number) in refused.items()})
