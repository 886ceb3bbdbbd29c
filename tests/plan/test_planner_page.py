"""The worked numbers of docs/planner.md are what the code gives."""

from __future__ import annotations

import doctest
from pathlib import Path


def test_worked_numbers() -> None:
    page = Path(__file__).parents[2] / "docs" / "planner.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted >= 8
