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
    LAYERS,
    Measured,
    Sizes,
    figures,
    fit_products,
    rows_of,
    write_machine,
)
from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ModelShape
from ridgeline.plan.plan import plan_run, price
from ridgeline.plan.plan_text import run_of
from ridgeline.plan.question import physics, question, question_of_run
from ridgeline.run import Run
from ridgeline.train.measure import measure, precisions

SMALL = Sizes(
    rows=(32, 128),
    widths=(64, 128),
    vocab=96,
    square=64,
    sequences=(32, 64),
    copy_bytes=2**20,
    message_bytes=(2**10, 2**16),
    rounds=3,
    seconds=1.0,
)


@pytest.fixture(scope="module")
def found() -> list[Measured]:
    return measure([1, 2], SMALL, lambda what, share: None)


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
            assert f"{precision} step" in each.times
        assert all(value for _, value in figures(each, SMALL))


def test_progress_is_told_and_ends_near_one() -> None:
    told: list[float] = []
    measure([1], SMALL, lambda what, share: told.append(share))
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
    # at most ten constants per device and precision, and four of the stack
    for effective in told["effective"].values():
        stack = {"layer_s", "ends_s", "update_s"}
        assert set(effective) > stack
        assert len(effective["layer_s"]) + len(stack) - 1 <= 4
        assert len(set(effective) - stack) + len(told["measured"]) + 3 <= 10


def test_the_plan_gives_back_what_the_probed_decoder_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    # a layer takes 3 ms and 40 us a token, far more than its products
    times = {"ends 32": 0.0005, "ends 128": 0.012, "whole 32": 0.0005 + 0.00428 * LAYERS}
    times |= {"whole 128": 0.012 + 0.00812 * LAYERS, "reducing": 0.00906, "step": 0.01106}
    times |= {f"linear {m} {k} {n}": 1e-7 for m, k, n in SMALL.products}
    times |= {f"attention {length}": 1e-7 for length in SMALL.sequences} | {"square": 1e-7}
    told = {f"fp32 {name}": seconds for name, seconds in times.items()}
    told |= {"copy": 1e-3, "triad": 1e-3}
    write_machine([Measured(1, 2, ("fp32",), told, "PyTorch")], SMALL, local_file())

    def seconds(layers: int, micro_batch: int) -> tuple[float, float]:
        """Of the passes of a step of one micro-batch, and of its update."""
        shape = ModelShape(
            layers=layers, hidden=64, heads=1, ffn_hidden=128, vocab=96, max_sequence=32
        )
        batch = 32 * micro_batch
        asked = question(
            shape, "1xlocal", tokens=10**6, batch_tokens=batch, sequence=32, precision="fp32"
        )
        priced = price(asked, [Layout.model_validate(f"mb{micro_batch} fp32")])[0]
        update_s = priced.ledger.seconds.optimizer_s or 0.0
        return priced.step_s - update_s, update_s

    for micro_batch, layer_s in ((1, 0.00428), (4, 0.00812)):
        more, less = seconds(3, micro_batch)[0], seconds(1, micro_batch)[0]
        assert more - less == pytest.approx(2 * layer_s)
    assert seconds(1, 4)[0] == pytest.approx(0.00812 + 0.012)
    assert seconds(LAYERS, 4)[1] == pytest.approx(0.002, rel=0.01)  # the planner counts norms too


def test_the_probed_decoder_has_the_parameters_that_its_update_is_divided_by() -> None:
    shape = ModelShape(layers=LAYERS, hidden=64, heads=1, ffn_hidden=128, vocab=96, max_sequence=32)
    matrices = [p for p in Decoder(shape).parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == SMALL.parameters


def test_reducing_is_never_faster_than_the_collective_alone(found: list[Measured]) -> None:
    both = found[1]
    for factor in (0.0, 100.0):
        slow = {
            f"{name} reducing": both.times[f"{name} whole 32"] + factor * both.times["all-gather"]
            for name in both.precisions
        }
        rate = rows_of(replace(both, times={**both.times, **slow}), SMALL)[1]["measured"]["links"]
        small, large = SMALL.message_bytes
        took = both.times[f"all-reduce {large}"] - both.times[f"all-reduce {small}"]
        alone = (large - small) / max(took, 1e-9) / 1e9  # between two ranks each sends it once
        if factor:
            assert rate[0][1] < alone
        else:
            assert rate[0][1] == pytest.approx(alone)


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
        for name in ("ends_s", "update_s"):
            if line.startswith(name):
                lines[place] = f"{name} = {float(line.partition('=')[2]) * 10}"
        if line.startswith("layer_s"):
            few, many = tomllib.loads(line)["layer_s"]
            lines[place] = f"layer_s = [{few * 10}, {many * 10}]"
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
            measure([count], SMALL, lambda what, share: None)


def test_the_file_is_written_whole_or_not_at_all(
    machine: Path, found: list[Measured], tmp_path: Path
) -> None:
    before = machine.read_text(encoding="utf-8")
    with pytest.raises(MachineError, match="cannot be written"):
        write_machine(found, SMALL, machine / "below-a-file.toml")
    assert machine.read_text(encoding="utf-8") == before
    assert [path.name for path in machine.parent.iterdir()] == ["local.toml"]


def test_products_are_fitted_exactly_where_they_follow_the_formula() -> None:
    rate, edge = 2e12, 64.0
    seconds = {
        (m, k, n): 6 * m * k * n / rate * (1 + edge / m) * (1 + edge / k) * (1 + edge / n)
        for m in (128, 512)
        for k in (256, 1024)
        for n in (256, 1024)
    }
    fitted_rate, fitted_edge = fit_products(seconds)
    assert fitted_rate == pytest.approx(rate)
    assert fitted_edge == edge
