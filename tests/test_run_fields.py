"""Every field of a run changes something: an option that nothing reads does not pass here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from tests.run_probes import (
    Case,
    MakeRun,
    balanced,
    computed,
    divided,
    fraction,
    hangs_after,
    judged,
    launched,
    limited,
    lost,
    made,
    miscalculated,
    nested,
    planned,
    refused,
    resolved,
    saved,
    scheduled,
    slow,
    trained,
    troubled,
    where,
    written,
)

from ridgeline.run import Data, Run
from ridgeline.train.interval import mtbf_s

GPT = {"model": {"positions": "learned", "norm": "layernorm", "activation": "gelu"}}
STRETCHED = {"model": {"rope_scaling": {"factor": 8.0, "original_max_sequence": 8}}}
EXPERTS = {"model": {"experts": {"count": 4, "top_k": 2, "ffn_hidden": 16, "shared": 1}}}
LATENT = {
    "model": {
        "kv_heads": 4,
        "head_dim": 12,
        "latent_attention": {
            "query_rank": 8, "kv_rank": 8, "rope_head_dim": 4, "nope_head_dim": 8,
            "value_head_dim": 8,
        },
    }
}  # fmt: skip
RAMP = {"schedule": {"global_batch": 24, "ramp": {"start": 8, "increment": 4, "every_steps": 2}}}
TOKENS = {"schedule": {"global_batch": None, "global_batch_tokens": 256}}
WSD = {"schedule": {"shape": "wsd"}, "budget": {"steps": 40}}
SHARDED = {"layout": {"data": 4, "zero": 3}}
ONE = {"layout": {"data": 1}}
STAGES = {"model": {"layers": 4}, "layout": {"pipeline": 2}}
OFTEN = {"checkpoint": {"every_steps": 1, "keep": 1}}
LONG = {"budget": {"steps": 40}}
AUTO = {"layout": "auto"}
SPIKED = {"budget": {"steps": 24}, "faults": {"spike": 20.0}}
ON_A100 = {"cluster": {"device": "A100-SXM-80GB", "devices": 1}}

CASES = [
    Case("name", "other", where),
    Case("folder", "elsewhere", where),
    Case("seed", 2, trained),
    Case("model.name", "another", trained),
    Case("model.source", "my notebook", written),
    Case("model.layers", 3, computed),
    Case("model.hidden", 48, computed),
    Case("model.heads", 8, computed),
    Case("model.kv_heads", 4, computed),
    Case("model.head_dim", 16, computed),
    Case("model.activation", "gelu_tanh", computed),
    Case("model.ffn_hidden", 96, computed),
    Case("model.vocab", 384, computed),
    Case("model.max_sequence", 64, computed, GPT),
    Case("model.positions", "learned", computed),
    Case("model.rope_theta", 100.0, computed),
    Case("model.norm", "layernorm", computed),
    Case("model.norm_eps", 0.1, computed),
    Case("model.bias", True, computed),
    Case("model.qkv_bias", True, computed),
    Case("model.qk_norm", True, computed),
    Case("model.tied", True, computed),
    Case("model.init_std", 0.1, computed),
    Case("model.rope_scaling.factor", 2.0, computed, STRETCHED),
    Case("model.rope_scaling.low_frequency_factor", 0.1, computed, STRETCHED),
    Case("model.rope_scaling.high_frequency_factor", 1.5, computed, STRETCHED),
    Case("model.rope_scaling.original_max_sequence", 16, computed, STRETCHED),
    Case("model.experts.count", 8, computed, EXPERTS),
    Case("model.experts.top_k", 1, computed, EXPERTS),
    Case("model.experts.ffn_hidden", 8, computed, EXPERTS),
    Case("model.experts.shared", 0, computed, EXPERTS),
    Case("model.experts.first_dense_layers", 1, computed, EXPERTS),
    Case("model.experts.routing", "sigmoid", computed, EXPERTS),
    Case("model.experts.normalise", False, computed, EXPERTS),
    Case("model.experts.scale", 3.0, computed, EXPERTS),
    Case("model.experts.balance_weight", 0.5, balanced, EXPERTS),
    Case("model.experts.bias_rate", 0.5, balanced, EXPERTS),
    Case("model.latent_attention.query_rank", 4, computed, LATENT),
    Case("model.latent_attention.kv_rank", 4, computed, LATENT),
    Case("model.latent_attention.rope_head_dim", 6, computed, LATENT, {"model": {"head_dim": 14}}),
    Case("model.latent_attention.nope_head_dim", 9, computed, LATENT, {"model": {"head_dim": 13}}),
    Case("model.latent_attention.value_head_dim", 4, computed, LATENT),
    Case("data.folder", "prepared again", made),
    Case("data.corpora.name", "renamed", made),
    Case("data.corpora.sources", ["other.jsonl"], made),
    Case("data.corpora.weight", 9.0, trained),
    Case("data.corpora.text_field", "title", made),
    Case("data.tokenizer", "given.json", made),
    Case("data.sequence", 16, trained),
    Case("data.held_out_fraction", 0.3, made),
    Case("data.shard_tokens", 1024, made),
    Case("data.workers", 2, made),
    Case("cluster.device", "H100-SXM-80GB", planned, ON_A100),
    Case("cluster.devices", 4, resolved, AUTO),
    Case("cluster.mtbf_hours", 3.0, mtbf_s),
    Case("layout.data", 2, divided, ONE),
    Case("layout.context", 2, divided, ONE),
    Case("layout.tensor", 2, divided, ONE),
    Case("layout.pipeline", 2, divided, ONE),
    Case("layout.expert", 2, divided, {**EXPERTS, "layout": {"data": 2}}),
    Case("layout.expert_tensor", 2, refused, ONE),
    Case("layout.micro_batch", 4, divided, ONE),
    Case("layout.interleave", 2, divided, STAGES),
    Case("layout.schedule", "zbv", divided, STAGES),
    Case("layout.zero", 1, divided, {"layout": {"data": 4}}),
    Case("layout.shard_group", 2, divided, SHARDED),
    Case("layout.recompute", "full", divided, ONE),
    Case("layout.compile", True, divided, ONE),
    Case("layout.precision", "bf16", trained, {"layout": {"micro_batch": 4, "precision": "fp32"}}),
    Case("layout.order", "dp-pp-cp-tp", divided, {"layout": {"data": 2, "pipeline": 2, "zero": 1}}),
    Case("optimizer.lr", 1e-3, trained),
    Case("optimizer.beta1", 0.5, trained),
    Case("optimizer.beta2", 0.5, trained),
    Case("optimizer.eps", 1e-2, trained),
    Case("optimizer.weight_decay", 0.9, trained),
    Case("optimizer.clip_norm", 0.05, trained),
    Case("schedule.shape", "linear", scheduled, LONG),
    Case("schedule.warmup_steps", 3, scheduled, LONG),
    Case("schedule.final_fraction", 0.5, scheduled, LONG),
    Case("schedule.decay_fraction", 0.6, scheduled, WSD),
    Case("schedule.global_batch", 12, scheduled),
    Case("schedule.global_batch_tokens", 512, scheduled, TOKENS),
    Case("schedule.ramp.start", 4, scheduled, RAMP),
    Case("schedule.ramp.increment", 8, scheduled, RAMP),
    Case("schedule.ramp.every_steps", 3, scheduled, RAMP),
    Case("budget.steps", 6, scheduled),
    Case("budget.tokens", 9999, scheduled, {"budget": {"steps": None, "tokens": 99}}),
    Case("budget.hours", 0.1, fraction, {"budget": {"steps": None, "hours": 1.0}}),
    Case("evaluation.every_steps", 2, trained),
    Case("evaluation.sequences", 9, trained),
    Case("evaluation.must_learn_nats", 99.0, judged, {"evaluation": {"must_learn_nats": 0.0}}),
    Case("checkpoint.every_steps", 1, trained),
    Case("checkpoint.keep", 1, trained, {"checkpoint": {"every_steps": 1}}),
    Case(
        "checkpoint.permanent_every_steps",
        2,
        trained,
        {"checkpoint": {"every_steps": 1, "keep": 1}},
    ),
    Case("checkpoint.asynchronous", False, saved),
    Case("checkpoint.local", "disk", saved),
    Case("faults.bad_step", "stop", troubled, SPIKED),
    Case("faults.spike", 0.0, troubled, SPIKED),
    Case("faults.most_bad_steps", 1, troubled, SPIKED),
    Case("faults.compare_every_steps", 2, trained),
    Case("faults.self_test", False, miscalculated),
    Case("faults.restarts", 0, lost),
    Case("faults.fewer_devices", False, launched, {"layout": {"data": 4}}),
    Case("faults.stop_within_s", 0.5, slow),
    Case("faults.save_before_s", 60.0, limited),
    Case("faults.step_limit_s", 0.0, hangs_after),
    Case("logging.every_steps", 3, trained),
    Case("logging.samples", True, trained),
    Case("logging.tensorboard", True, trained),
]


def leaves(table: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all fields that are not tables themselves."""
    names: set[str] = set()
    for name, info in table.model_fields.items():
        tables = [
            kind
            for kind in (info.annotation, *get_args(info.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        names |= leaves(tables[0], f"{prefix}{name}.") if tables else {f"{prefix}{name}"}
    return names


def test_every_field_of_a_run_has_a_case() -> None:
    assert {case.name for case in CASES} == leaves(Run)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def small_text(tmp_path: Path, prepared: Data) -> dict[str, Any]:
    """`[data]` of two small corpora that are not prepared yet, and a tokenizer.json."""
    for name, word in (("text", "ridge"), ("other", "valley"), ("second", "summit")):
        rows = [{"text": f"{n} {word} " * 40, "title": f"title {n} of {word}"} for n in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    given = (prepared.folder / "tokenizer.json").read_bytes()
    (tmp_path / "given.json").write_bytes(given)
    corpora = [
        {"name": name, "sources": [f"{name}.jsonl"], "text_field": "text"}
        for name in ("text", "second")
    ]
    return {"folder": "prepared", "corpora": corpora, "sequence": 32, "workers": 1}


@pytest.fixture
def probe_of(
    tiny_run: MakeRun,
    prepared: Data,
    small_text: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Case, bool], object]:
    """What a case's probe sees in an empty folder, without or with the change."""
    monkeypatch.chdir(tmp_path)

    def look(case: Case, changed: bool) -> object:
        for folder in ("runs", "prepared"):
            shutil.rmtree(folder, ignore_errors=True)
        data = prepared.model_dump(mode="json", exclude_none=True)
        told: dict[str, Any] = {
            "folder": "runs",
            "data": small_text if case.probe is made else data,
        }
        told = merge(told, case.base)
        table, _, name = case.name.rpartition(".")
        if changed and table == "data.corpora":
            first, second = told["data"]["corpora"]
            told["data"] = {**told["data"], "corpora": [{**first, name: case.value}, second]}
        elif changed:
            told = merge(merge(told, nested(case.name, case.value)), case.along)
        return case.probe(tiny_run(**told))

    return look


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_field_changes_something(case: Case, probe_of: Callable[[Case, bool], object]) -> None:
    assert probe_of(case, False) != probe_of(case, True)


PROBES = {case.probe: case for case in reversed(CASES)}


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_probe_sees_no_difference_where_there_is_none(
    probe: Callable[[Run], object], probe_of: Callable[[Case, bool], object]
) -> None:
    assert probe_of(PROBES[probe], False) == probe_of(PROBES[probe], False)


def merge(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`into` with the tables of `changes` laid over its own."""
    result = dict(into)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = merge(inner or {}, value) if both else value
    return result
