"""The gate on GPU kernels: what the compiler makes of each configuration in specs.py, for each
chip, and the bytes it moves.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import report
from aot import FLOAT_ATOMIC, Spec, access, compile_all, faults, measure_all
from chips import CHIPS
from specs import load
from workers import pool

SPECS = load()
NVIDIA = ("sm_80", "sm_90", "sm_100")
MATMUL = dict(
    kernel="samples:matmul",
    signature=dict(
        a="*bf16",
        b="*bf16",
        c="*bf16",
        M="i32",
        N="i32",
        K="i32",
        stride_a="i32",
        stride_b="i32",
        stride_c="i32",
    ),
    kind="gemm",
    divisible=("a", "b", "c", "M", "N", "K", "stride_a", "stride_b", "stride_c"),
)
SCALE = dict(
    kernel="samples:scale",
    signature=dict(x="*bf16", y="*bf16", n="i32"),
    constexprs=dict(BLOCK=2048),
    kind="memory",
)
ROWS = dict(kernel="samples:softmax", signature=dict(x="*bf16", y="*bf16"), divisible=("x", "y"))
COLUMN_SUM = dict(kernel="samples:column_sum", constexprs=dict(COLUMNS=1024))

# name -> what the gates must let through
GOOD = [
    Spec("scale", divisible=("x", "y", "n"), op="scale", case="samples:run", **SCALE),
    Spec(
        "add_bias",
        "samples:add_bias",
        dict(x="*bf16", bias="*bf16", y="*bf16", rows="i32"),
        dict(COLUMNS=1024, ROWS=4),
        kind="memory",
        divisible=("x", "bias", "y"),
        op="add_bias",
        case="samples:run",
        chips=NVIDIA,
    ),
    Spec("matmul", constexprs=dict(BM=128, BN=128, BK=64), num_warps=8, num_stages=2, **MATMUL),
    Spec("softmax", constexprs=dict(N=8192), num_warps=8, **ROWS),
    Spec(
        "integer atomic", "samples:count_positive", dict(x="*bf16", total="*i32"), dict(BLOCK=1024)
    ),
]

# what they must refuse, and for what
BAD = [
    (
        Spec(
            "spilling matmul",
            constexprs=dict(BM=256, BN=256, BK=64),
            chips=("sm_90", "gfx942"),
            **MATMUL,
        ),
        r"spills \d+ bytes",
    ),
    (
        Spec("wide rows", constexprs=dict(N=8192), num_warps=1, chips=NVIDIA, **ROWS),
        r"bytes a thread in local memory",
    ),
    (
        Spec(
            "too much shared memory",
            constexprs=dict(BM=128, BN=128, BK=128),
            num_warps=8,
            num_stages=5,
            **MATMUL,
        ),
        "of shared memory of",
    ),
    (Spec("unaligned", **SCALE), "loads too few of its bytes 16 at a time"),
    (
        Spec("unaligned output", divisible=("x", "n"), **SCALE),
        "stores too few of its bytes 16 at a time",
    ),
    (
        Spec("float32 atomic", signature=dict(x="*bf16", total="*fp32", rows="i32"), **COLUMN_SUM),
        "adds floats atomically",
    ),
    (
        Spec("bfloat16 atomic", signature=dict(x="*bf16", total="*bf16", rows="i32"), **COLUMN_SUM),
        "adds floats atomically",
    ),
    (
        Spec(
            "no tensor cores",
            "samples:matmul_ieee",
            dict.fromkeys("abc", "*fp32"),
            dict(BM=32, BN=32, BK=32),
            kind="gemm",
            chips=NVIDIA,
        ),
        "does not use tensor cores",
    ),
    (
        Spec("does not compile", "samples:softmax", dict(x="*bf16", y="*bf16"), dict(N=1000)),
        r"does not compile: .*power of 2",
    ),
]
# op -> bytes of its input and output, and of scratch, over the least
WASTEFUL = {"scale_twice": (1.5, 0.0), "scale through scratch": (1.0, 1.0)}


@pytest.fixture(scope="module")
def made():
    return compile_all(SPECS + GOOD + [spec for spec, _ in BAD])


@pytest.fixture(scope="module")
def traffic():
    return measure_all(
        [*SPECS, *GOOD, *(Spec(op, "", {}, {}, op=op, case="samples:run") for op in WASTEFUL)]
    )


@pytest.mark.parametrize(
    ("spec", "chip"),
    [pytest.param(s, c, id=f"{s.name} {c}") for s in SPECS + GOOD for c in s.chips],
)
def test_let_through(made, spec, chip):
    assert faults(spec, made[spec.name, chip]) == []
    assert 0 < made[spec.name, chip].occupancy <= 1


@pytest.mark.parametrize(
    ("spec", "chip", "why"),
    [pytest.param(s, c, w, id=f"{s.name} {c}") for s, w in BAD for c in s.chips],
)
def test_refused(made, spec, chip, why):
    found = faults(spec, made[spec.name, chip])
    assert any(re.search(why, fault, re.S) for fault in found), found


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=s.name) for s in SPECS + GOOD if s.kind in ("memory", "reduction")]
)
def test_bytes_moved(traffic, spec):
    """Within 5% of the least: each input read once, each output written once; and no scratch but
    what the spec says.
    """
    moved = traffic[spec.op]
    assert moved.ratio <= 1.05, moved
    assert moved.scratch == 2 * spec.scratch
    if (
        "4096 rows" in spec.op
    ):  # a training step's: with the partial sums of bias and weight gradients
        assert moved.moved + moved.scratch <= 1.05 * moved.least, moved


def test_bytes_moved_in_vain(traffic):
    found = {
        op: (traffic[op].moved / traffic[op].least, traffic[op].scratch / traffic[op].least)
        for op in WASTEFUL
    }
    assert found == WASTEFUL


def test_documented(made, traffic):
    table = report.triton_table(SPECS, made, traffic)
    print(f"\n{table}")
    before = report.between(report.DOCUMENT.read_text(), "triton")
    if "Triton " in before and f"Triton {version('triton')}.\n" not in before:
        pytest.skip("docs/kernels.md was written with another version of Triton")
    assert report.keep("triton", table), (
        "docs/kernels.md was not current and has been written anew: commit it"
    )


def test_what_each_chip_multiplies_with(made):
    assert [made["matmul", chip].tensor_cores for chip in CHIPS] == [
        ["HMMA"],
        ["HGMMA"],
        ["UTCHMMA"],
        ["MFMA"],
    ]
    assert made["matmul", "sm_100"].tensor_memory == 128


def test_spills_are_in_the_instructions(made):
    """Two witnesses: ptxas's report, and loads and stores of local memory in the machine code."""
    for spec in [*GOOD, *(spec for spec, _ in BAD)]:
        for chip in set(spec.chips) & set(NVIDIA):
            resources = made[spec.name, chip]
            assert bool(resources.spills) == any(
                opcode.startswith("STL") for opcode in resources.opcodes
            ), (spec.name, chip)


@pytest.mark.parametrize(
    ("opcode", "meaning"),
    [
        ("LDG.E.128", ("load", 16)),
        ("LDG.E.128.CONSTANT", ("load", 16)),
        ("LDG.E.LTC128B", ("load", 4)),
        ("LDG.E.LTC128B.64", ("load", 8)),
        ("LDG.E.U16", ("load", 2)),
        ("LDG.E.S8", ("load", 1)),
        ("STG.E", ("store", 4)),
        ("LDGSTS.E.BYPASS.LTC128B.128", ("load", 16)),
        ("STG.E.ENL2.256", ("store", 32)),
        ("UTMALDG.2D", ("load", 16)),
        ("ST.E.128", ("store", 16)),
        ("LDS.128", None),
        ("LDC.64", None),
        ("STL.64", None),
        ("global_load_dwordx4", ("load", 16)),
        ("buffer_store_dwordx2", ("store", 8)),
        ("buffer_load_dword", ("load", 4)),
        ("global_load_ushort", ("load", 2)),
        ("global_store_short_d16_hi", ("store", 2)),
        ("buffer_load_ubyte", ("load", 1)),
        ("ds_read_b128", None),
    ],
)
def test_access(opcode, meaning):
    assert access(opcode) == meaning


FLOAT_ATOMICS = """
    ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU RED.E.ADD.F32x4.RN REDG.E.ADD.F64.RN ATOMG.E.ADD.BF16x8.RN
    RED.E.ADD.F16x2.RN.STRONG.SYS ATOMS.ADD.F32 global_atomic_add_f32 buffer_atomic_add_f32
    global_atomic_pk_add_bf16 flat_atomic_add_f64 ds_add_f32 ds_pk_add_rtn_bf16
"""
OTHER_OPCODES = """
    ATOMG.E.ADD.STRONG.GPU ATOMG.E.CAS.STRONG.SYS REDUX.SUM.S32 CREDUX.MAX.F32 UTCATOMSWS.AND
    RED.E.MAX.S32.STRONG.GPU global_atomic_add global_atomic_cmpswap ds_add_u32 ds_add_rtn_u64
    buffer_load_dword
"""


def test_float_atomics_by_opcode():
    assert [opcode for opcode in FLOAT_ATOMICS.split() if not FLOAT_ATOMIC.match(opcode)] == []
    assert [opcode for opcode in OTHER_OPCODES.split() if FLOAT_ATOMIC.match(opcode)] == []


def _libraries(spec: Spec, chip: str) -> list[str]:
    from aot import compile

    assert not compile(spec, chip).error
    with open("/proc/self/maps") as maps:
        return sorted({line.split("/")[-1].strip() for line in maps if "/" in line})


def test_environment(monkeypatch):
    """A worker is the same whatever this process was told about Triton, and compiles with no CUDA
    driver and no CUDA runtime.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/bin/false")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", "/bin/false")
    for chip in ("sm_80", "sm_100"):
        with pool(1) as workers:
            libraries = workers.submit(_libraries, GOOD[0], chip).result(timeout=300)
        assert [
            name for name in libraries if name.startswith(("libcuda", "libamdhip", "libnvidia"))
        ] == []
        assert any(name.startswith("libtriton") for name in libraries)


def test_a_spec_imports_no_triton():
    """Else this process, which only reads the specs, would settle whether kernels tested in it are
    interpreted.
    """
    code = (
        "import sys; sys.path[:] = sys.argv[1:]; import specs, aot; specs.load(); "
        "assert 'triton' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *sys.path], check=True, timeout=300)


def test_repeated_names_are_refused():
    with pytest.raises(ValueError, match="scale"):
        compile_all([GOOD[0], GOOD[0]])
