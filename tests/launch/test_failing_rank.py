"""A rank that raises within a step ends the job at once, and its own error is the one told."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import ridgeline
from ridgeline.errors import LayoutError
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run

MakeRun = Callable[..., Run]

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
import ridgeline
from ridgeline.errors import RidgelineError, ShardError
from ridgeline.model.decoder import Decoder
from ridgeline.train.vocabulary import token_loss

run, kind, where, who = sys.argv[1:]

def fail(part):
    global calls
    if part == where and dist.get_rank() == int(who) and torch.is_grad_enabled():
        calls += 1
        if calls == 3:  # within the second step
            if kind == "silent":
                os._exit(7)
            raise ShardError("shard x", "1 + 1 = 2") if kind == "ours" else OWN

calls, OWN = 0, ZeroDivisionError("by nothing")

class Failing(Decoder):
    def forward(self, tokens_BL, positions_L=None):
        fail("decoder")
        out = super().forward(tokens_BL, positions_L)
        return out.double() if kind == "wide" and self.head is None else out

def loss(logits_BLV, targets_BL):
    fail("loss")
    return token_loss(logits_BLV, targets_BL)

if __name__ == "__main__":
    try:
        ridgeline.train(ridgeline.read_run(run), decoder=Failing, loss=loss)
    except RidgelineError as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("layout", "kind", "where", "rank"),
    [
        ("pp2 mb4", "own", "decoder", 0),
        ("pp4 mb4", "ours", "decoder", 2),
        ("pp2 mb4 zbh1", "ours", "loss", 1),
        ("dp2 mb2", "own", "loss", 1),
        ("dp2 pp2 mb2", "own", "decoder", 3),
        ("pp2 mb4", "silent", "loss", 1),
        ("pp2 mb4", "wide", "decoder", 0),
    ],
)
def test_a_rank_that_raises_is_heard_and_the_others_end(
    layout: str, kind: str, where: str, rank: int, tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = tiny_run(layout=f"{layout} fp32", model={"layers": 4}, faults={"restarts": 1})
    (tmp_path / "run.toml").write_text(run.to_toml())
    (tmp_path / "script.py").write_text(SCRIPT)
    script, file = tmp_path / "script.py", tmp_path / "run.toml"
    words = map(str, (sys.executable, script, file, kind, where, rank))
    # their output ends when the last process has
    done = subprocess.run([*words], capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    if kind == "ours":
        assert "ShardError: shard x\n  rule: 1 + 1 = 2" in said
        return
    if kind == "wide":  # the receiver would have aborted
        assert "LayoutError: sending torch.float64 (4, 32, 32) to chunk 1" in said
        return
    reason = "ZeroDivisionError: by nothing" if kind == "own" else "exit code 7"
    told = re.search(
        rf"(?:LaunchError|WorkerLost): rank (\d+) \(process \d+\) died\n  rule: {reason}\n", said
    )
    assert told is not None, said
    assert int(told[1]) == rank
    assert ("all start again" in said) == (kind == "silent")  # a mistake would be made again
    assert said.count("Traceback") == (kind == "own")  # the others' complaints are not shown
    if kind == "own":
        assert "in fail\n    raise" in done.stderr


class InList(nn.Module):
    """A decoder of one's own with blocks that have no names to keep."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(shape.layers))


def test_a_decoder_that_cannot_be_cut_is_refused_before_any_process_starts(
    tiny_run: MakeRun,
) -> None:
    run = tiny_run(layout="pp2 mb4 fp32", cluster={"devices": 2})
    with pytest.raises(LayoutError, match="pp2 for a InList"):
        ridgeline.train(run, decoder=InList)
    assert not run.path.exists()
