"""What one rank does, operation by operation: its memory, FLOPs, messages and kernels.

A dispatch mode sees what operations give out; PyTorch's sharded data parallelism gives gathered
parameters back, and takes them again, by `resize_` of their storages, which no dispatch mode sees.
Only local tensors count: a DTensor's own operations reach the mode as those on its local part, and
what it tries on whole shapes, to learn what comes out, is left out.

The same tracker watches a real rank and a rehearsed one, whose tensors have shapes and no values.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ridgeline.torch_compat import FakeTensor, backward_node, forward_number, shapes_only
from ridgeline.train.flops import causal_flops, kind_of_module
from ridgeline.train.messages import Message, MessageAxis, message_of

LOCAL = (Tensor, nn.Parameter, FakeTensor)
SCORES = "attention_scores"
NO_KERNEL = {
    "aten::lift_fresh",
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::empty_like",
    "aten::detach",
}


class Work(NamedTuple):
    """Arithmetic of one operation."""

    kind: str
    """Which kind of module asked for it."""
    flops: float
    again: bool
    """Whether backward does it a second time."""


class Mark(NamedTuple):
    """A moment: how much was noted before it."""

    events: int
    work: int
    messages: int
    kernels: int


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, notes the bytes of each storage that comes, changes its size or goes.

    Storages are numbered in the order in which they are first seen; `own` says whose they are.
    """

    def __init__(self, groups: Mapping[str, MessageAxis], fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups = groups
        self.fake = fake
        self.seen = LOCAL if fake else (Tensor, nn.Parameter)
        self.events: list[tuple[int, int]] = []
        """(storage, bytes more), in order."""
        self.work: list[Work] = []
        self.messages: list[Message] = []
        self.kernels = 0
        """Operations that compute something, which views do not."""
        self.owners: dict[int, str] = {}
        self.made_by: dict[int, tuple[str, tuple[int, ...], str]] = {}
        """Storage: (operation or name, shape, dtype) of the first tensor seen in it."""
        self._living: dict[int, tuple[int, weakref.ref[Any]]] = {}
        """Address of a storage: (its number, itself)."""
        self._sizes: dict[int, int] = {}
        self._within: list[str] = []
        self._numbers: list[int] = [0]
        self._kinds: list[str] = [""]
        """Which module's forward made the autograd nodes from each number on."""
        self._aside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what an operation on local tensors does."""
        kwargs = kwargs or {}
        if any(kind not in LOCAL for kind in types):
            return NotImplemented  # a DTensor: its local operations come by here as well
        if self._aside or (not self.fake and FakeTensor in types):
            return func(*args, **kwargs)  # on whole shapes
        out = self._without_values(func, args, kwargs) if self.fake else func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        # A number of the program, often kept for good; or what went over the network, and was here.
        known = func.name() == "aten::lift_fresh" or func.namespace == "c10d"
        for leaf in () if known else tree_leaves(out):
            if type(leaf) in self.seen and leaf.device.type != "meta":
                self.see(leaf, func)
        return out

    def _without_values(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """As `func` on tensors that have shapes alone, where PyTorch's own way differs."""
        name = func.name()
        if name == "_c10d_functional::wait_tensor":
            return args[0]  # PyTorch's would be a new tensor
        if name == "aten::_grouped_mm" and args[0].dtype == torch.float32:
            # known to PyTorch on a CPU, but not to its shapes
            return (
                args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
                if (args[1].dim() == 3)
                else args[0].new_empty(args[2].shape[0], args[0].shape[0], args[1].shape[1])
            )
        return func(*args, **kwargs)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        message = message_of(func, args, self.groups)
        if message is not None:
            self.messages.append(message)
        elif func.namespace == "aten" and not func.is_view and func.name() not in NO_KERNEL:
            self.kernels += 1
        if flops := causal_flops(func, args, kwargs, out):
            node = backward_node()
            kind = self._within[-1] if self._within else ""
            if node is not None and not torch.is_grad_enabled():
                kind = self._kinds[bisect_right(self._numbers, node._sequence_nr()) - 1]
            if "attention" in func.name():
                kind = SCORES
            again = node is not None and torch.is_grad_enabled()
            self.work.append(Work(kind or "other", flops, again))

    @contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Active, with the storages' `resize_` and the modules at work watched as well."""
        plain: Any = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            if not self._aside:
                self._note(storage)
            return result

        hooks = [hook for module in modules for hook in self._follow(module)]
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            with self, shapes_only(self._set_aside):
                yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    def _set_aside(self, aside: bool) -> None:
        self._aside = aside

    def _follow(self, model: nn.Module) -> Iterator[Any]:
        for name, module in model.named_modules():
            kind = kind_of_module(name)
            if kind is None:
                continue

            def enter(module: nn.Module, given: Any, kind: str = kind) -> None:
                self._within.append(kind)
                self._note_nodes()

            def leave(module: nn.Module, given: Any, made: Any) -> None:
                self._within.pop()
                self._note_nodes()

            yield module.register_forward_pre_hook(enter, prepend=True)
            yield module.register_forward_hook(leave, always_call=True)

    def _note_nodes(self) -> None:
        number = forward_number()
        if number < self._numbers[-1]:
            return
        self._numbers.append(number)
        self._kinds.append(self._within[-1] if self._within else "")

    def see(self, tensor: Tensor, func: Any = None) -> int:
        """The number of a local tensor's storage, which is noted if it is new."""
        number = self._note(tensor.untyped_storage())
        if number not in self.made_by:
            name = func if isinstance(func, str) else func.name() if func is not None else "tensor"
            self.made_by[number] = (name, tuple(tensor.shape), str(tensor.dtype)[6:])
        return number

    def own(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Say whose the storages of some local tensors are, now and before."""
        for tensor in tensors:
            self.owners[self.see(tensor)] = owner

    def name(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Call the storages of some tensors by name."""
        for name, tensor in tensors.items():
            here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.made_by[self.see(here)] = (
                f"{what} {name}",
                tuple(here.shape),
                str(here.dtype)[6:],
            )

    def mark(self) -> Mark:
        """This moment."""
        return Mark(len(self.events), len(self.work), len(self.messages), self.kernels)

    @property
    def storages(self) -> int:
        """How many storages were seen so far."""
        return len(self._sizes)

    def born_since(self, number: int) -> list[int]:
        """The living storages of `number` or more."""
        return [each for each, _ in self._living.values() if each >= number and self._sizes[each]]

    def owner(self, storage: int) -> str:
        """Whose a storage is; nobody's is temporary."""
        return self.owners.get(storage, "temporary")

    def peak(self, since: int = 0) -> tuple[int, Mapping[str, int]]:
        """Most bytes at any moment after the first `since` events, and how owners share them."""
        moment, most = self._highest(since)
        now: Counter[str] = Counter()
        for number, more in self.events[: moment + 1]:
            now[self.owner(number)] += more
        return most, now

    def largest(self, since: int, count: int) -> list[tuple[int, int]]:
        """(storage, bytes) of the largest that live at the peak after `since` events."""
        moment, _ = self._highest(since)
        sizes: Counter[int] = Counter()
        for number, more in self.events[: moment + 1]:
            sizes[number] += more
        return sizes.most_common(count)

    def _highest(self, since: int) -> tuple[int, int]:
        total = most = 0
        moment = -1
        for index, (_, more) in enumerate(self.events):
            total += more
            if index >= since and total > most:
                most, moment = total, index
        return moment, most

    def _note(self, storage: torch.UntypedStorage) -> int:
        address = storage._cdata
        if address in self._living:
            number = self._living[address][0]
        else:
            number = len(self._sizes)
            self._sizes[number] = 0

            def gone(_: Any) -> None:
                del self._living[address]
                self._resized(number, 0)

            self._living[address] = (number, weakref.ref(storage, gone))
        self._resized(number, storage.nbytes())
        return number

    def _resized(self, number: int, size: int) -> None:
        if more := size - self._sizes[number]:
            self._sizes[number] = size
            self.events.append((number, more))
