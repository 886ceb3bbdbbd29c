"""The audit: three ledgers of a folder side by side, as far as each is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import ridgeline
from ridgeline.audit.audit import Audit, Term, audit
from ridgeline.audit.audit_text import difference, listed, shown, table
from ridgeline.audit.history import read_history
from ridgeline.audit.witnesses import keep, read_witnesses, run_of
from ridgeline.errors import LayoutError, RunFolderError
from ridgeline.ledger import Ledger, Memory, read_ledger
from ridgeline.run import Run

WriteAudited = Callable[..., Path]


def term(found: Audit, name: str) -> Term:
    return next(each for each in found.terms if each.name == name)


def test_the_answer_has_these_fields(write_audited: WriteAudited) -> None:
    told = audit(write_audited("a")).json()
    assert list(told) == [
        *("run", "layout", "step", "tokens", "terms", "per_billion_tokens", "currency"),
        *("goodput", "notes"),
    ]
    assert list(told["terms"][0]) == [
        *("name", "planned", "rehearsed", "measured", "planned_difference"),
        *("rehearsed_difference", "sources"),
    ]
    assert list(told["goodput"]) == ["sessions", "held_s", "useful_s", "fraction", "badput_s"]
    json.dumps(told, allow_nan=False)


def test_each_term_has_its_difference_and_its_sources(write_audited: WriteAudited) -> None:
    found = audit(write_audited("a", {"compute_s": 2.0}))
    compute = term(found, "seconds.compute_s")
    assert compute.planned_difference == pytest.approx(-0.5)
    assert compute.rehearsed_difference is compute.rehearsed is None
    assert compute.sources["train"] == "host clock"
    assert "plan/block.py" in compute.sources["plan"]
    assert term(found, "memory.1.total_bytes").planned_difference == pytest.approx(-0.5)
    assert term(found, "sent.pipeline_bytes").planned_difference == 0


def test_what_nobody_knows_is_left_out_and_what_is_0_for_all_is_not_shown(
    write_audited: WriteAudited,
) -> None:
    found = audit(write_audited("a"))
    names = [each.name for each in found.terms]
    assert "seconds.evaluation_s" not in names
    assert "energy_j" not in names or term(found, "energy_j").planned
    assert "sent.tensor_bytes" in names
    assert "sent.tensor_bytes" not in [each.name for each in listed(found)]
    assert names.index("seconds.total_s") < names.index("memory.0.weights_bytes")
    assert names.index("memory.0.total_bytes") < names.index("memory.1.weights_bytes")


def test_a_rehearsal_that_lies_in_the_folder_stands_in_the_middle(
    write_audited: WriteAudited,
) -> None:
    folder = write_audited("a")
    run = run_of(read_history(folder))
    assert run is not None
    stages = (Memory(weights_bytes=6.0), Memory(weights_bytes=7.0))
    modules = {"mlp": 12.0}
    keep(folder, Ledger(witness="rehearse", memory=stages, flops_by_module=modules), run)
    found = audit(folder)
    assert term(found, "memory.1.weights_bytes").rehearsed == 7
    assert term(found, "flops_by_module.mlp").rehearsed == 12
    assert not [note for note in found.notes if "Rehearsed" in note]


def test_a_forecast_stays_until_the_layout_changes(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    audit(folder)
    path = folder / "ledgers" / "plan.json"
    first = read_ledger(path)
    assert first.layout == "pp2 mb2 bf16"
    path.write_text(first.model_copy(update={"mfu": 0.123}).to_json(), encoding="utf-8")
    assert term(audit(folder), "mfu").planned == 0.123
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.2.toml").write_text(text.replace("pp2 mb2", "dp2 mb2"), encoding="utf-8")
    found = audit(folder)
    assert found.layout == "dp2 mb2 bf16"
    assert read_ledger(path).layout == "dp2 mb2 bf16"
    assert term(found, "mfu").planned != 0.123
    assert any("'pp2 mb2 bf16', before the run went on" in note for note in found.notes)


def test_a_longer_budget_is_planned_anew(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    short = audit(folder)
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.2.toml").write_text(text.replace("steps = 4", "steps = 40"), encoding="utf-8")
    long = audit(folder)
    planned, ten_times = term(short, "train_s").planned, term(long, "train_s").planned
    assert planned is not None
    assert ten_times == pytest.approx(10 * planned)
    assert long.per_billion_tokens == short.per_billion_tokens


def test_the_planned_pipeline_is_kept_beside_the_plan(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    audit(folder)
    spans = read_witnesses(read_history(folder)).planned_spans
    assert spans is not None
    # 8 sequences in micro-batches of 2: four of them, forward and backward on each of two ranks
    assert [len(rank) for rank in spans.ranks] == [8, 8]
    audit(write_audited("b", layout="dp2 mb2 bf16"))
    assert not (folder.parent / "b" / "ledgers" / "plan_timeline.json").exists()


def test_a_run_killed_early_shows_what_there_is(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    (folder / "ledgers" / "train.json").unlink()
    (folder / "environment.json").unlink()
    found = audit(folder)
    assert term(found, "seconds.total_s").measured == 1.5
    assert term(found, "seconds.total_s").sources["train"].startswith("metrics.jsonl")
    assert term(found, "tokens_per_s").measured == 192
    assert term(found, "seconds.compute_s").measured is None
    assert (found.step, found.tokens) == (4, 1024)
    assert found.goodput.held_s == 9
    assert any("no ledgers/train.json" in note for note in found.notes)


def test_damaged_files_are_said_and_left_out(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    (folder / "ledgers" / "train.json").write_text('{"witness": "tr', encoding="utf-8")
    (folder / "ledgers" / "timeline.json").write_text('{"ranks": [[{"kind": "X"}]]}')
    notes = audit(folder).notes
    assert any(note.startswith("train.json is left out: it is not JSON") for note in notes)
    assert any(note.startswith("timeline.json is left out") for note in notes)


def test_this_machine_unmeasured_is_a_dash_and_what_to_do(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text.replace("A100-SXM-80GB", "local"), encoding="utf-8")
    said = " ".join(audit(folder).notes)
    assert "'cuda'" in said  # `local` is a CPU, and the run was on none
    assert "cluster.device" in said
    (folder / "environment.json").write_text('{"device": "cpu"}', encoding="utf-8")
    found = audit(folder)
    assert "ridgeline probe" in " ".join(found.notes)
    assert term(found, "seconds.compute_s").planned is None
    assert not (folder / "ledgers" / "plan.json").exists()


def test_a_folder_whose_run_file_is_no_run_still_shows_its_time(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "step_s": 2.0}\n', encoding="utf-8")
    found = audit(tmp_path)
    assert found.layout is None
    assert term(found, "seconds.total_s").measured == 2
    assert any("run.toml is missing or is not a run" in note for note in found.notes)


def test_an_empty_or_foreign_folder_is_one_clear_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunFolderError, match="ridgeline train"):
            audit(folder)


def test_a_billion_tokens_in_device_time_energy_and_money(write_audited: WriteAudited) -> None:
    folder = write_audited("a")
    path = folder / "ledgers" / "train.json"
    measured = read_ledger(path).model_copy(update={"step_energy_j": 512.0, "tokens_per_s": 100.0})
    path.write_text(measured.to_json(), encoding="utf-8")
    found = audit(folder)
    rows = {each.name: each for each in found.per_billion_tokens}
    assert rows["device_s"].measured == 2 * 1e9 / 100
    assert rows["energy_j"].measured == 512 / (8 * 32) * 1e9  # 8 sequences of 32 tokens a step
    planned, budget = term(found, "energy_j"), 4 * 8 * 32
    assert planned.planned is not None
    assert rows["energy_j"].planned == pytest.approx(planned.planned / budget * 1e9)


def test_the_table_for_people(write_audited: WriteAudited) -> None:
    said = table(audit(write_audited("a", {"compute_s": 2.0})))
    lines = said.splitlines()
    assert lines[0].startswith("run a  layout pp2 mb2 bf16  step 4, 1.02k tokens")
    row = next(line.split() for line in lines if line.startswith("  compute "))
    assert row[2] == "—"
    assert row[4] == "-50.0%"
    assert "goodput 66.7% of 9.00s held in 1 session" in said  # 6 s in steps of 9 s
    assert max(map(len, lines[3:20])) <= 100


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seconds.bubble_s", 0.5, "500.0ms"),
        ("memory.0.total_bytes", 2.0**30, "1.00 GiB"),
        ("tokens_per_s", 12345.0, "12.3k"),
        ("mfu", 0.4, "40.0%"),
        ("energy_j", 2e9, "2.00GJ"),
        ("money", 12.0, "12 USD"),
        ("calls.data", 3.0, "3"),
        ("energy_j", None, "—"),
    ],
)
def test_values_are_shown_in_a_readers_units(name: str, value: float | None, words: str) -> None:
    assert shown(name, value, "USD") == words


def test_differences_tell_equal_from_nearly_equal() -> None:
    values = [None, 0.0, 1e-6, 0.25, -0.5, 99.0]
    assert [difference(v) for v in values] == ["—", "0%", "<0.1%", "+25.0%", "-50.0%", "x100"]


def test_the_verb_plans_and_rehearses_a_run_once(write_audited: WriteAudited) -> None:
    folder = write_audited("a", layout="dp2 mb4 bf16")
    found = ridgeline.audit(folder)
    weights = term(found, "memory.0.weights_bytes")
    assert weights.planned == pytest.approx(weights.rehearsed, rel=0.03)
    path = folder / "ledgers" / "rehearse.json"
    assert read_ledger(path).layout == "dp2 mb4 bf16"
    written = path.stat().st_mtime_ns
    assert ridgeline.audit(folder) == found
    assert path.stat().st_mtime_ns == written


def test_a_run_that_cannot_be_rehearsed_says_why(write_audited: WriteAudited) -> None:
    def refuse(run: Run) -> Ledger:
        raise LayoutError("this layout", "it cannot be traced")

    found = audit(write_audited("a"), refuse)
    assert "Rehearsed is a dash: this layout: it cannot be traced." in found.notes
