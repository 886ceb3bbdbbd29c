"""`ridgeline plan`: the answer's form, its sanity, and what it says to impossible questions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ridgeline.cli import verbs
from ridgeline.errors import LayoutError, MachineError, ModelError, PlanError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.model.catalogue import entry
from ridgeline.plan.plan import Plan, plan, price, question
from ridgeline.run import read_run

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
FIELDS = [
    "layout", "step_s", "interval_s", "mfu", "mfu_full_attention", "hfu", "tokens_per_s",
    "memory_bytes", "capacity_bytes", "fits", "train_s", "money", "currency", "energy_j",
    "bound_by", "extrapolated", "trainable",
]  # fmt: skip


def small(**changes: object) -> Plan:
    """A quick plan."""
    asked = question(entry("llama2-7b").shape, "16xA100", tokens=10**12, batch_tokens=2**22)
    return plan(asked, **changes)  # type: ignore[arg-type]


def test_the_json_has_the_promised_fields() -> None:
    words = ["plan", "llama2-7b", "--on", "16xA100", "--batch", "4M", "--json", "--top", "3"]
    result = CliRunner().invoke(verbs, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == [
        "layouts", "asked", "best_trainable", "baseline_s", "assumed", "space", "arithmetic_ok",
        "memory_ok", "search_s",
    ]  # fmt: skip
    assert len(found["layouts"]) == 3
    for each in found["layouts"]:
        assert list(each) == FIELDS
        assert each["fits"] and each["money"] is None and each["currency"] is None
        assert each["interval_s"][0] < each["step_s"] < each["interval_s"][1]
        assert 0 < each["mfu"] < each["mfu_full_attention"] < 1
    assert found["space"] > found["arithmetic_ok"] > found["memory_ok"] > 0


def test_layouts_come_in_order_divide_the_run_and_fit() -> None:
    found = small(top=20)
    times = [each.step_s for each in found.layouts]
    assert times == sorted(times)
    for each in found.layouts:
        check(each.layout, found.question.shape, 4096, 1024, 16)
        assert each.memory_bytes <= each.capacity_bytes
        assert each.ledger.memory_bytes is not None
        assert 0.9 * each.memory_bytes < each.ledger.memory_bytes <= each.memory_bytes * 1.0001
        assert len(each.ledger.memory) == each.layout.pipeline
        assert each.ledger.mfu == each.mfu


def test_a_ledgers_causes_add_up_to_its_step() -> None:
    for each in small(top=20).layouts:
        seconds = each.ledger.seconds.model_dump()
        total = seconds.pop("total_s")
        assert sum(value for value in seconds.values() if value) == pytest.approx(total, rel=1e-9)


def test_a_price_is_paid_and_an_unknown_one_is_a_dash() -> None:
    words = ["plan", "llama2-7b", "--on", "16xA100", "--top", "1", "--json"]
    paid = CliRunner().invoke(verbs, [*words, "--price-per-hour", "2"])
    best = json.loads(paid.output)["layouts"][0]
    assert best["money"] == pytest.approx(best["train_s"] / 3600 * 16 * 2)
    assert best["currency"] == "USD"


def test_failures_lengthen_the_run() -> None:
    words = ["plan", "llama2-7b", "--on", "16xA100", "--top", "1", "--json"]
    plain = json.loads(CliRunner().invoke(verbs, words).output)["layouts"][0]
    failing = [*words, "--failures", "2e-2", "--checkpoint", "60", "--restart", "600"]
    slow = json.loads(CliRunner().invoke(verbs, failing).output)["layouts"][0]
    assert slow["train_s"] > plain["train_s"] * 1.05
    assert slow["step_s"] == plain["step_s"]


def test_given_layouts_are_priced_even_where_they_do_not_fit() -> None:
    asked = question(entry("llama2-70b").shape, "8xA100", batch_tokens=2**20)
    (each,) = price(asked, [Layout.model_validate("dp8 mb1 bf16")])
    assert not each.fits
    assert each.trainable
    assert each.step_s > 0


def test_more_recomputation_is_less_memory_and_more_time() -> None:
    asked = question(entry("llama2-7b").shape, "8xH100", batch_tokens=2**20)
    layouts = [f"dp8 zero3 {word}" for word in ("none", "selective", "full")]
    priced = price(asked, [Layout.model_validate(text) for text in layouts])
    assert [p.step_s for p in priced] == sorted(p.step_s for p in priced)
    assert [p.memory_bytes for p in priced] == sorted(
        (p.memory_bytes for p in priced), reverse=True
    )
    assert priced[2].hfu > priced[2].mfu


def test_nothing_fits_says_by_how_much_and_what_would() -> None:
    with pytest.raises(PlanError) as caught:
        plan(question(entry("llama3.1-405b").shape, "8xH100", batch_tokens=2**24))
    assert "too much" in caught.value.rule
    assert "devices ('" in caught.value.remedy


def test_a_run_that_nothing_divides_is_refused() -> None:
    asked = question(entry("gpt2").shape, "13xA100", batch_tokens=5 * 1024, sequence=1024)
    with pytest.raises(LayoutError, match="no four numbers") as caught:
        plan(asked)
    assert caught.value.remedy.startswith("12 devices")
    assert plan(replace(asked, devices=12)).layouts


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["llama2-7b", "--on", "8xMI250X"], MachineError),
        (["llama2-7b", "--on", "8xabacus"], MachineError),
        (["llama2-7b", "--on", "8xA100", "--precision", "fp8"], MachineError),
        (["llama2-7b", "--on", "8xA100", "--stack", "magic"], MachineError),
        (["llama2-7b", "--on", "8xCS-2"], MachineError),
        (["llama9-7b", "--on", "8xA100"], ModelError),
        (["deepseek-v3", "--on", "2048xH100"], ModelError),
        (["llama2-7b", "--on", "8xA100", "--tokens", "nan"], PlanError),
        (["llama2-7b", "--on", "8xA100", "--tokens=-5"], PlanError),
        (["llama2-7b", "--on", "8xA100", "--batch", "100"], PlanError),
        (["gpt2", "--on", "8xA100", "--seq", "4096"], PlanError),
        (["llama2-7b", "--on", "8xA100", "--price-per-hour", "nan"], PlanError),
    ],
)
def test_impossible_questions_are_named_errors(words: list[str], named: type[Exception]) -> None:
    result = CliRunner().invoke(verbs, ["plan", *words])
    assert isinstance(result.exception, named), result.output


def test_an_uncalibrated_machine_is_marked() -> None:
    found = plan(question(entry("llama2-7b").shape, "64xMI300X", batch_tokens=2**22), top=1)
    best = found.layouts[0]
    assert best.extrapolated
    calibrated = small(top=1).layouts[0]
    assert not calibrated.extrapolated
    width = best.interval_s[1] / best.step_s
    assert width > calibrated.interval_s[1] / calibrated.step_s


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_planned(path: Path) -> None:
    result = CliRunner().invoke(verbs, ["plan", str(path), "--on", "8xA100", "--explain"])
    assert result.exit_code == 0, result.exception
    assert "seconds of a step" in result.output


def test_the_written_run_is_one_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    words = ["plan", "gpt2", "--on", "8xA100", "--batch", "524288", "--write", str(path)]
    result = CliRunner().invoke(verbs, words)
    assert result.exit_code == 0, result.exception
    run = read_run(path)
    assert run.cluster.devices == 8
    assert isinstance(run.layout, Layout)
    assert run.layout.world == 8


def test_405b_on_16384_h100_is_answered_without_torch() -> None:
    """Start to answer in the time that the docs promise, with much to spare on a busy machine."""
    program = (
        "import sys, time; begun = time.perf_counter()\n"
        "from ridgeline.cli import verbs\n"
        "words = 'plan llama3-405b --on 16384xH100 --tokens 15T --batch 16M --seq 8192'.split()\n"
        "verbs(words, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "assert time.perf_counter() - begun < 10\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "870,300 divide the run" in done.stdout


def test_the_verb_is_a_function_too() -> None:
    import ridgeline

    found = ridgeline.plan(read_run(EXAMPLES[0]), on="8xA100", top=2)
    assert len(found.layouts) == 2
