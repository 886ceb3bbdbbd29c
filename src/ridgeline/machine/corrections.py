"""Corrections of the planner's constants, as `ridgeline audit --calibrate` found them.

They lie in the user's own folder, in the machine file of the device they are of: this machine's
beside what `ridgeline probe` measured (the next probe writes the file anew, without corrections of
what it replaces), another's in a file of its name. The catalogue is never written to.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ridgeline.errors import MachineError
from ridgeline.machine.local import LOCAL, is_local, local_file, write_machine_file

MOST = 4.0
"""A factor beyond this, or below its inverse, is no correction: something else is wrong."""
FACTORS = ("compute", "link", "port", "update")


@dataclass(frozen=True)
class Correction:
    """By what the planner's seconds are multiplied, of one device in one precision; 1: as is."""

    compute: float = 1.0
    """Products, attention, element-wise work and launching."""
    link: float = 1.0
    """Collectives within a node."""
    port: float = 1.0
    """Collectives between nodes."""
    update: float = 1.0
    """The optimizer."""
    source: str = ""
    """From which run and versions."""


def correction_file(device: str) -> Path:
    """Where the corrections of a device lie; all process counts of this machine share a file."""
    return local_file().with_name(f"{LOCAL if is_local(device) else device}.toml")


def read_corrections(device: str) -> dict[str, Correction]:
    """The corrections of a device by precision; none where it was not calibrated.

    Raises MachineError for a file that cannot be read or holds a factor that is none.
    """
    return {
        precision: _correction(row, correction_file(device))
        for precision, row in _table(_rows(correction_file(device)), device).items()
    }


def write_correction(device: str, precision: str, correction: Correction) -> Path:
    """Write a correction into the device's machine file, beside what is there; the file.

    Raises MachineError where the file cannot be read or written.
    """
    import tomlkit

    file = correction_file(device)
    rows = _rows(file)
    _table(rows, device)
    rows.setdefault("corrections", {})[precision] = {
        name: value for name, value in asdict(correction).items() if value != 1.0
    }
    text = (
        "# Written by `ridgeline probe` or `ridgeline audit --calibrate`: what was measured of a\n"
        "# machine, and by what its planned times are multiplied since a run was compared.\n\n"
    )
    write_machine_file(file, text + tomlkit.dumps(rows))
    return file


def _rows(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise _unreadable(file, str(fault)) from None


def _table(rows: dict[str, Any], device: str) -> dict[str, dict[str, Any]]:
    table = rows.get("corrections", {})
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise _unreadable(correction_file(device), "`corrections` is no table of precisions")
    return table


def _correction(row: dict[str, Any], file: Path) -> Correction:
    unknown = sorted(set(row) - {*FACTORS, "source"})
    if unknown:
        raise _unreadable(file, f"a correction has {', '.join(FACTORS)} and not {unknown[0]}")
    for name in FACTORS:
        factor = row.get(name, 1.0)
        if not isinstance(factor, int | float) or not 1 / MOST <= factor <= MOST:
            raise _unreadable(
                file, f"{name} = {factor!r}: factors go from {1 / MOST:g} to {MOST:g}"
            )
    return Correction(**row)


def _unreadable(file: Path, why: str) -> MachineError:
    return MachineError(
        f"corrections in {file}", why, "delete its [corrections], or ridgeline audit --calibrate"
    )
