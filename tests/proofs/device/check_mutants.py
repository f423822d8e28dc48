"""The checks of the CUDA kernels bite: every synchronisation in their source, taken out or weakened
in turn, is noticed.

A mutant is one match of one pattern below, so that a synchronisation added to the source is a new
mutant by itself. A synchronisation mutant must fail check.cpp under ThreadSanitizer (a wrong
result, a hang, a race), a bounds mutant under AddressSanitizer, a mutant of what only machine code
shows must make sass.complaints complain.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import device_build
import pytest
import sass

SEEDS, TIMEOUT = 24, 60

SYNCHRONISATION = (
    # pattern, what stands in its place, what that is
    (r"__syncthreads\(\);", ";", "no __syncthreads"),
    (r"\bbarrier<kRanks>\(.*?\);", ";", "no barrier"),
    (r"store_release\([^()]*(\([^()]*\))?[^;]*, epoch\);", ";", "no signal"),
    (r"while \(.*\) spin\(\);", ";", "no wait"),
    (r"__ATOMIC_(RELEASE|ACQUIRE)\b", "__ATOMIC_RELAXED", "a relaxed flag"),
    (r"load_acquire\(seen\) < epoch", "load_acquire(seen) != epoch", "waits for one epoch alone"),
    (r"using Epoch = uint64_t", "using Epoch = uint32_t", "epochs that wrap"),
    (
        r"load_acquire\(seen\) < epoch",
        "static_cast<int32_t>(load_acquire(seen) - epoch) < 0",
        "epochs that an idle lane falls behind by 2^31",
    ),
    (r"threadIdx\.x < kRanks\b", "threadIdx.x < kRanks - 1", "the last rank is not waited for"),
    (r"blockIdx\.x \* kMaxRanks", "0", "all blocks share flags"),
    (r"epoch / kEpochsPerLaunch % 2", "0", "one buffer"),
    (r"epoch / kEpochsPerLaunch % 2", "epoch % 2", "the parity of the epoch, not of the launch"),
    (r"kEpochsPerLaunch = 2", "kEpochsPerLaunch = 1", "an epoch a launch"),
    (r"epoch \+ 2\b", "epoch + 1", "the second barrier counts as the first"),
    (r"epoch \+ 1\b", "epoch", "the first barrier counts as the last of the launch before"),
    (r"advance_epochs\(a\.epochs, epoch\);", ";", "the epoch stands still"),
    (r"if \(lane < kMaxBlocks\)", "if (threadIdx.x == 0)", "lanes without a block stay behind"),
    (r"epoch \+ kEpochsPerLaunch", "epoch + 2 * kEpochsPerLaunch", "the same slot twice in a row"),
    (r"x \+= __shfl_xor_sync\(.*?\);", ";", "no sum over the warp"),
    (r"slots\[rank\] \+ vector", "slots[kRanks - 1 - rank] + vector", "another order of the sum"),
    (
        r"sum\.add\(parts\[rank\]\);",
        "sum = Accumulator<T>(sum.round()), sum.add(parts[rank]);",
        "a sum rounded at each step",
    ),
    (
        r"if \(threadIdx\.x % kWarp == 0\) sums",
        "if (threadIdx.x % kWarp == 0 && threadIdx.x / kWarp != 1) sums",
        "a warp's sum is not written",
    ),
)
BOUNDS = (
    (
        r"i < count \? load\(address \+ i\) : from_float<T>\(0\.f\)",
        "load(address + i)",
        "reads past the end of a row",
    ),
    (r"if \(i < count\) store", "store", "writes past the end of a row"),
    (
        r"count == Vector<T>::kSize && is_aligned",
        "is_aligned",
        "a whole vector where fewer elements are left",
    ),
    (r"&& is_aligned\(address\)", "", "a whole vector across a 16-byte boundary"),
    (
        r"min\(length, vectors - segment \* length\)",
        "length",
        "the last segment as long as the others",
    ),
    (r"in_segment < partition\.end\(segment\)", "true", "the last slice as long as the others"),
)
MACHINE_CODE = (
    (r"st\.release\.sys", "st.relaxed.sys", "a flag stored relaxed"),
    (r"st\.release\.sys", "st.release.gpu", "a flag stored for this GPU alone"),
    (r"ld\.acquire\.sys", "ld.relaxed.sys", "a flag loaded relaxed"),
    (r"ld\.acquire\.sys", "ld.acquire.gpu", "a flag loaded from this GPU alone"),
    (
        r"multimem\.(ld_reduce|st)\.relaxed\.sys",
        r"multimem.\1.relaxed.gpu",
        "a multicast access for this GPU alone",
    ),
    (r"\.acc::f32", "", "a switch that sums in half precision"),
    (
        r"copy_in\(a, partition, reinterpret_cast<Vector<T>\*>\(a\.peers\[a\.rank\] \+ offset\)",
        "copy_in(a, partition, slots[a.rank]",
        "slots indexed at run time",
    ),
    (
        r"reinterpret_cast<Vector<T>\*>\(a\.peers\[owner\] \+ offset\)",
        "slots[owner]",
        "slots indexed at run time",
    ),
    (
        r"return \*address;",
        "if constexpr (sizeof(V) == 16) { "
        "uint4 bits = __ldg(reinterpret_cast<const uint4*>(address)); "
        "return reinterpret_cast<V&>(bits); } else { return *address; }",
        "peers' data through the read-only path",
    ),
    (
        r"__launch_bounds__\(kThreads, 1\)(?= (one|two)_shot\()",
        "__launch_bounds__(kThreads)",
        "fewer loads in flight",
    ),
)


@dataclass
class Mutant:
    file: Path
    start: int
    end: int
    text: str
    what: str

    def __str__(self):
        line = self.file.read_text().count("\n", 0, self.start) + 1
        return f"{self.file.name}:{line} {self.what}"

    def write(self, folder: Path) -> Path:
        """A copy of the headers with this change: the folder to pass as `headers`."""
        headers = folder / "tpkernels"
        shutil.copytree(device_build.HEADERS, headers)
        source = self.file.read_text()
        (headers / self.file.name).write_text(source[: self.start] + self.text + source[self.end :])
        return headers


def mutants(patterns) -> list[Mutant]:
    found = []
    for pattern, text, what in patterns:
        matches = [
            (file, m)
            for file in sorted(device_build.HEADERS.glob("*.cuh"))
            for m in re.finditer(pattern.replace(" ", r"\s+"), file.read_text())
        ]
        assert matches, f"no {pattern} in the source: the pattern has to follow the code"
        found += [Mutant(file, *m.span(), m.expand(text), what) for file, m in matches]
    return found


@pytest.mark.parametrize(
    ("sanitizer", "patterns"),
    (("thread", SYNCHRONISATION), ("address", BOUNDS)),
    ids=("synchronisation", "bounds"),
)
def test_every_mutant_is_noticed(sanitizer, patterns, tmp_path):
    device_build.objects(sanitizer)  # once, not by both workers

    def killed_by(mutant: Mutant, folder: Path) -> str | None:
        device_build.check_program(folder / "check", sanitizer, mutant.write(folder))
        status, said = device_build.run_check(folder / "check", SEEDS, TIMEOUT)
        (folder / "check").unlink()
        known = {
            0: None,
            1: "wrong result",
            2: "hang",
            66: {"thread": "race", "address": "bad address"}[sanitizer],
        }
        assert status in known, f"{mutant}: status {status}\n{said[-2000:]}"
        return known[status]

    report(mutants(patterns), killed_by, tmp_path)


@pytest.mark.skipif(
    sass.nvcc() is None, reason="no nvcc: neither in CUDA_HOME, /usr/local/cuda nor PATH"
)
def test_every_mutant_of_the_machine_code_is_noticed(tmp_path):
    source = sass.instances(("__nv_bfloat16", "__half"), (8,), norms=(False,))

    def killed_by(mutant: Mutant, folder: Path) -> str | None:
        kernels = sass.compile_kernels("sm_90", source, mutant.write(folder), folder)
        return next(
            (complaint for kernel in kernels for complaint in sass.complaints(kernel)), None
        )

    report(mutants(MACHINE_CODE), killed_by, tmp_path)


def report(mutants: list[Mutant], killed_by, tmp_path: Path) -> None:
    def kill(indexed):
        folder = tmp_path / str(indexed[0])
        folder.mkdir()
        return killed_by(indexed[1], folder)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(kill, enumerate(mutants)))
    for mutant, result in zip(mutants, results, strict=True):
        print(f"  {mutant}: {result or 'SURVIVED'}")
    killed = sum(result is not None for result in results)
    print(f"killed / total: {killed} / {len(mutants)}")
    assert killed == len(mutants), [
        str(mutant) for mutant, result in zip(mutants, results, strict=True) if result is None
    ]
