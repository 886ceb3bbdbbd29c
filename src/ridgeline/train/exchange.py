"""Small JSON messages between all ranks of a host-side group; None is a group of one.

PyTorch's own messages of objects are pickles, and nothing that arrives here is executed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    if group is None:
        return [value]
    mine, sizes, most = _padded(value, group)
    rows = [torch.empty(most, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(rows, mine, group=group)
    return _read(rows, sizes)


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """Every rank's value, by rank, on rank 0; None on the others."""
    if group is None:
        return [value]
    mine, sizes, most = _padded(value, group)
    first = dist.get_rank(group) == 0
    rows = [torch.empty(most, dtype=torch.uint8) for _ in sizes] if first else None
    dist.gather(mine, rows, group=group, group_dst=0)
    return _read(rows, sizes) if rows is not None else None


def broadcast(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's value on every rank; what the others give is not looked at."""
    if group is None:
        return value
    first = dist.get_rank(group) == 0
    data = _bytes(value if first else None)
    size = torch.tensor([len(data)])
    dist.broadcast(size, group=group, group_src=0)
    if not first:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=0)
    return _read([data], [int(size)])[0]


def scatter(values: Sequence[Any] | None, group: dist.ProcessGroup | None) -> Any:
    """Entry r of rank 0's `values` on rank r; None on the other ranks."""
    if group is None:
        assert values is not None
        return values[0]
    rows = None if values is None else [_bytes(value) for value in values]
    sizes = broadcast(None if rows is None else [len(row) for row in rows], group)
    most = max(sizes)
    mine = torch.empty(most, dtype=torch.uint8)
    padded = None if rows is None else [_pad(row, most) for row in rows]
    dist.scatter(mine, padded, group=group, group_src=0)
    return _read([mine], [sizes[dist.get_rank(group)]])[0]


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _pad(row: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, size - len(row)))


def _padded(value: Any, group: dist.ProcessGroup) -> tuple[Tensor, list[int], int]:
    """This rank's message, as long as the longest; the length of each rank's; the longest."""
    row = _bytes(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(row)]), group=group)
    sizes = [int(length) for length in lengths]
    return _pad(row, max(sizes)), sizes, max(sizes)


def _read(rows: Sequence[Tensor], sizes: Sequence[int]) -> list[Any]:
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]
