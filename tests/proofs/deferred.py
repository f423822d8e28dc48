"""A c10d group with NCCL's semantics on the CPU: a collective is delivered at its wait, or late on
a thread, never at its launch.

gloo's wait() blocks the host, so on gloo a missing or early wait goes unseen. Here a buffer is
poisoned from the launch until the result is delivered, and every misuse is recorded in
`violations`.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    ProcessGroup,
    Work,
    _register_process_group,
    _unregister_process_group,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

MODES = ("lazy", "delayed")
TIMEOUT = 60  # seconds for a collective, on a loaded machine
_numbers = itertools.count()


class InjectedError(RuntimeError):
    """Raised by `fail_launch` and `fail_wait`."""


def _poison(tensor: Tensor) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min + 7
    return torch.full_like(tensor, value)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes that `tensor` touches."""
    if not tensor.numel():
        return 0, 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Work(Work):
    """A collective that owns a copy of its input (the wire) and only weak references to the
    caller's memory; `touched[0]` is its output.
    """

    def __init__(self, group: Deferred, touched: list[Tensor], collective: Callable[[], Tensor]):
        super().__init__()
        self.group, self.collective, self.index = group, collective, len(group.works)
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in touched]
        out = touched[0]
        self.layout = out.dtype, out.storage_offset(), out.shape, out.stride()
        self.spans = [_span(t) for t in touched]
        self.waits, self.delivered = 0, threading.Event()

    def wait(self, timeout: timedelta | None = None) -> bool:
        with _disable_current_modes():  # the engine may run under a Trace
            self.group._wait(self)
        return True

    def deliver(self) -> None:
        if self.delivered.is_set():
            return
        # The other ranks take part in it, so its result does not depend on this rank's buffer.
        result = self.collective()
        dtype, *layout = self.layout
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storages[0].cdata)
        if storage is None:
            self.group.violation(
                f"collective {self.index}: its buffer was freed before it was delivered"
            )
        else:
            out = torch.empty(0, dtype=dtype).set_(storage, *layout)
            if not torch.equal(
                out.isnan() if dtype.is_floating_point else out == _poison(out),
                torch.ones_like(out, dtype=torch.bool),
            ):
                self.group.violation(
                    f"collective {self.index}: its buffer was written to in flight"
                )
            out.copy_(result)
        self.delivered.set()


class Deferred(ProcessGroup):
    """The ranks of the default (gloo) group.

    Collectives are delivered first in first out: "lazy", at the wait for them or for a later one;
    "delayed", on a thread after a random time.

    Args:
        rank: the rank that the group says it has.
        fail_launch, fail_wait: number of the collective whose launch or wait raises InjectedError.
        on_launch: called with a collective's number once it is in flight.

    Attributes:
        violations: every misuse.
        works: every collective, in order.
        events: ("launch" | "wait", number), and under `Trace` ("op", name) for each op that touches
            data.
    """

    def __init__(
        self,
        mode: str,
        rank: int | None = None,
        fail_launch: int | None = None,
        fail_wait: int | None = None,
        on_launch: Callable[[int], None] = lambda index: None,
    ):
        super().__init__(dist.get_rank() if rank is None else rank, dist.get_world_size())
        assert mode in MODES, mode
        self.registered_name = f"deferred_{next(_numbers)}"  # group_name needs a C++ backend
        self.lazy = mode == "lazy"
        self.fail_launch, self.fail_wait, self.on_launch = fail_launch, fail_wait, on_launch
        self.violations: list[str] = []
        self.works: list[_Work] = []
        self.in_flight: list[_Work] = []  # launched and not waited for, delivered or not
        self.max_in_flight = 0
        self.events: list[tuple[str, int | str]] = []
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver_late, daemon=True)

    def violation(self, text: str) -> RuntimeError:
        self.violations.append(text)
        return RuntimeError(text)

    def allreduce(self, tensors: list[Tensor], options) -> Work:
        with _disable_current_modes():
            (buffer,), op = tensors, options.reduceOp
            sent = buffer.clone()

            def collective():
                dist.all_reduce(sent, op)
                return sent

            return self._launch(_Work(self, [buffer], collective), buffer, options.asyncOp)

    def gather_base(self, out: Tensor, shard: Tensor, async_op: bool) -> Work:
        """_allgather_base, which C++ does not look up in Python: `Trace` brings it here."""
        with _disable_current_modes():
            sent, result = shard.clone(), torch.empty_like(out)

            def collective():
                dist.all_gather(list(result.view(-1, sent.numel())), sent)
                return result

            return self._launch(_Work(self, [out, shard], collective), out, async_op)

    def _launch(self, work: _Work, out: Tensor, async_op: bool) -> Work:
        if work.index == self.fail_launch:
            raise InjectedError(f"launch {work.index}")
        if not async_op:
            raise self.violation(f"collective {work.index}: asyncOp is not set")
        out.copy_(_poison(out))
        self.works.append(work)
        self.in_flight.append(work)
        self.max_in_flight = max(self.max_in_flight, len(self.in_flight))
        self.events.append(("launch", work.index))
        if not self.lazy:
            if work.index == 0:
                self._thread.start()
            self._queue.put(work)
        self.on_launch(work.index)
        return work

    def _wait(self, work: _Work) -> None:
        work.waits += 1
        self.events.append(("wait", work.index))
        if work.waits > 1:
            raise self.violation(f"collective {work.index}: waited for {work.waits} times")
        # In "delayed" mode it may have been delivered before.
        freed = any(storage.expired() for storage in work.storages)
        if self.lazy:
            for earlier in self.works[: work.index + 1]:
                earlier.deliver()
        elif not work.delivered.wait(TIMEOUT):
            raise self.violation(f"collective {work.index}: not delivered in {TIMEOUT} s")
        self.in_flight.remove(work)
        if freed:
            raise self.violation(f"collective {work.index}: a buffer was freed before its wait")
        if work.index == self.fail_wait:
            raise InjectedError(f"wait {work.index}")

    def _deliver_late(self) -> None:
        rng = random.Random(self.rank())  # the ranks differ
        while (work := self._queue.get()) is not None:
            time.sleep(rng.uniform(0, 0.001))
            try:
                work.deliver()
            except Exception as error:
                self.violation(f"collective {work.index}: {error}")

    def finish(self) -> None:
        """Ends the thread and looks for collectives that were not waited for."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(TIMEOUT)
        for work in self.works:
            if work.waits == 0:
                self.violation(f"collective {work.index}: never waited for")


class Trace(TorchDispatchMode):
    """Lists the ops inside the engine's ops, and which of them touch a buffer in flight.

    No error may pass through here: torch leaves Python's error set while C++ unwinds, and Pending's
    destructor, which runs Python, hangs.
    """

    def __init__(self, group: Deferred):
        super().__init__()
        self.group, self.depth = group, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, group = kwargs or {}, self.group
        if func.namespace == "c10d":
            assert (
                func is torch.ops.c10d._allgather_base_.default
                and ProcessGroup.unbox(args[2]) is group
            ), func
            # A default is left out.
            async_op = args[3] if len(args) > 3 else func._schema.arguments[3].default_value
            return args[0], group.gather_base(args[0], args[1], async_op).boxed()
        if (
            func.namespace.startswith("tpk") and self.depth == 0
        ):  # the engine's op: straight to its kernel, with this mode on inside it
            self.depth = 1
            try:
                with self:
                    return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
            finally:
                self.depth = 0
        if not func.is_view:
            name = func._schema.name.rpartition("::")[2].rstrip("_")
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if tensors:
                group.events.append(("op", name))
            for work in group.in_flight:
                if any(
                    a < end and start < b
                    for start, end in map(_span, tensors)
                    for a, b in work.spans
                ):
                    group.violation(f"collective {work.index}: {name} touches its buffer in flight")
        try:
            return func(*args, **kwargs)
        except Exception as error:
            group.violation(f"{func} raised under Trace: {error}")
            return kwargs.get("out", args[0])


@contextmanager
def deferred(mode: str, **options) -> Iterator[Deferred]:
    """A registered `Deferred`; its `violations` are complete when the block has ended."""
    group = Deferred(mode, **options)
    _register_process_group(group.registered_name, group)
    try:
        yield group
    finally:
        _unregister_process_group(group.registered_name)
        group.finish()
