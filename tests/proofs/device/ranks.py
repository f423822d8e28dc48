"""n simulated GPUs that run the device code, from Python."""

import ctypes
from dataclasses import dataclass
from functools import cache

import device_build
import torch
from torch import Tensor

KERNELS = ("one_shot", "two_shot", "two_shot_multimem")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Spec(ctypes.Structure):  # harness.h
    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("kernel", "dtype", "norm", "blocks", "threads", "rows", "columns")
        ),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "weight", "fresh")),
        *(
            (name, ctypes.c_void_p)
            for name in ("input", "output", "normed", "kept_output", "kept_normed")
        ),
    ]


@cache
def library():
    lib = ctypes.CDLL(str(device_build.library()))
    lib.world_create.argtypes, lib.world_create.restype = (
        [ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64],
        ctypes.c_void_p,
    )
    lib.world_destroy.argtypes = [ctypes.c_void_p]
    lib.world_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_void_p,
    ]
    lib.world_run.restype = ctypes.c_bool
    lib.device_grid_size.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_bool]
    lib.device_slot_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    lib.device_slot_bytes.restype = ctypes.c_size_t
    lib.device_buffer_bytes.argtypes = [ctypes.c_size_t]
    lib.device_buffer_bytes.restype = ctypes.c_size_t
    return lib


def grid_size(rows: int, columns: int, dtype: torch.dtype, norm: bool) -> int:
    return library().device_grid_size(rows, columns, dtype.itemsize, norm)


def slot_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return library().device_slot_bytes(rows, columns, dtype.itemsize)


def buffer_bytes(slot_bytes: int) -> int:
    return library().device_buffer_bytes(slot_bytes)


@dataclass
class Launch:
    """One all-reduce on all ranks. inputs [ranks, rows, columns]; bias, weight [columns]; residual
    [rows, columns].
    """

    kernel: str
    inputs: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    weight: Tensor | None = None  # asks for the norm
    epsilon: float = 1e-5
    blocks: int = 2
    threads: int = 64
    in_place: bool = False
    offset: int = 0  # elements between a 16-byte boundary and the tensors' begin


class Ranks:
    def __init__(self, count: int, slot_bytes: int, epoch: int = 0):
        self.count, self.buffers = count, {}
        self.world = library().world_create(count, slot_bytes, epoch)

    def close(self) -> None:
        library().world_destroy(self.world)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def buffer(self, role: str, launch: Launch) -> list[Tensor]:
        """One a rank, at the same address in every launch of that shape: a repeated launch has
        identical arguments.
        """
        shape, dtype = launch.inputs.shape[1:], launch.inputs.dtype
        key = (role, shape, dtype, launch.offset)
        if key not in self.buffers:
            size = shape.numel() + launch.offset
            self.buffers[key] = [
                torch.full([size], float("nan"), dtype=dtype)[launch.offset :].view(shape)
                for _ in range(self.count)
            ]
        return self.buffers[key]

    def run(
        self, launches: list[Launch], seed: int = 0
    ) -> tuple[list[tuple[Tensor, Tensor | None]], int]:
        """The launches one after another, each rank in its own time: (output, normed) of each,
        [ranks, rows, columns], and the trace.
        """
        specs, results, alive = [], [], []
        for launch in launches:
            rows, columns = launch.inputs.shape[1:]
            norm = launch.weight is not None
            kept, kept_normed = (
                torch.empty_like(launch.inputs),
                torch.empty_like(launch.inputs) if norm else None,
            )
            results.append((kept, kept_normed))
            for rank in range(self.count):
                input = self.buffer("input", launch)[rank]
                output = input if launch.in_place else self.buffer("output", launch)[rank]
                normed = self.buffer("normed", launch)[rank] if norm else None
                # Tensors of the rank's own, and exactly as long as they should be.
                own = [
                    t if t is None else t.clone()
                    for t in (launch.bias, launch.residual, launch.weight, launch.inputs[rank])
                ]
                alive.append(own)
                pointers = [
                    t if t is None else t.data_ptr()
                    for t in (
                        *own,
                        input,
                        output,
                        normed,
                        kept[rank],
                        None if kept_normed is None else kept_normed[rank],
                    )
                ]
                ints = (
                    KERNELS.index(launch.kernel),
                    DTYPES.index(kept.dtype),
                    norm,
                    launch.blocks,
                    launch.threads,
                    rows,
                    columns,
                )
                specs.append(Spec(*ints, launch.epsilon, *pointers))
        trace = ctypes.c_uint64()
        finished = library().world_run(
            self.world, (Spec * len(specs))(*specs), len(launches), seed, ctypes.byref(trace)
        )
        assert finished, "the ranks hang"
        return results, trace.value
