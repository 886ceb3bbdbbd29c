"""Other processes of this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path


def is_alive(pid: object) -> bool:
    """Whether process `pid` of this machine is there; False for what is no process number."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # there, and another user's
    return True


def process_start() -> float:
    """Unix time at which this process began, to 10 ms; where /proc does not tell, now.

    proc(5): /proc/uptime is in seconds; field 22 of /proc/self/stat is in clock ticks since boot,
    behind a name in parentheses that may hold anything.
    """
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def parent_of(pid: int) -> int | None:
    """The process that started process `pid` of this machine; None where /proc does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
