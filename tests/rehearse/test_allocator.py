"""Rehearsed memory is what PyTorch's allocator gives out, by the word of its own profiler."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import ridgeline
from ridgeline.run import Run

BENCH = Path(__file__).parents[2] / "bench" / "rehearse_memory.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench/rehearse_memory.py."""
    spec = importlib.util.spec_from_file_location("rehearse_memory_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", ["mb4 fp32", "tp2 pp2 mb4 zbh1 bf16"])
def test_the_allocator_holds_what_was_rehearsed(
    layout: str, tiny_run: Callable[..., Run], bench: ModuleType
) -> None:
    model = {"hidden": 128, "kv_heads": 4, "ffn_hidden": 256}
    run = tiny_run(layout=layout, model=model, budget={"steps": 2})
    stage = ridgeline.rehearse(run).fullest
    held = bench.allocated(run, stage.rank)
    assert held == pytest.approx(stage.peak_bytes - stage.by_component["framework"], rel=0.05)
