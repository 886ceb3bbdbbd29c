"""The probe: this machine measured for real, and the file that the planner reads."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ridgeline.errors import MachineError
from ridgeline.layout.layout import Layout
from ridgeline.machine.cluster import cluster, parse_devices
from ridgeline.machine.device import device
from ridgeline.machine.local import local_file, local_processes
from ridgeline.machine.probe import (
    Measured,
    Sizes,
    figures,
    fit_products,
    precisions,
    probe,
    write_machine,
)
from ridgeline.plan.plan import plan_run, price
from ridgeline.plan.plan_text import run_of
from ridgeline.plan.question import physics, question_of_run
from ridgeline.run import Run

SMALL = Sizes(
    rows=64,
    widths=(64, 128),
    square=64,
    sequences=(32, 64),
    copy_bytes=2**20,
    message_bytes=(2**10, 2**16),
    rounds=3,
    seconds=1.0,
)


@pytest.fixture(scope="module")
def found() -> list[Measured]:
    return probe([1, 2], SMALL, lambda what, share: None)


@pytest.fixture
def machine(found: list[Measured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine measured, in a user's folder of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    write_machine(found, SMALL, local_file())
    return local_file()


def test_every_action_took_time_with_each_number_of_processes(found: list[Measured]) -> None:
    assert [each.processes for each in found] == [1, 2]
    for each in found:
        assert all(seconds > 0 for seconds in each.times.values())
        assert ("all-gather" in each.times) == (each.processes > 1)
        for precision in precisions():
            assert f"{precision} dispatch" in each.times
        assert all(value for _, value in figures(each, SMALL))


def test_progress_is_told_and_ends_near_one() -> None:
    told: list[float] = []
    probe([1], SMALL, lambda what, share: told.append(share))
    assert told == sorted(told)
    assert told[0] < 0.3
    assert 0.5 < told[-1] <= 1


def test_the_file_reads_back_as_devices_and_clusters(machine: Path, found: list[Measured]) -> None:
    rows = tomllib.loads(machine.read_text(encoding="utf-8"))
    half = device("local/2")
    told = rows["devices"]["local/2"]
    assert half.memory_bandwidth == pytest.approx(told["measured"]["memory_tb_s"] * 1e12)
    assert set(half.origins.values()) == {"measured"}
    assert set(half.effective) == set(precisions()) == set(half.peak_flops)
    assert device("local").memory_bytes == pytest.approx(2 * (half.memory_bytes or 0))
    both = cluster("local/2")
    assert (both.node.devices, both.nodes, both.device) == (2, 1, half)
    assert both.node.hop_s is not None
    assert parse_devices("2xlocal") == (2, both) == parse_devices("local")
    assert parse_devices("1xlocal") == (1, cluster("local"))
    assert local_processes() == 2
    # at most ten constants per device and precision
    for effective in told["effective"].values():
        assert len(effective) + len(told["measured"]) + 3 <= 10


def test_a_run_on_this_machine_is_planned(machine: Path, tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(layout="auto")
    found = plan_run(run)
    assert found.question.devices == 2
    assert found.best_trainable is not None
    assert found.best_trainable.extrapolated  # no published run speaks for this device
    written = tomllib.loads(run_of(found, run))
    assert written["cluster"] == {"device": "local", "devices": 2}
    with pytest.raises(MachineError, match="measured with 2"):
        physics(replace(found.question, devices=4))
    with pytest.raises(MachineError, match="Ridgeline's own"):
        physics(replace(found.question, stack="megatron-core"))
    with pytest.raises(MachineError, match="fp8"):
        physics(replace(found.question, precision="fp8"))
    alone = question_of_run(tiny_run(layout="mb4 fp32"))
    assert (alone.devices, alone.cluster.name, alone.precision) == (1, "local", "fp32")


def test_a_slower_machine_is_planned_slower(machine: Path, tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(layout="dp2 mb4 fp32")
    layouts = [Layout.model_validate("dp2 mb4 fp32")]
    (before,) = price(question_of_run(run), layouts)
    lines = machine.read_text(encoding="utf-8").splitlines()
    for place, line in enumerate(lines):
        for name in ("matrix_tflops", "attention_tflops", "memory_tb_s"):
            if line.startswith(name):
                lines[place] = f"{name} = {float(line.partition('=')[2]) / 10}"
    machine.write_text("\n".join(lines), encoding="utf-8")
    (after,) = price(question_of_run(run), layouts)
    assert 1.5 * before.step_s < after.step_s <= 11 * before.step_s


def test_a_machine_that_was_not_measured_says_how_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., Run]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for ask in (
        lambda: device("local"),
        lambda: parse_devices("2xlocal"),
        lambda: question_of_run(tiny_run()),
    ):
        with pytest.raises(MachineError, match="not been measured") as caught:
            ask()
        assert "ridgeline probe" in caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[devices", "[devices"[:-2]),
        ("edge = ", "edges = "),
        ("hop_s = ", "hop_s = -1"),
        ("memory_tb_s = ", "memory_tb_s = nan #"),
        ('device = "local/2"', 'device = "local/3"'),
        ("links = [[", 'links = "a" #'),
        ("[devices", "["),
    ],
)
def test_a_bad_file_is_a_named_error(machine: Path, old: str, new: str) -> None:
    text = machine.read_text(encoding="utf-8")
    assert old in text
    machine.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(MachineError):
        parse_devices("2xlocal")


def test_what_was_not_measured_or_is_too_much_is_refused(machine: Path) -> None:
    with pytest.raises(MachineError, match="measured with 1, 2") as caught:
        parse_devices("3xlocal")
    assert "--processes 1,2,3" in caught.value.remedy
    with pytest.raises(MachineError, match="counted once"):
        parse_devices("3xlocal/2")
    for count in (0, 10**6):
        with pytest.raises(MachineError, match="core"):
            probe([count], SMALL, lambda what, share: None)


def test_the_file_is_written_whole_or_not_at_all(
    machine: Path, found: list[Measured], tmp_path: Path
) -> None:
    before = machine.read_text(encoding="utf-8")
    with pytest.raises(MachineError, match="cannot be written"):
        write_machine(found, SMALL, machine / "below-a-file.toml")
    assert machine.read_text(encoding="utf-8") == before
    assert [path.name for path in machine.parent.iterdir()] == ["local.toml"]


def test_products_are_fitted_exactly_where_they_follow_the_formula() -> None:
    rows, rate, edge = 512, 2e12, 64.0
    seconds = {
        (k, n): 6 * rows * k * n / rate * (1 + edge / rows) * (1 + edge / k) * (1 + edge / n)
        for k in (256, 1024)
        for n in (256, 1024)
    }
    fitted_rate, fitted_edge = fit_products(rows, seconds)
    assert fitted_rate == pytest.approx(rate)
    assert fitted_edge == edge
