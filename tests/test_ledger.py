"""The ledger: its fields, its way to JSON and back, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import LedgerError
from ridgeline.ledger import (
    Calls,
    Ledger,
    Memory,
    SentBytes,
    StepSeconds,
    ledger_from_json,
    make_ledger,
    read_ledger,
    term_names,
)

quantity = st.none() | st.floats(0, 1e30)


def table(kind: type[Any], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **dict.fromkeys(kind.model_fields, quantity) | fixed)


ledgers = table(
    Ledger,
    schema_version=st.just(1),
    witness=st.sampled_from(["plan", "rehearse", "train"]),
    memory=st.lists(table(Memory), max_size=3).map(tuple),
    seconds=table(StepSeconds),
    sent=table(SentBytes),
    calls=table(Calls),
    layout=st.none() | st.text(),
    flops_by_module=st.dictionaries(st.text(), st.floats(0, 1e30)),
    goodput=st.none() | st.floats(0, 1),
    currency=st.just("USD"),
    sources=st.dictionaries(st.sampled_from(term_names()), st.text()),
)


@given(ledgers)
def test_json_and_back(ledger: Ledger) -> None:
    assert ledger_from_json(ledger.to_json()) == ledger


def test_the_terms_are_these() -> None:
    # The one schema that plan, rehearse, train and audit share: a change of meaning raises SCHEMA.
    assert list(Memory.model_fields) == [
        *("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes"),
        *("temporary_bytes", "framework_bytes", "total_bytes"),
    ]
    assert list(StepSeconds.model_fields) == [
        *("compute_s", "forward_s", "backward_s"),
        *("tensor_s", "pipeline_s", "data_s", "context_s", "expert_s", "bubble_s"),
        *("host_s", "optimizer_s", "data_stall_s", "checkpoint_stall_s"),
        *("evaluation_s", "logging_s", "total_s"),
    ]
    assert list(SentBytes.model_fields) == [
        *("tensor_bytes", "pipeline_bytes", "data_bytes", "context_bytes", "expert_bytes"),
        "world_bytes",
    ]
    assert list(Calls.model_fields) == [
        each.removesuffix("_bytes") for each in SentBytes.model_fields
    ]
    assert len(set(term_names())) == 7 + 16 + 6 + 6 + 12
    top = json.loads(Ledger(witness="plan").to_json())
    assert list(top) == [
        *("schema_version", "witness", "layout", "memory", "seconds", "sent", "calls", "kernels"),
        *("flops_per_device", "hardware_flops_per_device", "flops_by_module", "tokens_per_s"),
        *("mfu", "mfu_full_attention", "hfu", "goodput", "train_s", "step_energy_j", "energy_j"),
        *("money", "currency", "sources"),
    ]


def test_absent_is_null_and_never_zero() -> None:
    values = json.loads(Ledger(witness="train").to_json())
    assert values["mfu"] is None
    assert set(values["seconds"].values()) == {None}
    assert values["memory"] == []
    assert Ledger(witness="train").memory_bytes is None


def test_memory_adds_up_only_when_all_of_it_is_known() -> None:
    parts = dict.fromkeys((n for n in Memory.model_fields if n != "total_bytes"), 2.0)
    assert Memory(**parts).total_bytes == 12
    del parts["framework_bytes"]
    assert Memory(**parts).total_bytes is None
    assert Memory(**parts, total_bytes=20).total_bytes == 20  # measured, beside its components
    stages = (Memory(total_bytes=5), Memory(total_bytes=7))
    assert Ledger(witness="plan", memory=stages).memory_bytes == 7
    assert Ledger(witness="plan", memory=(*stages, Memory())).memory_bytes is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"witness": "oracle"}, "witness"),
        ({"witness": "plan", "mfu": -0.1}, "mfu = -0.1"),
        ({"witness": "plan", "tokens_per_s": float("nan")}, "tokens_per_s = nan"),
        ({"witness": "plan", "seconds": {"bubble": 1}}, "did you mean 'bubble_s'"),
        ({"witness": "plan", "goodput": 1.2}, "goodput"),
        ({"witness": "plan", "money": 3.0}, "currency"),
        ({"witness": "plan", "sources": {"seconds.bubble": "x"}}, "seconds.bubble_s"),
        ({"witness": "plan", "schema_version": 2}, "schema_version"),
        ([], "ledger"),
    ],
)
def test_impossible_ledgers_are_refused_by_name(values: Any, says: str) -> None:
    with pytest.raises(LedgerError, match=says):
        make_ledger(values)


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(LedgerError, match="not JSON"):
        read_ledger(path)
    path.write_text(Ledger(witness="plan", mfu=0.4).to_json(), encoding="utf-8")
    assert read_ledger(path).mfu == 0.4
