"""A store of one's own for each start of the ranks of another launcher.

PyTorch's agent (2.11 to 2.13) keeps one store for all its restarts, and ranks that start again find
in it the addresses of those that died: gloo then waits for them. Restarts are counted by each agent
for itself, so that nodes that joined later count otherwise; ranks must find each other themselves.
"""

from __future__ import annotations

import os
import uuid
from datetime import timedelta

import torch.distributed as dist

from ridgeline.torch_compat import PrefixStore, Store

LOOK_S = 1.0
"""How long rank 0 waits before it looks who started since."""


def own_round(store: Store, rank: int, world: int) -> Store:
    """`store`, below a name that these ranks have for this start alone; `store` without restarts.

    Each rank leaves a name of its own. Rank 0 answers to each with its own, by which all go on, and
    again until all have heard: what it read may have been left by one that died.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return store
    mine = uuid.uuid4().hex
    store.set(f"joined/{rank}", mine)
    if rank != 0:
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/{rank}", "heard")
        return PrefixStore(name, store)
    joined = [f"joined/{other}" for other in range(world)]
    heard = [f"{mine}/{other}" for other in range(1, world)]
    while heard:
        store.wait(joined)
        for other in store.multi_get(joined):
            store.set(f"answer/{other.decode()}", mine)
        try:
            store.wait(heard, timedelta(seconds=LOOK_S))
        except dist.DistStoreError:  # somebody has started since
            continue
        break
    return PrefixStore(mine, store)
