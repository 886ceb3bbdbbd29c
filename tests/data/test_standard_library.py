"""examples/standard_library.py: code without docstrings, prose from docstrings."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = '''"""A module. {long}"""
import os


class Ridge:
    """A class. {long}"""

    def line(self):
        """A method. {long}"""
        return "é" + """no docstring"""

    def short(self): """Short."""


class Fault(Exception):
    """Only a docstring. {long}"""


def outside():
    "A function. {long}"
    return 1
'''.replace("{long}", "More words. " * 10)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "standard_library.py"
    spec = importlib.util.spec_from_file_location("standard_library", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_loses_its_docstrings_and_nothing_else(example: ModuleType) -> None:
    code = example.without_docstrings(SOURCE, ast.parse(SOURCE))
    assert code == (
        "import os\n\n\nclass Ridge:\n\n    def line(self):\n"
        '        return "é" + """no docstring"""\n\n    def short(self): pass\n\n\n'
        "class Fault(Exception):\n    pass\n\n\ndef outside():\n    return 1\n"
    )
    compile(code, "ridge.py", "exec")


def test_prose_is_a_document_per_module_and_class(example: ModuleType) -> None:
    documents = {
        each["name"]: each["text"] for each in example.prose(ast.parse(SOURCE), "ridge.py")
    }
    assert {name: text.count("More words.") // 10 for name, text in documents.items()} == {
        "ridge.py": 2,
        "ridge.py:Ridge": 2,
        "ridge.py:Fault": 1,
    }
    assert "Short." not in "".join(documents.values())


def test_tests_and_installed_packages_are_left_out(example: ModuleType, tmp_path: Path) -> None:
    for name in ("b.py", "a/x.py", "a/test/y.py", "site-packages/z.py", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# -*- coding: latin-1 -*-\n")
    assert [name for name, _ in example.modules(tmp_path)] == ["a/x.py", "b.py"]
