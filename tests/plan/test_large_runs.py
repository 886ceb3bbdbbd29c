"""Llama 3 405B and DeepSeek-V3: figures of the bench stay where the docs say they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "large_runs.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench/large_runs.py."""
    spec = importlib.util.spec_from_file_location("large_runs_bench", BENCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_llama_is_near_at_8192_tokens_and_too_slow_at_131072(bench: ModuleType) -> None:
    found = bench.llama()
    assert list(found) == list(bench.PUBLISHED)
    assert found["8192 8192"] == pytest.approx(430, rel=0.03)
    assert found["16384 8192"] == pytest.approx(400, rel=0.03)
    assert 0.8 * 380 < found["16384 131072"] < 380


def test_deepseeks_step_is_within_its_interval(bench: ModuleType) -> None:
    """180,000 H800 hours per trillion tokens are 19.9 s for 62.9 million on 2,048 devices."""
    assert pytest.approx(19.9, abs=0.05) == bench.DEEPSEEK_STEP_S
    step = bench.deepseek()
    assert step.interval_s[0] < bench.DEEPSEEK_STEP_S < step.interval_s[1]
    assert step.step_s == pytest.approx(bench.DEEPSEEK_STEP_S, rel=0.1)
    assert not step.fits
