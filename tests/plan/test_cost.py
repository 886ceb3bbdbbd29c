"""Days, money and energy: Llama 3.1 405B to the digit, what stays a dash, what is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import ridgeline
from ridgeline.cli import verbs
from ridgeline.errors import MachineError, ModelError, PlanError
from ridgeline.machine.cluster import Cluster, parse_devices
from ridgeline.model.catalogue import entry
from ridgeline.model.shape import ModelShape
from ridgeline.plan.amounts import count_of
from ridgeline.plan.cost import (
    DAY,
    KWH,
    Cost,
    Rates,
    centre_capital,
    cost,
    flops_6nd,
    training_s,
)
from ridgeline.plan.plan import plan
from ridgeline.plan.question import question

LLAMA = entry("llama3.1-405b").shape
TOKENS = 15 * 10**12


def h100(devices: int = 16_000) -> tuple[int, Cluster]:
    return parse_devices(f"{devices}xH100-SXM-80GB")


def test_llama_3_405b_to_the_digit() -> None:
    devices, cluster = h100()
    rates = Rates(
        device_price=30_000, other_capital=0.5, price_per_kwh=0.083, device_w=700, pue=2.0
    )
    result = cost(LLAMA, TOKENS, devices, cluster, days=54, rates=rates)
    assert result.parameters == 405_853_388_800
    assert result.non_embedding_parameters == 405_853_388_800 - 2 * 128_256 * 16_384
    assert f"{result.flops_6nd:.4e}" == "3.6149e+25"
    assert f"{result.flops:.4e}" == "3.7859e+25"
    assert f"{result.flops_full_attention:.4e}" == "3.9381e+25"
    assert result.peak_flops == 989e12  # dense; 1,979 counts sparsity
    assert round(result.at_peak_s / DAY, 2) == 27.69
    assert round(result.mfu, 4) == 0.5128  # what 54 days on 16,000 would have meant
    assert result.device_capital == 480e6
    assert result.capital == 960e6
    assert result.power_w == 22.4e6
    assert result.energy_j is not None
    assert round(result.energy_j / KWH / 1e6, 2) == 29.03
    assert result.electricity is not None
    assert round(result.electricity / 1e6, 2) == 2.41
    assert result.ownership == result.capital + result.electricity
    assert round(100 * result.electricity / result.ownership, 2) == 0.25
    assert result.rent is None
    assert result.wall_s is None


def test_pieces_of_it_by_hand() -> None:
    assert flops_6nd(405e9, 15e12) == pytest.approx(3.645e25)
    assert round(training_s(3.8e25, 16_000, 1979e12) / DAY, 1) == 13.9
    assert round(training_s(3.8e25, 16_000, 989e12) / DAY, 1) == 27.8
    assert round(training_s(3.8e25, 16_000, 989e12, 0.43) / DAY) == 65
    assert round(training_s(3.8e25, 16_000, 989e12, 0.38) / DAY) == 73
    assert centre_capital(16_000, 30_000, 0.5) == 960e6
    assert centre_capital(10, 3.0, 0.0) == 30


def test_failures_lengthen_time_energy_and_rent_alike() -> None:
    devices, cluster = parse_devices("16384xLlama 3 cluster")
    plain = cost(LLAMA, TOKENS, devices, cluster, mfu=0.4, rates=Rates(price_per_hour=2.0))
    rates = Rates(price_per_hour=2.0, checkpoint_s=10, restart_s=600)
    failing = cost(LLAMA, TOKENS, devices, cluster, mfu=0.4, rates=rates)
    assert failing.goodput is not None
    assert 0.90 < failing.goodput < 0.92
    assert failing.mtbf_s == pytest.approx(54 * DAY / 419, rel=1e-3)
    assert failing.wall_s == pytest.approx(failing.train_s / failing.goodput)
    for term in ("device_hours", "energy_j", "rent"):
        ratio = getattr(failing, term) / getattr(plain, term)
        assert ratio == pytest.approx(1 / failing.goodput)
    assert plain.rent == pytest.approx(plain.device_hours * 2)
    assert any("without failures" in note for note in plain.notes)


def test_what_is_not_known_is_none() -> None:
    devices, cluster = h100(8)
    result = cost(entry("gpt3-175b").shape, 10**9, devices, cluster, mfu=0.1)
    known = {name for name, value in asdict(result).items() if value is not None}
    assert not known & {"capital", "electricity", "ownership", "rent", "co2_kg", "goodput"}


@given(st.floats(0.01, 1), st.integers(1, 10**6), st.integers(10**6, 10**14))
def test_days_scale_as_they_must(mfu: float, devices: int, tokens: int) -> None:
    _, cluster = h100(1)
    result = cost(LLAMA, tokens, devices, cluster, mfu=mfu)
    assert result.train_s == pytest.approx(result.at_peak_s / mfu)
    assert result.tokens_per_s * result.train_s == pytest.approx(tokens)
    assert result.mfu_full_attention > result.mfu
    back = cost(LLAMA, tokens, devices, cluster, days=result.train_s / DAY * (1 + 1e-12))
    assert back.mfu == pytest.approx(mfu)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mfu": 1.2}, "mfu 1.2"),
        ({"mfu": 40}, "0.4"),
        ({"mfu": 0}, "above 0"),
        ({"mfu": -0.4}, "above 0"),
        ({"mfu": math.nan}, "mfu nan"),
        ({}, "exactly one"),
        ({"mfu": 0.4, "days": 54}, "exactly one"),
        ({"days": 20}, r"27.69 days.*MFU of 1.38"),
        ({"days": -1}, "days"),
        ({"days": math.nan}, "days"),
        ({"mfu": 0.4, "sequence": 0}, "sequence 0"),
        ({"mfu": 0.4, "precision": "fp64"}, "bf16, fp16, fp8, fp32"),
        ({"mfu": 0.4, "tokens": 0}, "tokens 0"),
        ({"mfu": 0.4, "tokens": -5}, "tokens -5"),
        ({"mfu": 0.4, "devices": 0}, "devices 0"),
    ],
)
def test_absurd_questions_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    _, cluster = h100()
    tokens, devices = change.pop("tokens", TOKENS), change.pop("devices", 16_000)
    with pytest.raises(PlanError, match=says):
        cost(LLAMA, tokens, devices, cluster, **change)


@pytest.mark.parametrize(
    "absurd",
    [
        {"device_price": -1},
        {"device_price": math.nan},
        {"price_per_hour": math.inf},
        {"price_per_kwh": -0.1},
        {"pue": 0.5},
        {"pue": math.nan},
        {"other_capital": 1.0},
        {"other_capital": 50},
        {"device_w": 0},
        {"grid_g_per_kwh": -3},
        {"failures_per_device_hour": 0},
        {"checkpoint_s": 0},
        {"restart_s": -1},
        {"currency": "euro"},
    ],
    ids=str,
)
def test_absurd_rates_are_refused_by_name(absurd: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(absurd)).replace("_", " ").split()[0]):
        Rates(**absurd)


@pytest.mark.parametrize(
    ("text", "count"),
    [("15T", 15 * 10**12), ("1.5B", 1_500_000_000), ("380e9", 380 * 10**9), ("3,072", 3072)],
)
def test_counts_as_people_write_them(text: str, count: int) -> None:
    assert count_of(text, "tokens") == count


@pytest.mark.parametrize("text", ["", "T", "-5", "nan", "1.5", "15 trillion", "1e999", "0", "15m"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match="tokens"):
        count_of(text, "tokens")


def test_jobs_that_never_end_and_sums_that_overflow_are_refused() -> None:
    devices, cluster = h100()
    hopeless = Rates(failures_per_device_hour=1.0, checkpoint_s=60, restart_s=3600)
    with pytest.raises(PlanError, match="it never ends"):
        cost(LLAMA, TOKENS, devices, cluster, mfu=0.4, rates=hopeless)
    with pytest.raises(PlanError, match="too large"):
        cost(LLAMA, TOKENS, devices, cluster, mfu=1e-320)
    with pytest.raises(PlanError, match="too large"):
        cost(LLAMA, TOKENS, devices, cluster, mfu=0.4, rates=Rates(device_price=1e308))


def test_costs_are_reckoned_without_torch() -> None:
    program = "import sys, ridgeline.plan.cost_text, ridgeline.plan.timeline_picture"
    program += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


COMMAND = ["cost", "llama3.1-405b", "--tokens", "15T", "--on", "16000xH100-SXM-80GB"]


def test_json_has_these_fields() -> None:
    told = CliRunner().invoke(verbs, [*COMMAND, "--mfu", "0.4", "--json"], catch_exceptions=False)
    assert list(json.loads(told.output)) == [
        *("model", "parameters", "non_embedding_parameters", "tokens", "sequence", "devices"),
        *("device", "cluster", "precision", "peak_flops", "flops_6nd", "flops"),
        *("flops_full_attention", "mfu", "mfu_full_attention", "at_peak_s", "train_s"),
        *("tokens_per_s", "goodput", "mtbf_s", "checkpoint_interval_s", "wall_s"),
        *("device_hours", "power_w", "energy_j", "co2_kg", "device_capital", "capital"),
        *("electricity", "ownership", "rent", "currency", "notes"),
    ]
    assert list(Cost.__dataclass_fields__) == list(json.loads(told.output))


def test_the_command_says_days_and_dashes() -> None:
    told = CliRunner().invoke(verbs, [*COMMAND, "--mfu", "0.4"], catch_exceptions=False).output
    assert "69.2 days" in told
    assert "27.7 days" in told
    assert told.count("—") == 7
    priced = ["--days", "54", "--device-price", "30000", "--other-capital", "0.5", "--electricity"]
    priced += ["0.083", "--watts", "700", "--pue", "2", "--grid", "390", "--price-per-hour", "2"]
    told = CliRunner().invoke(verbs, [*COMMAND, *priced], catch_exceptions=False).output
    for figure in ("29.03 GWh", "22.40 MW", "2.41 M USD", "960.00 M USD", "0.25% of it"):
        assert figure in told


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cost", "llama4", "--tokens", "15T", "--on", "8xH100", "--mfu", "0.4"], ModelError),
        ([*COMMAND[:4], "--on", "8xMI250X", "--mfu", "0.4"], MachineError),
        ([*COMMAND[:4], "--on", "H100", "--mfu", "0.4"], MachineError),
        ([*COMMAND[:2], "--tokens", "many", *COMMAND[4:], "--mfu", "0.4"], PlanError),
    ],
)
def test_the_command_names_what_it_cannot_answer(
    arguments: list[str], error: type[Exception]
) -> None:
    assert isinstance(CliRunner().invoke(verbs, arguments).exception, error)


def test_where_nothing_says_how_fast_the_planner_does() -> None:
    found = ridgeline.cost("llama2-7b", 10**12, "64xA100")
    asked = question(entry("llama2-7b").shape, "64xA100", tokens=10**12)
    best = plan(asked, top=1).layouts[0]
    assert found.mfu == best.mfu
    assert found.train_s == pytest.approx(best.train_s)
    assert found.notes[0].startswith(f"MFU as planned for the fastest layout, '{best.layout}'")
    said = CliRunner().invoke(verbs, [*COMMAND[:2], "--tokens", "15T", "--on", "16384xH100"])
    assert "MFU as planned" in said.output


def test_a_run_that_hardly_moves_is_no_run() -> None:
    _, cluster = h100()
    rates = Rates(failures_per_device_hour=2e-5, checkpoint_s=10, restart_s=600_000)
    with pytest.raises(PlanError, match="never ends") as caught:
        cost(LLAMA, TOKENS, 16_384, cluster, mfu=0.4, rates=rates)
    fewer = int(caught.value.remedy.split()[0])
    goodput = cost(LLAMA, TOKENS, fewer, cluster, mfu=0.4, rates=rates).goodput
    assert goodput is not None
    assert goodput > 0.5


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("0", "1"), ("-5", "1"), ("1.4", "1"), ("2.6", "3"), ("1e300", "1e+18"), ("nan", "15T")],
)
def test_a_refused_count_names_the_nearest_that_is_not(text: str, nearest: str) -> None:
    with pytest.raises(PlanError) as caught:
        count_of(text, "tokens")
    assert caught.value.remedy.startswith(nearest)


@pytest.mark.parametrize(
    ("rates", "nearest"),
    [({"price_per_hour": -3}, "3"), ({"pue": 0.5}, "1"), ({"other_capital": 50}, "0.5")],
)
def test_a_refused_rate_names_the_nearest_that_is_not(rates: dict[str, Any], nearest: str) -> None:
    with pytest.raises(PlanError) as caught:
        Rates(**rates)
    assert re.match(rf"{re.escape(nearest)}\b", caught.value.remedy)


def test_experts_count_as_visited() -> None:
    _, cluster = h100(8)
    shape: ModelShape = entry("mixtral-8x7b").shape
    result = cost(shape, 10**9, 8, cluster, mfu=0.3)
    assert result.parameters > 46e9
    assert 12e9 < result.non_embedding_parameters < 13e9
