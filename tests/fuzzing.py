"""Run files, shards and checkpoints that somebody spoilt: one of our errors, or success.

Never a traceback of another kind, and never a file outside the folder it works in. How many cases
the caller says: few in `make test`, ten thousand in `make test-system`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.train.saved import bits, blank, some_tensors, written

from ridgeline.data.mixture import open_mixture
from ridgeline.errors import RidgelineError
from ridgeline.run import Run, read_run
from ridgeline.train.checkpoint import load
from ridgeline.train.manifest import MANIFEST, file_of, manifest_text

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "../../up", "/", "dp2 tp2", "1e400", "nan", "\0", "0" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
Path_ = tuple[Any, ...]


def paths(value: Any, prefix: Path_ = ()) -> list[Path_]:
    """Where every value of a nest of tables and lists stands."""
    found = [prefix] if prefix else []
    inner: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, each in inner:
        found += paths(each, (*prefix, key))
    return found


@st.composite
def spoilt(draw: st.DrawFn, whole: Any) -> Any:
    """A copy of a nest of tables and lists with up to three of its values changed or gone."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(paths(value)))
        table = value
        for key in where[:-1]:
            table = table[key]
        if draw(st.integers(0, 4)) == 0:
            del table[where[-1]]
        else:
            table[where[-1]] = draw(VALUES)
        if not paths(value):
            break
    return value


@st.composite
def spoilt_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """A copy of a file that is cut, longer, or has some other bytes."""
    start = draw(st.integers(0, len(whole)))
    length = draw(st.integers(0, 16) | st.integers(0, len(whole)))
    return whole[:start] + draw(st.binary(max_size=24)) + whole[start + length :]


def as_toml(values: Any) -> str:
    """Tables as TOML as far as TOML can say it: what it cannot, is left to be wrong."""
    lines: list[str] = []
    for key, value in values.items():
        if not isinstance(value, dict):
            lines.append(f"{json.dumps(key)} = {_word(value)}")
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(f"[{json.dumps(key)}]")
            lines += [f"{json.dumps(name)} = {_word(inner)}" for name, inner in value.items()]
    return "\n".join(lines)


def _word(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(key)} = {_word(each)}" for key, each in value.items())
        return "{" + inner + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_word, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def tried(action: Callable[[], object]) -> bool:
    """Whether it succeeded; every error but ours goes on."""
    try:
        action()
    except RidgelineError as error:
        assert error.asked
        return False
    return True


def steadily(cases: int, action: Callable[..., None], **strategies: Any) -> None:
    """Run `action` on so many cases, the same ones every time."""
    quiet = settings(
        max_examples=cases, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    quiet(given(**strategies)(action))()


def fuzz_runs(run: Run, folder: Path, cases: int) -> int:
    """How many of the spoilt run files were refused."""
    values = run.model_dump(mode="json", exclude_none=True) | {"layout": str(run.layout)}
    file, refused = folder / "run.toml", 0

    def read() -> None:
        again = read_run(file)
        file.write_text(again.to_toml(), encoding="utf-8")
        assert read_run(file) == again or again != again

    def spoil(changed: Any, torn: Any) -> None:
        nonlocal refused
        text = as_toml(changed).encode(errors="surrogatepass")
        file.write_bytes(text if torn is None else text[:torn] + text[torn + 3 :])
        refused += not tried(read)
        assert [path.name for path in folder.iterdir()] == ["run.toml"]

    steadily(cases, spoil, changed=spoilt(values), torn=st.none() | st.integers(0, 2000))
    return refused


def fuzz_shards(run: Run, folder: Path, cases: int) -> int:
    """How many of the spoilt prepared folders were refused."""
    whole = shutil.copytree(run.data.folder, folder / "whole")
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    kept = {name: (whole / name).read_bytes() for name in names}
    refused = 0

    def use() -> None:
        mixture = open_mixture(whole, run.data.corpora, run.sequence, 1, run.model.vocab, 8)
        mixture.batch(0, 4)
        mixture.batch(10**6, 4)
        for corpus in run.data.corpora:
            mixture.held_out(corpus.name, 2)

    def spoil(data: Any) -> None:
        nonlocal refused
        name = data.draw(st.sampled_from(names))
        (whole / name).write_bytes(data.draw(spoilt_bytes(kept[name])))
        refused += not tried(use)
        assert sorted(path.name for path in whole.iterdir() if path.is_file()) == names
        (whole / name).write_bytes(kept[name])

    steadily(cases, spoil, data=st.data())
    return refused


def fuzz_checkpoints(folder: Path, cases: int) -> int:
    """How many of the spoilt checkpoints were refused; the others hold what was written."""
    path = written(folder)
    files = {name: (path / name).read_bytes() for name in (MANIFEST, file_of(0))}
    body = json.loads(files[MANIFEST])["body"]
    expected, refused = bits(some_tensors()), 0

    def spoil(data: Any) -> None:
        nonlocal refused
        name = data.draw(st.sampled_from([*files, "sealed"]))
        if name == "sealed":  # by somebody who knows the checksum
            text = manifest_text(data.draw(spoilt(body)))
            (path / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
        else:
            (path / name).write_bytes(data.draw(spoilt_bytes(files[name])))
        there = blank(some_tensors())
        with torch.no_grad():
            good = tried(lambda: load(path, there))
        refused += not good
        assert not good or bits(there) == expected
        assert [each.name for each in folder.iterdir()] == [path.name]
        for each, content in files.items():
            (path / each).write_bytes(content)

    steadily(cases, spoil, data=st.data())
    return refused
