"""The rules of the house: sizes, one direction of imports, planning without torch, no pickle."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import ridgeline
from ridgeline.run import Run
from ridgeline.train.account import COUNTED
from ridgeline.train.vocabulary import token_loss

SOURCE = Path(ridgeline.__file__).parent
ROOT = SOURCE.parent.parent
FILES = sorted(SOURCE.rglob("*.py"))
PYTHON = [
    *FILES,
    *(p for name in ("tests", "examples", "bench") for p in (ROOT / name).rglob("*.py")),
]


def name_of(path: Path) -> str:
    """Dotted name below ridgeline: train.loop; a package is named by its folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docstrings |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_no_file_is_above_500_lines() -> None:
    long = {str(p): n for p in PYTHON if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_no_function_is_above_80_lines() -> None:
    long = {}
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 80:
                    long[f"{path.name}:{node.name}"] = length
    assert not long


def test_the_source_stays_within_18_500_lines_of_code() -> None:
    # Counted as the trunk is: a limit on docstrings too would be paid in docstrings.
    assert sum(map(code_lines, FILES)) <= 18_500


TRUNK = ("model.decoder", "train.parallelize", "train.pipeline", "train.optimizer", "train.loop")


def test_the_trunk_stays_within_900_lines_of_code() -> None:
    counts = {name: code_lines(MODULES[name]) for name in TRUNK}
    assert sum(counts.values()) <= 900, counts


def test_the_readme_says_how_many_lines_its_reading_order_has() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"^\| \[`([\w/]+)\.py`\]\([^)]*\) \| (\d+) \|"
    told = dict(re.findall(row, readme, flags=re.MULTILINE))
    names = {name.replace("/", "."): int(count) for name, count in told.items()}
    assert set(TRUNK) <= set(names)
    assert names == {name: code_lines(MODULES[name]) for name in names}


FOUNDATION = {"errors", "human", "processes"}
ALLOWED: dict[str, set[str]] = {
    # room: the rooms it may import, beside itself
    "errors": set(),
    "human": set(),
    "processes": set(),
    "torch_compat": set(),
    "torch_compat_faults": set(),
    "model": FOUNDATION | {"torch_compat"},
    "machine": FOUNDATION,
    "layout": FOUNDATION | {"model"},
    "ledger": FOUNDATION,
    "run": FOUNDATION | {"layout", "model"},
    "plan": FOUNDATION | {"ledger", "run", "layout", "machine", "model"},
    "data": FOUNDATION | {"run", "layout", "machine", "model"},
    "launch": FOUNDATION | {"data", "run", "layout", "machine", "model", "torch_compat"},
    "train": FOUNDATION
    | {"data", "run", "layout", "ledger", "machine", "model", "plan", "launch", "torch_compat"}
    | {"torch_compat_faults"},
    "rehearse": FOUNDATION
    | {"data", "ledger", "run", "plan", "layout", "machine", "model", "train", "torch_compat"},
    "audit": FOUNDATION | {"plan", "ledger", "data", "run", "layout", "machine", "model"},
}
FRONT = {
    "",
    "__main__",
    "cli",
    "cli_audit",
    "cli_plan",
    "cli_train",
}  # the verbs, which call everything


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules a file imports, by full name, and whether only type checkers do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or "", node in for_types
            if node.module == "ridgeline":
                yield from ((f"ridgeline.{alias.name}", node in for_types) for alias in node.names)


def room_of(name: str) -> str:
    return name.removeprefix("ridgeline").lstrip(".").partition(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name not in FRONT])
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    allowed = ALLOWED[room] | {room}
    for name, _ in imported(MODULES[module]):
        if name == "ridgeline" or not name.startswith("ridgeline."):
            continue
        assert room_of(name) in allowed, f"{module} imports {name}"


PLANNING = {
    "ledger",
    "run",
    "errors",
    "human",
    "model.shape",
    "model.counts",
    "model.catalogue",
    "model.table",
}
PLANNING_ROOMS = {"layout", "machine", "plan"}


def planning_modules() -> list[str]:
    return [name for name in MODULES if name in PLANNING or room_of(name) in PLANNING_ROOMS]


def test_planning_code_names_no_torch() -> None:
    assert set(planning_modules()) >= PLANNING
    for name in planning_modules():
        found = [
            module for module, _ in imported(MODULES[name]) if module.partition(".")[0] == "torch"
        ]
        assert not found, name


def test_planning_code_loads_no_torch() -> None:
    modules = [f"ridgeline.{name}" for name in planning_modules()]
    plain = [name for name in modules if room_of(name) != "plan"]
    assert len(modules) > len(plain) > 10
    # the planner alone needs numpy
    code = f"""
import sys, importlib
for m in {plain}: importlib.import_module(m)
print([m for m in ('torch', 'numpy', 'tokenizers', 'rich') if m in sys.modules])
for m in {modules}: importlib.import_module(m)
print([m for m in ('torch', 'tokenizers', 'rich') if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_cuda_is_named_in_one_file_at_most() -> None:
    naming = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if "torch.cuda" in attributes or any(
            name.startswith("torch.cuda") for name, _ in imported(path)
        ):
            naming.append(path.name)
    assert len(naming) <= 1, naming


def test_no_exception_is_swallowed() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            where = f"{path.name}:{node.lineno}"
            assert node.type is not None, f"{where}: bare except"
            everything = ast.unparse(node.type) in ("Exception", "BaseException")
            raised = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raised or not everything, f"{where}: {ast.unparse(node.type)} is swallowed"


def test_no_environment_variable_is_ours() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("RIDGELINE"), f"{path.name}:{node.lineno}"


def test_nothing_unpickles() -> None:
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    calls = {"torch.load", "torch.save", "pickle.load", "pickle.loads"}
    for path in FILES:
        assert not banned & {name.partition(".")[0] for name, _ in imported(path)}, path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & called, path


class LineCounter:
    """A loss that traces our own lines between two of its calls: one whole step of the loop."""

    def __init__(self, first_call: int) -> None:
        self.first_call = first_call
        self.calls = 0
        self.lines: set[tuple[str, int]] = set()

    def __call__(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.first_call:
                frame: FrameType | None = sys._getframe()
                while frame is not None:  # what runs already is traced from its next line
                    frame.f_trace = self._trace
                    frame = frame.f_back
                sys.settrace(self._trace)
            elif self.calls == self.first_call + 1:
                sys.settrace(None)
        return token_loss(logits_BLV, targets_BL)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        if not file.startswith(str(SOURCE)):
            return None
        if event == "line":
            self.lines.add((file.removeprefix(str(SOURCE)), frame.f_lineno))
        return self._trace


def test_a_step_of_a_dense_model_executes_at_most_565_of_our_lines(
    tiny_run: Callable[..., Run],
) -> None:
    counter = LineCounter(first_call=COUNTED + 2)  # steps that are sampled do more
    run = tiny_run(layout="mb8 fp32", logging={"tensorboard": True}, budget={"steps": COUNTED + 4})
    before = sys.gettrace()
    try:
        ridgeline.train(run, loss=counter)
    finally:
        sys.settrace(before)
    files = {file for file, _ in counter.lines}
    assert {
        "/train/loop.py",
        "/model/decoder.py",
        "/data/mixture.py",
        "/train/telemetry.py",
    } <= files
    assert 150 < len(counter.lines) <= 565
