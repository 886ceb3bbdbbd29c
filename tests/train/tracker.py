"""Memory of one rank by component: every local storage from its birth to its end.

A dispatch mode sees what operations give out; PyTorch's sharded data parallelism gives gathered
parameters back, and takes them again, by `resize_` of their storages, which no dispatch mode sees.
Only local tensors count: a DTensor's own operations reach the mode as those on its local part.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PLAIN = (Tensor, nn.Parameter, FakeTensor)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, notes the bytes of each storage that comes, changes its size or goes.

    Storages are numbered in the order in which they are first seen; `own` says whose they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        """(storage, bytes more), in order."""
        self.owners: dict[int, str] = {}
        self.living: dict[int, tuple[int, weakref.ref[Any]]] = {}
        """Address of a storage: (its number, itself)."""
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what an operation on local tensors gives out."""
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # a DTensor: its local operations come by here as well
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # DTensor tries each new operation on shapes alone, whole ones: those hold no memory
            if type(leaf) in (Tensor, nn.Parameter) and leaf.device.type != "meta":
                self.see(leaf)
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active, with the storages' `resize_` watched as well."""
        plain: Any = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            self._note(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]

    def see(self, tensor: Tensor) -> int:
        """The number of a local tensor's storage, which is noted if it is new."""
        return self._note(tensor.untyped_storage())

    def own(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Say whose the storages of some local tensors are, now and before."""
        for tensor in tensors:
            self.owners[self.see(tensor)] = owner

    def born_since(self, number: int) -> list[int]:
        """The living storages of `number` or more."""
        return [each for each, _ in self.living.values() if each >= number and self.sizes[each]]

    def peak(self, since: int = 0) -> tuple[int, Mapping[str, int]]:
        """Most bytes at any moment after the first `since` events, and how owners share them."""
        total = most = 0
        now: Counter[str] = Counter()
        at_most: Mapping[str, int] = {}
        for index, (number, more) in enumerate(self.events):
            total += more
            now[self.owners.get(number, "temporary")] += more
            if index >= since and total > most:
                most, at_most = total, Counter(now)
        return most, at_most

    def _note(self, storage: torch.UntypedStorage) -> int:
        address = storage._cdata
        if address in self.living:
            number = self.living[address][0]
        else:
            number = len(self.sizes)
            self.sizes[number] = 0

            def gone(_: Any) -> None:
                del self.living[address]
                self._resized(number, 0)

            self.living[address] = (number, weakref.ref(storage, gone))
        self._resized(number, storage.nbytes())
        return number

    def _resized(self, number: int, size: int) -> None:
        if more := size - self.sizes[number]:
            self.sizes[number] = size
            self.events.append((number, more))
