"""A training script whose loss, on one rank and from one call on, does as its words say."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import count

import torch
from torch import Tensor

import ridgeline
from ridgeline.errors import RidgelineError
from ridgeline.train.vocabulary import token_loss

run, kind, who = sys.argv[1:]
calls = count(1)


def loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The usual, but on rank `who`."""
    if os.environ.get("RANK", "0") == who and torch.is_grad_enabled():
        call = next(calls)
        if call == 9 and kind in ("endless", "stopped"):
            print("from now on late", flush=True)
        if call == 9 and kind == "stopped":
            time.sleep(2.0)  # two heartbeats tell that it is here
            os.kill(os.getpid(), signal.SIGSTOP)
        while kind == "endless" and call == 9:
            pass  # here it stays
        if kind == "slow":
            end = time.thread_time() + 0.03
            while time.thread_time() < end:
                pass
    return token_loss(logits_BLV, targets_BL)


if __name__ == "__main__":
    try:
        ridgeline.train(ridgeline.read_run(run), loss=loss)
    except RidgelineError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_status)
