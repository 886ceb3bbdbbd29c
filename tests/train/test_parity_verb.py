"""What parity compares and says: the first difference, the table, the JSON, the exit status."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import faults

from ridgeline.cli import main
from ridgeline.launch.pool import Pool
from ridgeline.run import Run
from ridgeline.train.parity import Compared, Difference, Parity, Tolerance, compare, parity
from ridgeline.train.parity_text import table
from ridgeline.train.witness import Deviation, Seen, deviation

MakeRun = Callable[..., Run]
LAYOUTS = ("dp2 mb2", "dp1 mb8")
check = importlib.import_module("ridgeline.train.parity")  # `ridgeline.train` is the verb


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def small(run: Run, pool: Pool) -> Parity:
    return parity(run, LAYOUTS, pool=pool)


# ---- the comparison itself, on numbers made up here

TOLERANCE = Tolerance(loss=1e-5, grad_norm=1e-4, gradient=1e-5)
ALONE = Seen([2.0, 1.0], [2.0, 0.5], {"w": Deviation(0.0, 0.4, 0.4)})


def beside(**changes: Any) -> Compared:
    """A layout of two ranks of which the second saw something else than the reference."""
    seen = dataclasses.replace(ALONE, **changes)
    return compare("dp2", ALONE, [ALONE, seen], TOLERANCE, clip_norm=1.0)


def test_rounding_is_no_difference() -> None:
    compared = beside(loss=[2.0, 1.000009], grad_norm=[2.00001, 0.50004])
    assert compared.equal
    assert compared.loss_difference == pytest.approx(9e-6)
    assert compared.norm_difference == pytest.approx(8e-5)
    assert compared.gradient_difference == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": [2.0, 1.0001]}, Difference(2, "loss", None, 1, 1.0, 1.0001)),
        ({"loss": [math.nan, 1.0]}, Difference(1, "loss", None, 1, 2.0, math.nan)),
        ({"grad_norm": [2.0, math.inf]}, Difference(2, "grad_norm", None, 1, 0.5, math.inf)),
        # as little as this is not yet inherited at the first step
        ({"grad_norm": [2.00004, 0.5]}, Difference(1, "grad_norm", None, 1, 2.0, 2.00004)),
        (
            {"gradients": {"w": Deviation(2e-5, 0.4, 0.3)}},
            Difference(1, "gradient", "w", 1, 0.4, 0.3),
        ),
        # twice the norm, so half the gradient: the norm is to blame
        (
            {"grad_norm": [4.0, 0.5], "gradients": {"w": Deviation(0.5, 0.4, 0.2)}},
            Difference(1, "grad_norm", None, 1, 2.0, 4.0),
        ),
        # twice the norm and more than half of the gradient lost: the gradient is
        (
            {"grad_norm": [4.0, 0.5], "gradients": {"w": Deviation(0.9, 0.4, 0.04)}},
            Difference(1, "gradient", "w", 1, 0.4, 0.04),
        ),
    ],
    ids=["late", "nan", "inf", "first-norm", "gradient", "norm-to-blame", "gradient-to-blame"],
)
def test_the_first_difference_is_named(changes: dict[str, Any], expected: Difference) -> None:
    assert repr(beside(**changes).first_difference) == repr(expected)  # NaN equals nothing


def test_a_gradient_that_no_rank_has_is_missing() -> None:
    nothing = dataclasses.replace(ALONE, gradients={})
    compared = compare("pp2", ALONE, [nothing, nothing], TOLERANCE, clip_norm=1.0)
    assert compared.first_difference == Difference(1, "gradient", "w", None, 0.4, None)
    assert compared.gradient_difference == math.inf


def test_a_deviation_is_relative_to_the_largest_of_its_tensor() -> None:
    reference = torch.tensor([[4.0, -8.0], [0.0, 1.0]])
    moved = reference + torch.tensor([[0.0, 0.0], [0.2, 0.4]])
    found = deviation(moved, reference, 0.0)
    assert (found.size, found.reference, found.here) == pytest.approx((0.05, 1.0, 1.4))
    assert deviation(moved, reference, 0.5).size == 0
    assert deviation(moved, torch.zeros(2, 2), 0.0).size == math.inf
    assert deviation(moved * math.nan, reference, 0.5).size == math.inf
    assert deviation(moved, None, 0.5).reference is None
    assert deviation(moved, reference[0], 0.5).size == math.inf


# ---- the verb


def shape_of(value: Any) -> Any:
    """The keys and types of a JSON value; a list by its first element."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


COMPARED = {
    "equal": "bool", "layout": "str", "loss": ["float"], "grad_norm": ["float"],
    "loss_difference": "float", "norm_difference": "float", "gradient_difference": "float",
    "first_difference": "NoneType",
}  # fmt: skip
DIFFERENCE = {
    "step": "int", "what": "str", "tensor": "str", "rank": "int", "reference": "float",
    "here": "float",
}  # fmt: skip
SCHEMA = {
    "run": "str", "steps": "int", "precision": "str",
    "tolerance": {"loss": "float", "grad_norm": "float", "gradient": "float"},
    "equal": "bool", "learnt_nats": "float",
    "reference": {"layout": "str", "loss": ["float"], "grad_norm": ["float"]},
    "layouts": [COMPARED],
    "skipped": [{"layout": "str", "why": "str"}],
}  # fmt: skip


def test_the_json_has_this_schema_and_only_finite_numbers(small: Parity) -> None:
    different = beside(gradients={"w": Deviation(math.inf, 0.4, math.nan)})
    found = dataclasses.replace(small, skipped=[("tp2", "not trained")])
    assert shape_of(found.json()) == SCHEMA
    found = dataclasses.replace(small, layouts=[different])
    told = json.loads(json.dumps(found.json(), allow_nan=False))
    assert shape_of(told["layouts"][0]["first_difference"]) == DIFFERENCE | {"here": "NoneType"}
    assert told["layouts"][0]["gradient_difference"] is None
    assert told["equal"] is False


def test_the_table_fits_100_columns_and_says_when_little_was_learnt(small: Parity) -> None:
    text = table(small).splitlines()
    assert max(map(len, text)) <= 100
    assert sum("equal" in line for line in text) == len(LAYOUTS)
    numbers = [line for line in text if line.startswith("    1 ")]
    assert all(f"{small.loss[0]:.7f}" in line for line in numbers)
    flat = dataclasses.replace(small, loss=[small.loss[0]] * 10)
    assert "less than 0.5" in table(flat)


@pytest.fixture
def type_parity(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Run,
    pool: Pool,
    tmp_path: Path,
) -> Callable[..., tuple[int, str]]:
    """Run `ridgeline parity` on the tiny run, in the tests' processes: (exit status, output)."""

    def typed(*words: str, fault: faults.Changed | None = None) -> tuple[int, str]:
        own = Pool.run
        changing = faults.Changing(pool, fault=fault)
        file = tmp_path / "run.toml"
        file.write_text(run.to_toml(), encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["ridgeline", "parity", str(file), *words])
        with monkeypatch.context() as patched:
            patched.setattr(check, "Pool", lambda: changing)
            with pytest.raises(SystemExit) as left:
                main()
        assert Pool.run is own
        return int(left.value.code or 0), capsys.readouterr().out

    return typed


def test_the_verb_says_equal_and_exits_with_0(
    type_parity: Callable[..., tuple[int, str]],
) -> None:
    status, said = type_parity("--layouts", "dp2 mb2", "--steps", "2", "--seed", "3")
    assert status == 0
    assert "\ndp2 mb2                      equal    loss " in said
    assert "less than 0.5" in said


def test_the_verb_exits_with_1_when_a_layout_differs(
    type_parity: Callable[..., tuple[int, str]],
) -> None:
    words = ("--layouts", "dp2 mb4", "--layouts", "dp1 mb8", "--steps", "2", "--json")
    status, said = type_parity(*words, fault=faults.data_of_one_rank_repeated)
    assert status == 1
    told = json.loads(said)
    assert told["equal"] is False
    assert [each["equal"] for each in told["layouts"]] == [False, True]
    assert told["layouts"][0]["first_difference"]["what"] == "loss"
    assert os.environ.get("RANK") is None  # the ranks' variables are the workers' alone
