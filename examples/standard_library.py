"""Two corpora that every machine has: the standard library of the Python that runs this.

    python examples/standard_library.py FOLDER

writes FOLDER/code.jsonl (source code without its docstrings, one document per module) and
FOLDER/prose.jsonl (the longer docstrings, one document per module or class). Nothing is downloaded;
the same Python writes the same files.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "pydoc_data",  # the language reference as one literal: neither code nor docstring
}  # fmt: skip
SHORTEST_PROSE = 80  # characters; shorter docstrings are labels rather than prose

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules(library: Path) -> Iterator[tuple[str, str]]:
    """(path within the library, source) of every module, sorted by path."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if LEFT_OUT.isdisjoint(relative.parts):
            with tokenize.open(path) as file:  # in the encoding that the file declares
                yield relative.as_posix(), file.read()


def documented(tree: ast.AST) -> Iterator[tuple[Documented, ast.Expr]]:
    """Every module, class and function that has a docstring, with that docstring, in order."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield node, first


def without_docstrings(source: str, tree: ast.AST) -> str:
    """The source with its docstrings cut out; a body that was nothing else becomes `pass`."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    places = [(expr, len(node.body) == 1) for node, expr in documented(tree)]
    for expr, alone in sorted(places, key=lambda place: place[0].lineno, reverse=True):
        first, last = expr.lineno - 1, (expr.end_lineno or expr.lineno) - 1
        before, after = lines[first][: expr.col_offset], lines[last][expr.end_col_offset :]
        rest = before + (b"pass" if alone else b"") + after
        lines[first : last + 1] = [rest] if rest.strip() else []
    return b"".join(lines).decode()


def prose(tree: ast.Module, name: str) -> Iterator[dict[str, str]]:
    """One document for the module and its functions, and one for each class with its methods."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    owner = {id(child): node for node in classes for child in (node, *node.body)}
    texts: dict[str, list[str]] = {}
    for node, expr in documented(tree):
        text = inspect.cleandoc(ast.literal_eval(expr.value))
        if len(text) >= SHORTEST_PROSE:
            belongs_to = owner.get(id(node))
            where = f"{name}:{belongs_to.name}" if belongs_to else name
            texts.setdefault(where, []).append(text)
    for where, parts in texts.items():
        yield {"name": where, "text": "\n\n".join(parts) + "\n"}


def main(folder: Path) -> None:
    """Write both corpora into `folder`."""
    code_lines: list[str] = []
    prose_lines: list[str] = []
    for name, source in modules(Path(sysconfig.get_path("stdlib"))):
        tree = ast.parse(source)
        code_lines.append(json.dumps({"name": name, "text": without_docstrings(source, tree)}))
        prose_lines.extend(json.dumps(document) for document in prose(tree, name))
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in (("code.jsonl", code_lines), ("prose.jsonl", prose_lines)):
        partial = folder / f"{file}.partial"
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(folder / file)
        size = (folder / file).stat().st_size
        print(f"{folder / file}: {len(lines):,} documents, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
