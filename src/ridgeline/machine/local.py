"""This machine, as `ridgeline probe` measured it: the file in the user's own folder.

The file has the catalogue's form: a table of devices and one of clusters. A device is a process
with its share of the cores, so there is a row for each number of processes: `local` is one process
with all cores, `local/2` one of two that share them and compute at the same time.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ridgeline.errors import MachineError

LOCAL = "local"
REMEDY = "ridgeline probe, which measures it"
Rows = Mapping[str, Mapping[str, dict[str, Any]]]


def local_file() -> Path:
    """Where the machine file lies: `$XDG_CONFIG_HOME/ridgeline/machines/local.toml`."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    folder = home if home.is_absolute() else Path.home() / ".config"  # as the XDG rule says
    return folder / "ridgeline" / "machines" / f"{LOCAL}.toml"


def local_name(processes: int) -> str:
    """What the device is called of which `processes` run at the same time."""
    return LOCAL if processes == 1 else f"{LOCAL}/{processes}"


def is_local(name: str) -> bool:
    """Whether a name means a device or cluster of this machine."""
    return name == LOCAL or name.startswith(f"{LOCAL}/")


def read_local(file: Path | None = None) -> Rows:
    """The tables `devices` and `clusters` of the machine file.

    Raises MachineError where there is none, or it cannot be read.
    """
    path = file or local_file()
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MachineError(
            "this machine ('local')",
            f"how fast it is has not been measured: there is no {path}",
            f"{REMEDY}; or --on 8xH100-SXM-80GB",
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise MachineError(f"machine file {path}", f"it cannot be read: {fault}", REMEDY) from None
    tables = (rows.get("devices"), rows.get("clusters"))
    if not all(isinstance(table, dict) and table for table in tables):
        raise MachineError(
            f"machine file {path}", "it has a table of devices and one of clusters", REMEDY
        )
    if not _sound(rows):
        raise MachineError(
            f"machine file {path}", "every number in it is finite and not below 0", REMEDY
        )
    return rows


def write_machine_file(file: Path, text: str) -> None:
    """Write a machine file at once or not at all. Raises MachineError where it cannot be."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as fault:
        raise MachineError(
            f"machine file {file}", f"it cannot be written: {fault}", "--output FILE"
        ) from None
    finally:
        if partial.exists():
            partial.unlink()


def _sound(value: object) -> bool:
    """Whether all numbers within are finite and not below zero."""
    if isinstance(value, dict):
        return all(map(_sound, value.values()))
    if isinstance(value, list):
        return all(map(_sound, value))
    return not isinstance(value, float | int) or (math.isfinite(value) and value >= 0)


def local_row(kind: str, name: str) -> dict[str, Any]:
    """The row of one device or cluster (`kind`). Raises MachineError where it was not measured."""
    rows = read_local()[kind]
    if name not in rows:
        count, known = processes_of(name), sorted(map(processes_of, rows))
        raise MachineError(
            f"{count} processes on this machine",
            f"it was measured with {', '.join(map(str, known))}",
            f"--on {known[-1]}x{LOCAL}, or with as many cores ridgeline probe --processes "
            f"{','.join(map(str, sorted({*known, count})))}",
        )
    return rows[name]


def unreadable(name: str, fault: Exception) -> MachineError:
    """The error of a row that lacks a number or has a wrong one."""
    return MachineError(
        f"{name!r} in {local_file()}", f"its row is not complete: {fault!r}", REMEDY
    )


def processes_of(name: str) -> int:
    """The number of processes in a name such as `local/2`. Raises MachineError for another."""
    count = name.partition("/")[2] or "1"
    if not is_local(name) or not count.isdecimal() or int(count) < 1:
        raise MachineError(f"machine {name!r}", "its name is local, or local/2 and so on", REMEDY)
    return int(count)


def local_processes() -> int:
    """The most processes that this machine was measured with. Raises MachineError."""
    return max(map(processes_of, read_local()["clusters"]))
