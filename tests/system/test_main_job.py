"""The main job and the README, as a new user meets them: a fresh clone, Python and make."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


def shell_blocks(text: str) -> list[str]:
    """The commands of the fenced `sh` blocks of a Markdown text, one by one."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of what is committed, with an environment of its own still to be made."""
    target = tmp_path_factory.mktemp("fresh") / "ridgeline"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def main_job(clone: Path) -> str:
    """What `make run` prints in a fresh clone with empty caches."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "OMP_NUM_THREADS")
    }
    environment |= {"PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": str(clone / "cache")}
    install = ["make", ".venv/run.stamp"]
    subprocess.run(install, cwd=clone, env=environment, check=True, capture_output=True)
    start = time.monotonic()
    done = subprocess.run(
        ["make", "run"], cwd=clone, env=environment, text=True, capture_output=True, check=False
    )
    print(f"make run, installed: {time.monotonic() - start:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_run_in_a_fresh_clone_trains_a_model_that_beats_its_baselines(
    clone: Path, main_job: str
) -> None:
    folder = clone / "runs" / "laptop"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row][-1]
    baselines = next(row["baselines"] for row in rows if row.get("event") == "started")
    assert held_out <= baselines["unigram_entropy"] - 1.5
    assert held_out < baselines["bigram_held_out_loss"]
    assert f"held-out loss {held_out:.3f} nats per token" in main_job
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["processes"] == 2
    assert (folder / "sample.txt").read_text().startswith("def ")
    assert (folder / "report.html").stat().st_size <= 1_000_000
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_every_command_of_the_readme_works(clone: Path, main_job: str) -> None:
    assert main_job
    environment = os.environ | {"PATH": f"{clone / '.venv/bin'}:{os.environ['PATH']}"}
    commands = [c for c in shell_blocks((ROOT / "README.md").read_text()) if c]
    assert "make run" in commands
    for command in commands:
        if command.startswith("make"):
            continue  # make run has run, and make test is what CI runs beside this
        done = subprocess.run(
            shlex.split(command), cwd=clone, env=environment, text=True, capture_output=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_readme_shows_what_make_run_prints(main_job: str) -> None:
    """Line by line the same, once numbers and sampled text are left out."""
    shown = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert shown is not None
    printed = {shape_of(line) for line in main_job.splitlines()}
    for line in shown[1].splitlines():
        if line.startswith("def "):
            break  # the sampled continuation
        if line not in ("", "…"):
            assert shape_of(line) in printed, line


def shape_of(line: str) -> str:
    """A line without its numbers, units of time and runs of blanks."""
    return re.sub(
        r"\s+", " ", re.sub(r"[\d,.]+(?:e-?\d+)?(?:[kM]|ms|m\d+s|s)?\b", "#", line)
    ).strip()
