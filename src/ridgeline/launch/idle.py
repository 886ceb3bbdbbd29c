"""Ranks of a launcher that the layout has no work for: they wait, so that their agent stays."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from ridgeline.launch.stopping import StopFlag
from ridgeline.torch_compat import TCPStore

KEY = "ridgeline/ended"
LOOK_S = 2.0
"""How often a waiting rank looks whether it was asked to stop."""


def wait_idle(stop: StopFlag) -> bool:
    """Wait until rank 0 says that the run has ended: whether complete. False when asked to stop."""
    store = _store()
    while not stop.is_set():
        try:
            store.wait([KEY], timedelta(seconds=LOOK_S))
        except dist.DistStoreError:  # not yet
            continue
        return store.get(KEY) == b"complete"
    return False


def tell_idle(complete: bool) -> None:
    """Let the waiting ranks go, as rank 0."""
    _store().set(KEY, "complete" if complete else "stopped")


def _store() -> TCPStore:
    """The launcher's store, beside the one that the working ranks make of it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False)
