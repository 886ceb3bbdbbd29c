"""Which samples a rank read at which step: samples/rank-N.jsonl in the run folder.

{"step": 3, "first": [24, 28], "count": 4}: at step 3, counted from 0, samples 24 to 31.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ridgeline.train.folder import write_atomically


class SampleLog:
    """One rank's file. A step that is done again is read again: its first reading is dropped."""

    def __init__(self, folder: Path, rank: int, world: int, step: int) -> None:
        """Go on at `step`, as `rank` of `world`; rank 0 also speaks for ranks that are no more."""
        folder.mkdir(exist_ok=True)
        mine = folder / f"rank-{rank}.jsonl"
        files = [mine] if mine.exists() else []
        if rank == 0:
            files += [f for f in folder.glob("rank-*.jsonl") if int(f.stem[5:]) >= world]
        for file in files:
            _drop_from(file, step)
        self.file = mine.open("a", encoding="utf-8")

    def note(self, step: int, starts: Sequence[int], count: int) -> None:
        """`count` samples from each of `starts` on were read at `step`."""
        row = {"step": step, "first": list(starts), "count": count}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()  # so that it outlives a process that is killed


def _drop_from(file: Path, step: int) -> None:
    """Remove rows of `step` and later ones, and the torn last line of a killed rank."""
    whole = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line + "\n" for line in whole if json.loads(line)["step"] < step]
    write_atomically(file, "".join(kept))
