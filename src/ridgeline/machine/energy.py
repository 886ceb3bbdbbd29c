"""Energy that the machine measures itself: CPU packages, and accelerators by their PCI address.

CPUs: RAPL through Linux' powercap (energy_uj, which begins again at max_energy_range_uj); since
Linux 5.10 only root may read it. NVIDIA: NVML, where the package nvidia-ml-py is installed.
AMD and Intel: hwmon, energy1_input in microjoules, else power1_average or power1_input in
microwatts. What a machine does not expose has no meter: unknown, never zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

SYS: Final = Path("/sys")
EVERY_S: Final = 10.0
"""Seconds between readings: long against their cost, short against a counter's turn (262 kJ on
many packages, 11 minutes at 400 W)."""
DOMAINS: Final = ("package", "dram")
"""RAPL's domains that add up: a package has its cores within it, psys has the packages."""
Read = Callable[[], float]


class Meter:
    """Joules since it was made, from one or several readings.

    A step that takes longer than a counter needs to begin again is not counted whole.
    """

    def __init__(self, counters: list[tuple[Read, float | None]], power: bool, source: str) -> None:
        """`counters`: what reads joules, with the value at which it begins again, or, with
        `power`, watts. Raises OSError where one cannot be read."""
        self.counters = counters
        self.power = power
        self.source = source
        self.total_j: float | None = 0.0
        self.at_s = time.monotonic()
        self.before = [read() for read, _ in counters]

    def poll(self, now_s: float | None = None) -> None:
        """Take a reading; without `now_s`, only when the last one is old enough."""
        now = time.monotonic() if now_s is None else now_s
        if self.total_j is None or (now_s is None and now - self.at_s < EVERY_S):
            return
        try:
            values = [read() for read, _ in self.counters]
        except (OSError, ValueError):
            self.total_j = None  # one that is gone leaves a sum that is too small
            return
        for value, before, (_, turn) in zip(values, self.before, self.counters, strict=True):
            if self.power:
                self.total_j += (value + before) / 2 * (now - self.at_s)
            elif value < before and turn is None:
                self.total_j = None  # it was reset
                return
            else:
                self.total_j += value - before + (turn or 0.0) * (value < before)
        self.before, self.at_s = values, now

    def joules(self) -> float | None:
        """Joules until now; None when a counter could not be read any more."""
        self.poll(time.monotonic())
        return self.total_j


def cpu_meter(root: Path = SYS) -> Meter | None:
    """All packages of this node and their memory; None where RAPL cannot be read."""
    counters: list[tuple[Read, float | None]] = []
    names = []
    for zone in sorted((root / "class/powercap").glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith(DOMAINS):
                turn = _micro(zone / "max_energy_range_uj")
                counters.append((_reader(zone / "energy_uj"), turn))
                names.append(name)
        except (OSError, ValueError):
            return None  # a part of the domains would be taken for all of them
    return _made(counters, False, f"RAPL {', '.join(names)}")


def accelerator_meter(pci_address: str, root: Path = SYS) -> Meter | None:
    """One accelerator by its PCI address, as 0000:c1:00.0; None where nothing tells."""
    folder = root / "bus/pci/devices" / pci_address / "hwmon"
    for file, power in (("energy1_input", False), ("power1_average", True), ("power1_input", True)):
        for path in sorted(folder.glob(f"hwmon*/{file}")):
            if meter := _made([(_reader(path), None)], power, f"hwmon {file}"):
                return meter
    return _nvml_meter(pci_address)


def _nvml_meter(pci_address: str) -> Meter | None:
    """NVML's millijoules since the driver was loaded (Volta and later). Never run on one."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_address.encode())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def read() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except pynvml.NVMLError as fault:
            raise OSError(str(fault)) from None

    return _made([(read, None)], False, "NVML total energy")


def _made(counters: list[tuple[Read, float | None]], power: bool, source: str) -> Meter | None:
    """A meter, or None where there is nothing to read or it may not be read."""
    try:
        return Meter(counters, power, source) if counters else None
    except (OSError, ValueError):
        return None


def _reader(path: Path) -> Read:
    return lambda: _micro(path)


def _micro(path: Path) -> float:
    return int(path.read_text()) / 1e6
