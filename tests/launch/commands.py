"""Commands that are watched, hit and started again; and what the samples they read prove."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ridgeline.layout.layout import Layout
from ridgeline.run import Run
from ridgeline.train.schedule import first_sample

LONG_S = 200.0


class Watched:
    """A command whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def said(self) -> str:
        """All that it said so far."""
        return "".join(self.lines)

    def wait_for(self, pattern: str, since: int = 0) -> int:
        """Wait until a line from number `since` on begins like `pattern`; the number behind it.

        Returns at the command's end, too.
        """
        end = time.monotonic() + LONG_S
        while time.monotonic() < end:
            for number in range(since, len(self.lines)):
                if re.match(pattern, self.lines[number]):
                    return number + 1
            if not self.thread.is_alive():
                return len(self.lines)
            time.sleep(0.005)
        raise AssertionError(f"no line like {pattern!r} in:\n{self.said}")

    def end(self) -> int:
        """Wait for the end of it and of all its processes, which hold its output; its status."""
        self.thread.join(LONG_S)
        assert not self.thread.is_alive(), f"it does not end:\n{self.said}"
        return self.process.wait(LONG_S)


def processes_of(group: int) -> dict[int, int]:
    """Living processes of a process group, and their parents."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[2]) == group and fields[0] != "Z":
                found[int(folder.name)] = int(fields[1])
    return found


def workers_of(command: int) -> list[int]:
    """The living workers of a command: what the servers below it forked."""
    parents = processes_of(command)
    return sorted(
        pid
        for pid, parent in parents.items()
        if parents.get(parent) == command and pid not in (command, parent)
    )


def wait_for_none(group: int) -> None:
    """Wait until nothing is left of a process group."""
    end = time.monotonic() + 60
    while processes_of(group):
        assert time.monotonic() < end, "processes are left behind"
        time.sleep(0.05)


def hit(process: int, number: int, how: Callable[[int, int], None] = os.kill) -> bool:
    """Send a signal to what may have ended: whether it was there."""
    try:
        how(process, number)
    except ProcessLookupError:
        return False
    return True


def check_every_sample_was_read_once(run: Run, steps: int) -> None:
    """At each of `steps` steps each part of the model read its samples once, as samples/ tells.

    Ranks that were lost tell of the steps before.
    """
    layout = run.layout
    assert isinstance(layout, Layout)
    read = [Counter[int]() for _ in range(steps)]
    for file in (run.path / "samples").glob("rank-*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(len(rows)))
        for row in rows:
            samples = (n for first in row["first"] for n in range(first, first + row["count"]))
            read[row["step"]].update(samples)
    parts = layout.world // layout.data
    for step, found in enumerate(read):
        expected = range(first_sample(run, step), first_sample(run, step + 1))
        assert found == dict.fromkeys(expected, parts), step
