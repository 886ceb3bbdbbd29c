"""Private PyTorch imports for what goes wrong, each with the versions it was tested on."""

from __future__ import annotations

import json
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

# Re-exported by torch.distributed only conditionally. Tested on 2.11.0 and 2.13.0.
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d

__all__ = ["PrefixStore", "Store", "calls_started", "flight_record", "ranks_of"]

RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""PyTorch's flight recorder, one for NCCL and one for the others; each where it was built."""


def flight_record() -> list[dict[str, Any]]:
    """The last 2,000 or so collective calls of this process, oldest first.

    On gloo it is there without being asked for, and knows no sends and receives. Private names.
    gloo: tested on 2.11.0 and 2.13.0. NCCL (XCCL and others have none): never run on it.
    """
    entries: list[dict[str, Any]] = []
    for name in RECORDERS:
        if hasattr(c10d, name):
            entries += json.loads(getattr(c10d, name)()).get("entries", [])
    return entries


def calls_started() -> int:
    """Collective calls, sends and receives that this process has begun on all its process groups.

    Private names. Tested on 2.11.0 and 2.13.0.
    """
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(int(group._get_sequence_number_for_group()) for group in groups)


def ranks_of(group_name: str) -> list[int]:
    """Ranks of a process group by its name. Private names. Tested on 2.11.0 and 2.13.0."""
    found = c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    return dist.get_process_group_ranks(found)
