"""Meters on the files that Linux has: counters that begin again, powers, and what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ridgeline.machine.energy import Meter, accelerator_meter, cpu_meter

ADDRESS = "0000:c1:00.0"


def zone(
    root: Path, name: str, says: str, microjoules: int | None, turn: int = 262_143_328_850
) -> Path:
    folder = root / "class/powercap" / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{says}\n")
    (folder / "max_energy_range_uj").write_text(f"{turn}\n")
    if microjoules is not None:
        (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def hwmon(root: Path, file: str, value: int) -> Path:
    folder = root / "bus/pci/devices" / ADDRESS / "hwmon/hwmon3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(f"{value}\n")
    return folder / file


def made(meter: Meter | None) -> Meter:
    assert meter is not None
    return meter


def test_packages_and_their_memory_add_up_and_what_is_within_them_does_not(tmp_path: Path) -> None:
    files = [
        zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000),
        zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000),
        zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000),
        zone(tmp_path, "intel-rapl:2", "psys", 9_000_000),
    ]
    (tmp_path / "class/powercap/intel-rapl").mkdir()  # the driver itself: no zone
    meter = made(cpu_meter(tmp_path))
    assert meter.joules() == 0
    for file, more in zip(files, (1, 20, 300, 4000, 50_000), strict=True):
        file.write_text(f"{int(file.read_text()) + more * 1_000_000}\n")
    assert meter.joules() == 1 + 20 + 4000
    assert meter.source == "RAPL package-0, dram, package-1"


def test_a_counter_that_began_again_counts_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 262_000_000_000, turn=262_143_000_000)
    meter = made(cpu_meter(tmp_path))
    file.write_text("57000000\n")
    assert meter.joules() == pytest.approx(143 + 57)
    file.write_text("58000000\n")
    assert meter.joules() == pytest.approx(201)


def test_readings_are_rare_but_an_answer_is_of_now(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = made(cpu_meter(tmp_path))
    file.write_text("3000000\n")
    meter.poll()
    assert meter.total_j == 0
    meter.at_s -= 11
    meter.poll()
    assert meter.total_j == 3


@pytest.mark.parametrize("hidden", ["intel-rapl:0", "intel-rapl:1"])
def test_what_may_not_be_read_is_unknown_and_never_a_part(tmp_path: Path, hidden: str) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1"):
        zone(tmp_path, name, f"package-{name[-1]}", None if name == hidden else 5)
    assert cpu_meter(tmp_path) is None


def test_a_machine_that_tells_nothing_has_no_meter(tmp_path: Path) -> None:
    assert cpu_meter(tmp_path) is None
    assert accelerator_meter(ADDRESS, tmp_path) is None


def test_a_counter_that_is_gone_makes_the_sum_unknown(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    meter = made(cpu_meter(tmp_path))
    file.unlink()
    assert meter.joules() is None
    file.write_text("6000000\n")
    assert meter.joules() is None


def test_an_accelerator_with_a_counter_is_read_by_it(tmp_path: Path) -> None:
    hwmon(tmp_path, "power1_average", 250_000_000)
    file = hwmon(tmp_path, "energy1_input", 10_000_000)
    meter = made(accelerator_meter(ADDRESS, tmp_path))
    file.write_text("16500000\n")
    assert meter.joules() == 6.5
    assert meter.source == "hwmon energy1_input"
    file.write_text("500000\n")
    assert meter.joules() is None  # reset, and nobody knows at which value


@pytest.mark.parametrize("file", ["power1_average", "power1_input"])
def test_power_is_added_up_over_time(tmp_path: Path, file: str) -> None:
    path = hwmon(tmp_path, file, 100_000_000)
    meter = made(accelerator_meter(ADDRESS, tmp_path))
    path.write_text("300000000\n")
    meter.poll(meter.at_s + 10)
    assert meter.total_j == pytest.approx((100 + 300) / 2 * 10)
    meter.poll(meter.at_s + 1)
    assert meter.total_j == pytest.approx(2000 + 300)
