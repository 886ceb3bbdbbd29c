"""The catalogue as text: every machine, and how each of its numbers is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ridgeline.cli import verbs
from ridgeline.errors import MachineError
from ridgeline.machine.cluster import clusters
from ridgeline.machine.corrections import Correction, write_correction
from ridgeline.machine.device import devices
from ridgeline.plan.machine_text import describe, table

KNOWN = {"read", "measured", "fitted", "assumed", "known"}  # the last of "not known"


def test_every_machine_stands_in_the_table() -> None:
    first = [line for line in table().splitlines() if line]
    for name, each in clusters().items():
        (row,) = (line for line in first if line.startswith(f"{name}  "))
        assert each.device.name in row
    assert max(map(len, first)) <= 100


@pytest.mark.parametrize("name", [*clusters(), *devices()])
def test_every_number_says_how_it_is_known(name: str) -> None:
    told = describe(name)
    rows = [line for line in told.splitlines() if line.startswith("  ")]
    assert len(rows) > 4
    assert {row.split()[-1] for row in rows} <= KNOWN
    assert "source: " in told


def test_frontiers_two_link_tiers_and_its_network() -> None:
    told = " ".join(describe("Frontier").split())
    assert "link within 2 neighbours, one way 200 GB/s read" in told
    assert "link within 8 neighbours, one way 100 GB/s read" in told
    assert "network dragonfly read" in told
    assert "torus" in describe("Fugaku")


def test_rates_of_formats_that_a_device_lacks_are_left_out() -> None:
    assert "8-bit" not in describe("MI250X-GCD")
    assert "8-bit" in describe("H100")
    assert "4-bit" not in describe("H100")


def test_the_command_lists_and_describes() -> None:
    assert "LUMI" in CliRunner().invoke(verbs, ["machines"]).output
    assert "GCD" in CliRunner().invoke(verbs, ["machines", "LUMI"]).output
    refused = CliRunner().invoke(verbs, ["machines", "Frontie"]).exception
    assert isinstance(refused, MachineError)
    assert "Frontier" in refused.remedy


def test_corrections_by_a_run_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "corrected" not in describe("A100-SXM-80GB")
    write_correction("A100-SXM-80GB", "bf16", Correction(compute=1.25, source="run a, 2026"))
    said = describe("A100-SXM-80GB")
    assert "corrected in bf16 by run a, 2026" in said
    assert "x1.250" in said
