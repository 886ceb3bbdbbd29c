"""Exposed communication: how long a rank stands in its messages, by mesh axis, in one step.

Time counts while the thread that trains is inside a call of PyTorch's collectives, or waits for
one that runs beside it; what compute hides costs nothing here. A dispatch mode makes every
operation slower, so it is active in few steps, and of those only these times are used.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ridgeline.torch_compat import FakeTensor, work_of
from ridgeline.train.messages import MessageAxis, message_of
from ridgeline.train.telemetry import Clock

WAIT = "_c10d_functional::wait_tensor"
PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""DTensor asks fake ones for shapes, when it meets an operation for the first time."""


class Exposed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While `watching`, adds up seconds in messages by (phase of the clock, axis).

    `sent` (bytes) and `calls` are those of the last time it was.

    On an accelerator a message holds up a stream, not the host. So the host waits for that stream
    before and after each call and each wait: what lies between is what the stream could not
    compute. The host then runs no longer ahead of the device, and the step takes longer.
    """

    def __init__(
        self, groups: Mapping[str, MessageAxis], clock: Clock, device: torch.device
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups = groups
        self.clock = clock
        self.device = device
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.sent: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.works: WeakKeyDictionary[dist.Work, MessageAxis] = WeakKeyDictionary()
        self.newest: dist.Work | None = None
        """Kept until its caller has it: without one that holds it, it would be another object."""
        self.computing: torch.Stream | None = None
        self.awaited: dict[int, MessageAxis] = {}
        """By the address of what a functional collective gives out."""

    def settle(self) -> None:
        """Wait until the device has computed what it was given; nothing on a CPU.

        Nothing on a stream beside that which computes either: messages that run there are hidden
        until the one that computes waits for them.
        """
        computing = self.computing
        if computing is not None and torch.accelerator.current_stream(self.device) == computing:
            computing.synchronize()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Active, with waits watched as well, and the clock's phases settled."""
        self.sent.clear()
        self.calls.clear()
        if self.device.type != "cpu":
            self.computing = torch.accelerator.current_stream(self.device)
            self.clock.settle = self.settle
        try:
            with _waits_seen_by(self._waited, self.device), self:
                yield
        finally:
            self.clock.settle = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Time and count what is a message, and let everything else through."""
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # its local operations come by here as well
        options = kwargs or {}
        if func.namespace not in ("c10d", "_c10d_functional"):
            return func(*args, **options)
        if func.name() == WAIT:
            axis = self.awaited.pop(args[0].untyped_storage().data_ptr(), None)
            return self._timed(axis, lambda: func(*args, **options))
        message = message_of(func, args, self.groups)
        if message is None:
            return func(*args, **options)
        self.calls[message.axis] += 1
        self.sent[message.axis] += message.sent_bytes
        result = self._timed(message.axis, lambda: func(*args, **options))
        if isinstance(result, Tensor):
            self.awaited[result.untyped_storage().data_ptr()] = message.axis
        elif (work := work_of(result)) is not None:
            self.newest = work
            self.works[work] = message.axis
        return result

    def _waited(self, work: dist.Work | None, wait: Callable[[], Any]) -> Any:
        # Without a work it is sharded data parallelism that waits.
        return self._timed("data" if work is None else self.works.get(work), wait)

    def _timed(self, axis: MessageAxis | None, call: Callable[[], Any]) -> Any:
        """What `call` returns; its time is the axis', if it is one's."""
        if axis is None:
            return call()
        self.settle()
        start = time.perf_counter()
        result = call()
        self.settle()
        self.seconds[self.clock.inside, axis] += time.perf_counter() - start
        return result


@contextmanager
def _waits_seen_by(
    see: Callable[[dist.Work | None, Callable[[], Any]], Any], device: torch.device
) -> Iterator[None]:
    """Meanwhile each wait for a message is done by `see(work, wait)`, which calls `wait()` once.

    Waiting is no operation, so no dispatch mode sees it. On an accelerator FSDP2 does not wait for
    a work: it makes the stream that computes wait for an event, which `see` gets without a work.
    CPU: tested on 2.11.0 and 2.13.0. Accelerators: never run on one.
    """
    plain: Any = dist.Work.wait
    dist.Work.wait = lambda work, *rest, **options: see(  # type: ignore[method-assign]
        work, lambda: plain(work, *rest, **options)
    )
    streams: Any = None
    if device.type != "cpu":
        computing = torch.get_device_module(device).current_stream()
        streams = type(computing)
        plain_event = streams.wait_event
        streams.wait_event = lambda stream, event: (
            see(None, lambda: plain_event(stream, event))
            if stream == computing
            else plain_event(stream, event)
        )
    try:
        yield
    finally:
        dist.Work.wait = plain  # type: ignore[method-assign]
        if streams is not None:
            streams.wait_event = plain_event
