"""Every example run file is rehearsed by the command, at its full size, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ridgeline.ledger import Calls

FILES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
MOST_BYTES = 4 * 2**30
REFUSED = {"fugaku-llm-13b": "2048 is not a multiple of 6"}
"""Published layouts that this trainer cannot run, and why."""
TOO_LARGE = {"llama3-405b-16384-h100"}
"""Do not fit, as the planner says too: the paper does not say how its activations did."""
FIELDS = {"fits", "validated_on", "stages", "seconds", "rss_bytes"}
OF_STAGE = {"stage", "rank", "peak_bytes", "by_component", "flops", "collectives"}


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[dict[Path, Future[tuple[int, str, str]]]]:
    """All of them, two at a time: each takes one core."""
    with ThreadPoolExecutor(2) as workers:
        yield {file: workers.submit(rehearsed, file) for file in FILES}


def rehearsed(file: Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    words = [sys.executable, "-m", "ridgeline", "rehearse", str(file), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.system
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_an_example_is_rehearsed(
    file: Path, rehearsals: dict[Path, Future[tuple[int, str, str]]]
) -> None:
    status, out, err = rehearsals[file].result()
    assert "Traceback" not in err
    if file.stem in REFUSED:
        assert (status, out) == (2, "")
        assert REFUSED[file.stem] in err
        return
    assert status == int(file.stem in TOO_LARGE), err
    check_answer(json.loads(out), status)


def check_answer(found: dict[str, Any], status: int) -> None:
    """The fields that `--json` promises, and that they agree with one another."""
    assert found.keys() >= FIELDS
    assert (status == 1) == (found["fits"] is False)
    assert found["rss_bytes"] <= MOST_BYTES
    assert [stage["stage"] for stage in found["stages"]] == list(range(len(found["stages"])))
    for stage in found["stages"]:
        assert stage.keys() >= OF_STAGE
        assert sum(stage["by_component"].values()) == stage["peak_bytes"] > 0
        assert min(stage["by_component"].values()) >= 0
        assert stage["flops"] > 0
        for axis, sent in stage["collectives"].items():
            assert axis in Calls.model_fields
            assert sent.keys() == {"count", "bytes"}
            assert sent["count"] > 0
            assert sent["bytes"] >= 0
