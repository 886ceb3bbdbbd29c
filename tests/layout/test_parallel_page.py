"""The worked numbers of docs/parallel.md are what the code gives."""

from __future__ import annotations

import doctest
from pathlib import Path


def test_worked_numbers_of_layouts() -> None:
    page = Path(__file__).parents[2] / "docs" / "parallel.md"
    options = doctest.NORMALIZE_WHITESPACE
    result = doctest.testfile(
        str(page), module_relative=False, encoding="utf-8", optionflags=options
    )
    assert result.failed == 0
    assert result.attempted >= 12
