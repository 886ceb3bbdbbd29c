"""The names and signatures that scripts rely on: a change here is a change for users."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType

import pytest

import ridgeline
from ridgeline.data.prepare import prepare
from ridgeline.plan.cost_text import cost_of
from ridgeline.train.sample import sample
from ridgeline.train.start import train
from ridgeline.train.worker import Outcome


def test_the_public_names_are_these() -> None:
    assert ridgeline.__all__ == [
        "audit", "cost", "parity", "plan", "prepare", "read_run", "rehearse", "report", "sample",
        "train", "validate",
    ]  # fmt: skip
    for name in ridgeline.__all__:
        verb = getattr(ridgeline, name)
        assert isinstance(verb, FunctionType), name
        assert verb.__doc__, name


@pytest.mark.parametrize(
    ("verb", "signature"),
    [
        (ridgeline.read_run, "(path: 'Path | str', overrides: 'Sequence[str]' = ()) -> 'Run'"),
        (ridgeline.prepare, "(run: 'Run', console: 'Console | None' = None) -> 'Manifest'"),
        (
            ridgeline.train,
            "(run: 'Run', *, decoder: 'MakeDecoder | None' = None, "
            "loss: 'LossFunction | None' = None, "
            "optimizer: 'MakeOptimizer | None' = None, "
            "stop: 'StopFlag | None' = None) -> 'Outcome'",
        ),
        (
            ridgeline.parity,
            "(run: 'Run', layouts: 'Sequence[str]' = (), steps: 'int' = 10, *, "
            "decoder: 'MakeDecoder | None' = None, loss: 'LossFunction | None' = None, "
            "optimizer: 'MakeOptimizer | None' = None, "
            "progress: 'Callable[[str, float], None] | None' = None) -> 'Parity'",
        ),
        (ridgeline.sample, "(folder: 'Path', prompt: 'str', **options: 'Any') -> 'str'"),
        (ridgeline.report, "(folder: 'Path') -> 'Path'"),
        (ridgeline.audit, "(folder: 'Path') -> 'Audit'"),
        (
            ridgeline.cost,
            "(model: 'ModelShape | str', tokens: 'int', on: 'str', **options: 'Any') -> 'Cost'",
        ),
    ],
)
def test_signatures_of_the_verbs(verb: FunctionType, signature: str) -> None:
    assert str(inspect.signature(verb)) == signature


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (train, ["run", "decoder", "loss", "optimizer", "stop"]),
        (
            importlib.import_module("ridgeline.train.parity").parity,
            ["run", "layouts", "steps", "decoder", "loss", "optimizer", "pool", "progress"],
        ),
        (sample, ["folder", "prompt", "tokens", "temperature", "top_k", "seed", "decoder"]),
        (prepare, ["data", "vocab", "seed", "console"]),
        (
            cost_of,
            ["shape", "tokens", "on", "mfu", "days", "sequence", "precision", "rates"],
        ),
    ],
)
def test_parameters_of_what_the_verbs_call(function: FunctionType, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_an_outcome_says_how_a_run_ended() -> None:
    fields = {"complete", "step", "tokens", "held_out_loss"}
    assert fields <= set(Outcome.__dataclass_fields__)


def test_the_verb_train_is_not_replaced_by_the_package_of_that_name() -> None:
    for name in ("ridgeline.train", "ridgeline.train.loop", "ridgeline.train.worker"):
        importlib.import_module(name)
        assert isinstance(ridgeline.train, FunctionType)
