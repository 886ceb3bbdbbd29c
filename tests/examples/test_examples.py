"""Every example run file is a run: it reads, divides, and is the model its name says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import ridgeline
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.machine.device import device
from ridgeline.model.catalogue import entry
from ridgeline.model.counts import parameters
from ridgeline.run import Run, make_run
from ridgeline.train.resolve import resolve, this_host
from ridgeline.train.schedule import total_steps

FILES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}


@pytest.fixture(params=FILES, ids=lambda path: str(path.stem))
def path(request: pytest.FixtureRequest) -> Path:
    """Each example run file."""
    found: Path = request.param
    return found


@pytest.fixture
def run(path: Path) -> Run:
    """Each example, read."""
    return ridgeline.read_run(path)


def test_the_examples_the_documents_promise_are_there() -> None:
    assert {file.stem for file in FILES} >= {
        *("laptop", "one-gpu", "eight-gpus", "llama3-8b-32-h100", "llama3-405b-16384-h100"),
        *("frontier-22b", "frontier-175b", "frontier-1t", "fugaku-llm-13b"),
        *(f"gigagpt-{size}" for size in ("111m", "1.3b", "13b", "70b", "175b")),
    }


def test_an_example_is_named_as_its_file(path: Path, run: Run) -> None:
    assert run.name == path.stem


def test_layout_divides_model_sequence_batch_and_devices(run: Run) -> None:
    resolved = resolve(run, this_host(), None)[0] if run.layout == "auto" else run
    assert isinstance(resolved.layout, Layout)
    check(
        resolved.layout,
        resolved.model,
        resolved.sequence,
        resolved.global_batch,
        resolved.cluster.devices or None,
    )


def test_devices_are_known_multiply_the_precision_and_number_as_the_name_says(run: Run) -> None:
    if run.cluster.device == "local":
        assert run.layout == "auto"
        return
    assert isinstance(run.layout, Layout)
    assert run.layout.precision in device(run.cluster.device).peak_flops
    if said := re.search(r"-(\d+)-h100$", run.name):
        assert run.cluster.devices == int(said[1])


def test_parameters_agree_with_the_name_of_the_model(run: Run) -> None:
    counted = parameters(run.model)
    if said := re.search(r"-([\d.]+)([mbt])$", run.model.name):
        # gigaGPT's 70B is named after Llama 2 70B; with GPT-2's MLP it counts 64.9e9
        tolerance = 0.08 if run.model.name == "gigagpt-70b" else 0.02
        assert counted.total == pytest.approx(float(said[1]) * UNITS[said[2]], rel=tolerance)
    elif published := entry(run.model.name).published_parameters:
        assert counted.total == published
    else:
        assert run.model.name == "laptop"
        assert counted.non_embedding >= 5e6


def test_the_resolved_file_reads_back_as_the_same_run(run: Run) -> None:
    assert make_run(tomllib.loads(run.to_toml())) == run


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gigagpt-111m", 20 * 111e6),  # gigaGPT's configs: 20 tokens per parameter
        ("gigagpt-1.3b", 20 * 1.3e9),
        ("gigagpt-13b", 20 * 12.85e9),
        ("gigagpt-70b", 2e12),  # gigaGPT's configs: trained for 2T tokens
        ("gigagpt-175b", 2e12),
        ("llama3-405b-16384-h100", 15.6e12),  # arXiv:2407.21783
        ("fugaku-llm-13b", 380e9),  # press release of 10 May 2024
    ],
)
def test_steps_times_batch_is_the_published_number_of_tokens(name: str, tokens: float) -> None:
    run = ridgeline.read_run(FILES[0].with_name(f"{name}.toml"))
    steps = total_steps(run)
    assert steps is not None
    assert steps * run.global_batch * run.sequence == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(
    ("name", "replica", "sequences"),
    [
        ("frontier-175b", 64, 640),  # recalled of arXiv:2312.12705: per replica of tp·pp devices
        ("frontier-1t", 512, 1600),
        ("llama3-405b-16384-h100", 128, 16),  # arXiv:2407.21783, table 4: batch/DP 16
        ("fugaku-llm-13b", 48, 7),  # its script: 2016 = 7·288
    ],
)
def test_a_replica_has_the_published_devices_and_sequences(
    name: str, replica: int, sequences: int
) -> None:
    run = ridgeline.read_run(FILES[0].with_name(f"{name}.toml"))
    assert isinstance(run.layout, Layout)
    assert run.layout.tensor * run.layout.pipeline == replica
    assert run.global_batch / run.layout.data == sequences
