"""Malformed calls of every op, each in a process of its own, in memory with guard pages.

Nothing but an error or a result may come of a call: no signal, no access outside of a buffer, no
hang, no uninitialised memory in a result, no result that the fake kernel does not announce.

    python tests/support/fuzz.py --calls 200 --seed 1           every op, on a group of one rank
    python tests/support/fuzz.py --pairs 500 --seed 1           two ranks, of which one is wrong
    python tests/support/fuzz.py --ops norm --seed 1 --only 17  one call again, in detail
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import ctypes
import faulthandler
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from malformed import described, has_memory, malformed
from op_samples import rand, samples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import tpkernels  # noqa: F401  (registers the ops)

LIMIT = 60  # seconds that a call may take on a loaded machine
TIMEOUT = timedelta(seconds=20)  # of the ranks' collectives
UNINITIALISED = ("empty_comm_buffer",)  # ops whose result is uninitialised on purpose
CONTIGUOUS = torch.contiguous_format
SCHEMA_ERRORS = ("Expected a value of type", "expected at most", "missing value for argument")
PAIRED = (
    "row_linear",
    "row_linear_rms_norm",
    "column_linear_backward",
    "vocab_embedding",
    "vocab_ce",
    "vocab_linear_ce",
    "all_reduce_",
    "all_gather",
)


def op_names() -> list[str]:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(op for space, _, op in names if space == "tpkernels")


def good_samples(rank: int, world_size: int) -> dict[str, list[tuple]]:
    """Return good arguments of every op, for the first group of a process that has none yet."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    group = dist.group.WORLD.group_name
    found = {
        "add_bias_residual_": [(rand(2, 3, 4), rand(4), rand(2, 3, 4))],
        "autocast_to": [(rand(2, 3), torch.bfloat16)],
        "open_peer_memory": [(group, rand(4096), 1, 0, 0, 2, 1024, 512)],
        **samples(),
    }
    dist.destroy_process_group()
    return found


class Call:
    """A call of an op that follows from a key.

    Args:
        op: the op's name.
        good: good arguments of it, among which the key chooses.
        key: the seed of all choices.
        wrong: change the arguments.
    """

    def __init__(self, op: str, good: list[tuple], key: str, wrong: bool = True):
        self.name = op
        self.op = getattr(torch.ops.tpkernels, op).default
        self.good = good
        self.key = key
        self.wrong = wrong

    def arguments(self) -> list:
        """Return the same arguments each time, in new memory."""
        rng = random.Random(self.key)
        torch.manual_seed(rng.randrange(2**32))
        sample = copy.deepcopy(rng.choice(self.good))
        return malformed(self.op, sample, rng) if self.wrong else list(sample)

    def outcome(self, twice: bool = True) -> dict:
        """Call the op, twice over memory of other content, and say what came of it."""
        arguments = self.arguments()
        outcome = {"call": f"{self.name}({', '.join(map(described, arguments))})"}
        try:
            results = [self._results(0xA5, arguments)]
            if twice:
                results.append(self._results(0x3C, self.arguments()))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            kind = "schema" if any(words in text for words in SCHEMA_ERRORS) else "refused"
            problem = "unclear error" if "INTERNAL ASSERT" in text else None
            return {
                **outcome,
                "kind": kind,
                "text": text.split("\nException raised")[0][:2000],
                "problem": problem,
            }
        problem = None
        if len(results) == 2:
            if self.name not in UNINITIALISED and bits(results[0]) != bits(results[1]):
                problem = "two runs differ: uninitialised memory"
            problem = problem or self._unlike_fake(results[0][: -len(arguments)])
        return {**outcome, "kind": "ran", "text": "", "problem": problem}

    def _results(self, fill: int, arguments: list) -> list:
        """Return the results and the arguments, which the op may have changed."""
        fill_new_memory(fill)
        result = self.op(*arguments)
        return [*(result if isinstance(result, (list, tuple)) else [result]), *arguments]

    def _unlike_fake(self, results: list) -> str | None:
        """Return how the results differ from the fake kernel's, or None."""
        arguments = self.arguments()
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if any(not is_dense(t) or t.is_neg() for t in tensors):  # torch cannot fake these
            return None
        with FakeTensorMode() as mode:
            fake = [
                torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, a)
                for a in arguments
            ]
            try:
                found = self.op(*fake)
            except Exception as error:
                return f"the fake kernel raises {error!r}"
        found = found if isinstance(found, (list, tuple)) else [found]
        ours, theirs = [list(map(metadata, results)), list(map(metadata, found))]
        return None if ours == theirs else f"{ours}, but the fake kernel says {theirs}"


def is_dense(t: torch.Tensor) -> bool:
    return t.layout == torch.strided and not t.is_nested


def metadata(t: object) -> object:
    return (tuple(t.shape), t.dtype, t.device.type) if isinstance(t, torch.Tensor) else t


def bits(values: list) -> list:
    """Return what tells two runs' values apart."""
    dense = (t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor))
    return [
        t.detach()
        .resolve_neg()
        .flatten()
        .clone(memory_format=CONTIGUOUS)
        .view(torch.uint8)
        .tolist()
        for t in dense
        if is_dense(t) and t.device.type == "cpu" and has_memory(t)
    ]


def fill_new_memory(byte: int) -> None:
    """Let fresh buffers hold a byte, where guarded_memory.cpp is loaded."""
    ctypes.c_ubyte.in_dll(ctypes.CDLL(None), "guarded_fill").value = byte


class Child:
    """A forked process that writes a function's result, as JSON."""

    def __init__(self, function: Callable[[], dict]):
        here, there = os.pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the result)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(here)
            os.dup2(self.errors.fileno(), 2)
            faulthandler.enable()
            os.write(there, json.dumps(function()).encode())
            os._exit(0)
        os.close(there)
        self.pipe = here

    def result(self, until: float) -> dict:
        """Wait for the result; a problem says what happened where there is none."""
        text = b""
        while select.select([self.pipe], [], [], max(until - time.monotonic(), 0))[0]:
            if not (piece := os.read(self.pipe, 65536)):
                break
            text += piece
        else:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.errors.seek(0)
        trace = self.errors.read().decode(errors="replace")[-1500:]
        self.errors.close()
        if status == 0:
            return json.loads(text)
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        what = "hang" if status == -signal.SIGKILL else name
        return {"kind": "died", "call": "", "problem": f"{what}\n{trace}"}


def alone(op: str, good: list[dict], key: str) -> list[dict]:
    """Make one malformed call, on a group of one rank where the op takes a group."""
    has_group = any(
        a.name == "group" for a in getattr(torch.ops.tpkernels, op).default._schema.arguments
    )

    def call() -> dict:
        if has_group:
            backend = random.Random(key).choice(("shm", "shm", "gloo"))
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Call(op, good[0][op], key).outcome()

    return [Child(call).result(time.monotonic() + LIMIT)]


def paired(op: str, good: list[dict], key: str) -> list[dict]:
    """Call an op on two ranks, on one of them with malformed arguments."""
    rng = random.Random(key)
    backend, wrong = rng.choice(("shm", "shm", "gloo")), rng.randrange(2)

    def call(rank: int, store: str) -> dict:
        # Ranks that send different sizes end in gloo's abort, but for the switch that finds them.
        os.environ["TPKERNELS_DEBUG"] = "1" if backend == "gloo" else "0"
        options = dict(store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=TIMEOUT)
        dist.init_process_group(backend, **options)
        outcome = Call(op, good[rank][op], key, rank == wrong).outcome(twice=False)
        dist.destroy_process_group()
        return outcome

    with tempfile.TemporaryDirectory() as folder:
        ranks = [Child(lambda rank=rank: call(rank, f"{folder}/store")) for rank in range(2)]
        until = time.monotonic() + LIMIT
        results = [rank.result(until) for rank in ranks]
    return results[wrong:] + results[:wrong]  # the malformed call first


def run_share(options: argparse.Namespace) -> dict:
    """Make every `of`-th call; return the kinds' counts by op, and the problems."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with FakeTensorMode():  # imports what each child would
        torch.ones(1)
    make, count = (paired, options.pairs) if options.pairs else (alone, options.calls)
    size = 2 if options.pairs else 1
    good = [good_samples(rank, size) for rank in range(size)]
    gc.freeze()  # children copy no page for a collection
    names = options.ops or (PAIRED if options.pairs else op_names())
    if options.pairs:
        jobs = [(names[i % len(names)], i) for i in range(count)]
    else:
        jobs = [(name, i) for name in names for i in range(count)]
    if options.only is not None:
        jobs = [(name, options.only) for name in names]
    counts: dict = collections.defaultdict(collections.Counter)
    problems = []
    for name, i in jobs[options.share :: options.of]:
        outcomes = make(name, good, f"{options.seed} {name} {i}")
        counts[name][outcomes[0]["kind"]] += 1
        if options.only is not None:
            print(json.dumps(outcomes, indent=1), file=sys.stderr)
        problems += [
            f"--ops {name} --only {i}: {o['call']}: {o['problem']}"
            for o in outcomes
            if o["problem"]
        ]
    return {"counts": counts, "problems": problems}


@contextlib.contextmanager
def guarded_memory() -> Iterator[dict[str, str]]:
    """Yield an environment in which a process has guarded_memory.cpp loaded."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guarded.so"
        source = Path(__file__).with_name("guarded_memory.cpp")
        compiler = [os.environ.get("CXX", "g++"), "-O2", "-shared", "-fPIC", "-o", library]
        subprocess.run([*compiler, source, "-ldl"], check=True)
        yield {**os.environ, "LD_PRELOAD": library}


def run(arguments: list[str], shares: int = 2) -> dict:
    """Run `shares` processes of this file over guarded memory, and put their reports together."""
    counts: dict = collections.defaultdict(collections.Counter)
    problems = []
    with guarded_memory() as environment:
        command = [sys.executable, __file__, *arguments, "--of", str(shares), "--share"]
        processes = [
            subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE)
            for i in range(shares)
        ]
        for process in processes:
            report = json.loads(process.communicate()[0])
            problems += report["problems"]
            for op, kinds in report["counts"].items():
                counts[op].update(kinds)
    return {"counts": counts, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=200, help="malformed calls an op")
    parser.add_argument("--pairs", type=int, default=0, help="calls on two ranks instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ops", nargs="*", help="these ops alone")
    parser.add_argument("--only", type=int, help="the call of this number alone")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share is not None:
        print(json.dumps(run_share(options)))
        return
    report = run(sys.argv[1:], 1 if options.only is not None else 2)
    for op, kinds in sorted(report["counts"].items()):
        print(f"{op:24}", *(f"{kind} {n:4}" for kind, n in sorted(kinds.items())))
    print(*report["problems"], f"{len(report['problems'])} problems", sep="\n")
    sys.exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
