"""A call of one of the engine's ops, and the check of everything that must hold for it: results,
errors, the schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from deferred import Deferred, Trace, deferred
from torch import Tensor
from unchecked import Unchecked

Event = tuple[str, "int | str"]  # ("launch" | "wait", number of the collective) or ("op", name)

# Collectives hide under these ops: all of them are issued before the first wait.
HIDDEN = ("mm", "addmm", "sum")
WATCHED = (*HIDDEN, "vocab_ce_grad", "norm", "add_bias_residual")  # in a schedule


@dataclass
class Case:
    """A call of an op of the engine.

    Attributes:
        name: starts with the op's name.
        call: (torch.ops.<library>, group name) -> list of results.
        want: the results.
        launches: collectives in flight at once, or up to the error where one is expected.
        error: a regex that an expected error matches.
        options: of the deferred group.
        trace: watch the ops that the engine issues.
        epilogue: the op that must ride under the later chunks' collectives.
        tolerance: of the results' largest element, where exp and log have to be computed.
        schedule: the launches, waits and WATCHED ops, up to the error if there is one, where some
            collectives are waited for at once. `launches` follows from it.
        peers: the most bytes that the group's peer all-reduce takes, if it has one.
        taken: the all-reduces that go through it, each its shape and epilogue.
    """

    name: str
    call: Callable
    want: list[Tensor]
    launches: int = 0
    error: str | None = None
    options: dict = field(default_factory=dict)
    trace: bool = True
    epilogue: str | None = None
    tolerance: float = 0.0
    schedule: list[Event] | None = None
    peers: int | None = None
    taken: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.schedule is not None:
            self.launches = sum(what == "launch" for what, _ in self.schedule)

    @property
    def op(self) -> str:
        return re.split("[ ,]", self.name)[0]

    def failing(self, i: int) -> Case:
        """The same with an error at the wait for collective i, which comes out of the op."""
        changed: dict = dict(
            name=f"{self.name}, wait {i} fails", options={"fail_wait": i}, error=f"^wait {i}$"
        )
        if self.schedule is not None:
            changed["schedule"] = self.schedule[: self.schedule.index(("wait", i)) + 1]
        return replace(self, **changed)


def random_integers(rng: torch.Generator, *shape: int) -> Tensor:
    """Small integers in float32: every sum of them is exact, in any order."""
    return torch.randint(-3, 4, shape, generator=rng).float()


def of_rank(t: Tensor, dim: int = -1) -> Tensor:
    """This rank's shard."""
    return t.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def close(ours: Tensor, want: Tensor, tolerance: float) -> bool:
    if not tolerance or not want.numel():
        return torch.equal(ours, want)
    largest_error = tolerance * want.abs().max().clamp_min(1)
    return ours.shape == want.shape and bool((ours - want).abs().max() <= largest_error)


def check(case: Case, library: str, mode: str) -> list[str]:
    """Everything that is wrong with the op of torch.ops.<library>."""
    with deferred(mode, **case.options) as group:
        got, error, found = _run(case, getattr(torch.ops, library), group)
    found = [*group.violations, *found, *_result_errors(case, got, error)]
    if len(group.works) != case.launches:
        found.append(f"{len(group.works)} collectives, not {case.launches}")
    if case.schedule is not None:
        found += _schedule_errors(case, group)
    else:
        found += _overlap_errors(case, group)
    return [f"{case.name}: {text}" for text in found]


def _run(
    case: Case, ops, group: Deferred
) -> tuple[list[Tensor] | None, Exception | None, list[str]]:
    """(results, error, complaints about the peer all-reduce and the log)."""
    got, error, found = None, None, []
    if case.peers is not None:
        ops.open_peers(group.registered_name, case.peers)
    try:
        with Trace(group) if case.trace else nullcontext():
            # Without a trace something throws in the engine, for which the checks must not.
            got = case.call(ops if case.trace else Unchecked(ops), group.registered_name)
    except Exception as caught:
        error = caught
    if case.peers is not None:
        taken, logged = ops.close_peers(group.registered_name)
        if taken != case.taken:
            found.append(f"the peer all-reduce took {taken}, not {case.taken}")
        if len(logged) != case.launches:
            found.append(f"the log has {logged}, and there were {case.launches} collectives")
    return got, error, found


def _result_errors(case: Case, got: list[Tensor] | None, error: Exception | None) -> list[str]:
    if case.error is not None:
        if error is None or not re.search(case.error, str(error)):
            return [f"raised {error!r} instead of {case.error!r}"]
        return []
    if error is not None or got is None:
        return [f"raised {error!r}"]
    if len(got) != len(case.want):
        return [f"{len(got)} results"]
    if not all(close(a, b, case.tolerance) for a, b in zip(got, case.want, strict=True)):
        return ["wrong result"]
    return []


def _schedule_errors(case: Case, group: Deferred) -> list[str]:
    assert case.schedule is not None

    def watched(event: Event) -> bool:
        return event[0] != "op" or (case.trace and event[1] in WATCHED)

    issued = [event for event in group.events if watched(event)]
    wanted = [event for event in case.schedule if watched(event)]
    if case.error is not None:
        issued = issued[: len(wanted)]
    return [] if issued == wanted else [f"issued {issued}, not {wanted}"]


def _overlap_errors(case: Case, group: Deferred) -> list[str]:
    """All collectives are in flight before the first wait, and each chunk's epilogue follows its
    own wait.
    """
    found = []
    if group.max_in_flight != case.launches:
        found.append(f"{group.max_in_flight} of {case.launches} collectives in flight at once")
    kinds = [what for what, _ in group.events]
    after = group.events[kinds.index("wait") :] if "wait" in kinds else []
    if late := [name for _, name in after if name in HIDDEN]:
        found.append(f"{late[0]} was issued after a wait")
    if case.error is None and case.epilogue and after:
        chunks = range(case.launches)
        alternating = [event for i in chunks for event in (("wait", i), ("op", case.epilogue))]
        if after != alternating:
            found.append("chunk i's epilogue was not issued between the waits for i and i + 1")
    return found
