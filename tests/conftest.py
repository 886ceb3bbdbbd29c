"""A tiny prepared corpus, and tiny runs on it that learn within twenty steps."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from safetensors import safe_open

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: tests share two cores
# What the user's own machine was measured or corrected to be is not for tests to depend on.
os.environ["XDG_CONFIG_HOME"] = str(Path(tempfile.gettempdir(), "ridgeline-tests-have-no-config"))
logging.disable(logging.DEBUG)  # PyTorch's checkpoint planner tells of every tensor, twice

from ridgeline.data.prepare import prepare  # noqa: E402
from ridgeline.launch.pool import Pool  # noqa: E402
from ridgeline.run import Data, Run, make_run  # noqa: E402

# Time on a shared machine says nothing about a property; and the same commit must give the same
# answer, so that a red test is of the change at hand. `--hypothesis-profile=wide` looks elsewhere.
settings.register_profile("wide", deadline=None)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

VOCAB = 320
SEQUENCE = 32

SUBJECTS = ("the pipeline", "a tensor", "the ridge", "every rank", "one layout")
VERBS = ("gathers", "scatters", "reduces", "plans", "trains")
OBJECTS = ("its weights", "all gradients", "the next batch", "a long sequence")


def _documents(seed: int, count: int) -> list[str]:
    """Sentences of few words in few orders: a tiny model learns them at once."""
    choose = random.Random(seed)
    return [
        f"{number}: "
        + " ".join(
            f"{choose.choice(SUBJECTS)} {choose.choice(VERBS)} {choose.choice(OBJECTS)}."
            for _ in range(20)
        )
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Two corpora, tokenized: the `[data]` of tiny runs. Not to be written into."""
    folder = tmp_path_factory.mktemp("corpus")
    corpora = []
    for seed, (name, count) in enumerate((("code", 120), ("prose", 80))):
        source = folder / f"{name}.jsonl"
        rows = (json.dumps({"text": text, "seed": seed}) for text in _documents(seed, count))
        source.write_text("\n".join(rows), encoding="utf-8")
        corpora.append({"name": name, "sources": [str(source)], "weight": 2.0 - seed})
    values = {
        "folder": folder / "prepared",
        "corpora": corpora,
        "sequence": SEQUENCE,
        "held_out_fraction": 0.1,
        "workers": 1,
    }
    data = Data.model_validate(values)
    prepare(data, VOCAB, seed=0)
    return data


def merged(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`into` with the tables of `changes` laid over its own; None takes a value away."""
    result = dict(into)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


@pytest.fixture(scope="session")
def make_tiny_run(prepared: Data) -> Callable[..., Run]:
    """Make a tiny run below a folder: `make_tiny_run(folder, budget={"steps": 4})`."""

    def make(folder: Path, **changes: Any) -> Run:
        values = {
            "name": "tiny",
            "folder": str(folder),
            "seed": 1,
            "model": {
                "name": "tiny",
                "layers": 2,
                "hidden": 32,
                "heads": 4,
                "kv_heads": 2,
                "ffn_hidden": 64,
                "vocab": VOCAB,
                "max_sequence": SEQUENCE,
            },
            "data": prepared.model_dump(mode="json", exclude_none=True),
            "layout": "dp1 mb4 fp32",
            "optimizer": {"lr": 2e-2},
            "schedule": {"warmup_steps": 2, "global_batch": 8},
            "budget": {"steps": 4},
            "evaluation": {"sequences": 4},
            "logging": {"every_steps": 1, "tensorboard": False},
        }
        return make_run(merged(values, changes))

    return make


@pytest.fixture
def tiny_run(make_tiny_run: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Make a tiny run below tmp_path: `tiny_run(budget={"steps": 4}, layout="dp2 fp32")`."""

    def make(**changes: Any) -> Run:
        return make_tiny_run(**{"folder": tmp_path / "runs", **changes})

    return make


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes that all tests share; what runs in them is imported from its file."""
    with Pool() as started:
        yield started


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """Rows of a run's metrics.jsonl that have a field, in order: `rows_of(run, "loss")`."""

    def read(run: Run, having: str) -> list[dict[str, Any]]:
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if having in row]

    return read


@pytest.fixture(scope="session")
def last_tensors() -> Callable[[Run], dict[str, bytes]]:
    """Every tensor of a run's newest checkpoint, as bytes: weights, optimizer, random state."""

    def read(run: Run) -> dict[str, bytes]:
        newest = max((run.path / "checkpoints").glob("step-*"))
        found: dict[str, bytes] = {}
        for path in sorted(newest.rglob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                found |= {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        assert found
        return found

    return read


@pytest.fixture(scope="session")
def start_command() -> Callable[..., subprocess.Popen[str]]:
    """Start `ridgeline …` as its own process group; its output comes as one stream."""

    def start(*words: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ridgeline", *map(str, words)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start
