"""Triton's interpreter (TRITON_INTERPRET=1) made fit to test kernels with: `install()` once, before
the first launch.

What Triton 3.7 to 3.9 get wrong, silently:
- A bfloat16 value is held as its bits in a uint16, and operations compute with those integers. Here
  elementwise arithmetic and tl.dot widen to float32 and round each result to bfloat16, as the
  hardware does; reductions, scans and atomics of bfloat16, whose rounding depends on an order that
  is the compiler's, raise: convert to float32 first.
- float32 to bfloat16 truncates, which also makes infinities of some NaNs. Here it rounds to nearest
  even, and a NaN stays one.
- An access outside a tensor reads or corrupts whatever is there. Here each address that the mask
  lets through must be an element of a tensor argument of the launch, or of a tensor named in
  `visible`; strides count, so the gap between the rows of a slice is outside.
- An integer divided by zero is zero. On a GPU it is anything, and here it raises.
- tl.maximum and tl.minimum return NaN where one operand is one. By default they give the other
  operand on a GPU.
"""

from __future__ import annotations

import contextlib
import inspect

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)


class OutOfBounds(Exception):
    pass


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), rounded to nearest even; overflow gives infinity, every
    NaN the quiet one.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_float32(name: str):
    """The method `name` with bfloat16 operands widened, and a floating-point result rounded back: a
    comparison's is boolean.
    """
    original = getattr(InterpreterBuilder, name)

    def method(self, *args):
        if not any(map(_is_bf16, args)):
            return original(self, *args)
        result = original(self, *map(_widened, args))
        return (
            TensorHandle(narrow(result.data), tl.bfloat16)
            if result.data.dtype.kind == "f"
            else result
        )

    return method


def _by_nonzero(name: str):
    """The integer division `name`, whose result a GPU does not define where a divisor is zero."""
    original = getattr(InterpreterBuilder, name)

    def method(self, lhs, rhs):
        if not np.all(rhs.data):
            raise ZeroDivisionError(f"{self.kernel}, program {self.grid_idx}: an integer over zero")
        return original(self, lhs, rhs)

    return method


class Region:
    """A tensor's elements as addresses."""

    def __init__(self, name: str, tensor):
        self.name, self.tensor, self.start, self.itemsize = (
            name,
            tensor,
            tensor.data_ptr(),
            tensor.element_size(),
        )
        sizes = [
            (stride, size)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            if size > 1 and stride
        ]
        self.dims = sorted(sizes, reverse=True)
        self.elements = (
            (1 + sum((size - 1) * stride for stride, size in self.dims)) if tensor.numel() else 0
        )

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        """Each address's offset in elements from the first, or -1 where there is no element of this
        tensor.
        """
        distance = addresses.astype(np.int64) - self.start
        offsets, misaligned = np.divmod(distance, self.itemsize)
        inside, rest = (misaligned == 0) & (offsets >= 0) & (offsets < self.elements), offsets
        for stride, size in self.dims:
            index, rest = np.divmod(rest, stride)
            inside = inside & (index < size)
        return np.where(inside & (rest == 0), offsets, -1)


class Builder(InterpreterBuilder):
    binary_op, ternary_op, unary_op = map(_in_float32, ("binary_op", "ternary_op", "unary_op"))
    create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)  # noqa: E731
    create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)  # noqa: E731
    create_fma, create_rsqrt, create_erf = map(
        _in_float32, ("create_fma", "create_rsqrt", "create_erf")
    )

    create_sdiv, create_udiv, create_srem, create_urem = map(
        _by_nonzero, ("create_sdiv", "create_udiv", "create_srem", "create_urem")
    )

    arguments: tuple[Region, ...] = ()  # of the launch under way
    others: tuple[Region, ...] = ()
    # Called with "load" or "store", a Region and the offsets of its elements, for each access
    observe = None
    kernel = ""

    def get_bf16(self, value):
        return TensorHandle(narrow(np.array([value])), tl.bfloat16)

    def get_all_ones_value(self, type):
        if type.scalar == tl.bfloat16:
            raise NotImplementedError("all ones as a bfloat16")
        return super().get_all_ones_value(type)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return (
                src
                if _is_bf16(src)
                else TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
            )
        return super().cast_impl(_widened(src), dst_type)

    create_si_to_fp = create_ui_to_fp = create_fp_to_si = create_fp_to_ui = create_fp_ext = (
        create_fp_trunc
    ) = cast_impl

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if (
            dst_type.scalar == tl.bfloat16
            and rounding_mode == ir.ROUNDING_MODE.RTZ
            and src.dtype.scalar == tl.float32
        ):
            bits = (np.ascontiguousarray(src.data).view(np.uint32) >> 16).astype(np.uint16)
            return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), bits), tl.bfloat16)
        if dst_type.scalar == tl.bfloat16 and src.dtype.primitive_bitwidth > 16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *args):
        if _is_bf16(d):
            raise NotImplementedError("tl.dot with a bfloat16 accumulator: accumulate in float32")
        return super().create_dot(_widened(a), _widened(b), d, *args)

    def _check(self, kind: str, pointers, mask) -> None:
        mask = np.broadcast_to(
            np.asarray(getattr(mask, "data", mask), dtype=bool), pointers.data.shape
        )
        addresses = pointers.data[mask]
        for region in self.others + self.arguments:
            if not addresses.size:
                return
            offsets = region.offsets(addresses)
            inside = offsets >= 0
            if self.observe is not None and inside.any():
                self.observe(kind, region, offsets[inside])
            addresses = addresses[~inside]
        if addresses.size:
            raise OutOfBounds(self._describe(kind, addresses))

    def _describe(self, kind: str, addresses: np.ndarray) -> str:
        first, regions = int(addresses[0]), self.others + self.arguments
        message = (
            f"{self.kernel}, program {self.grid_idx}: {kind} of {addresses.size} element(s) "
            "outside every tensor"
        )
        if not regions:
            return message
        near = min(
            regions,
            key=lambda r: max(r.start - first, first - (r.start + r.elements * r.itemsize), 0),
        )
        shape = "x".join(map(str, near.tensor.shape))
        return (
            f"{message}; the first is {first - near.start} bytes from the start of {near.name!r} "
            f"({shape}, strides {near.tensor.stride()}, {near.itemsize} bytes each)"
        )

    def create_masked_load(self, ptrs, mask, other, *args):
        self._check("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, *args)

    def create_masked_store(self, ptrs, value, mask, *args):
        self._check("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *args)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        self._atomic(ptr, True)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        self._atomic(ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def _atomic(self, ptr, mask) -> None:
        if ptr.get_element_ty() == tl.bfloat16:
            raise NotImplementedError("an atomic on bfloat16")
        self._check("load", ptr, mask)
        self._check("store", ptr, mask)


def _tensors(argument) -> list:
    if isinstance(argument, tuple):
        return [tensor for item in argument for tensor in _tensors(item)]
    # A tensor descriptor or a reinterpreted tensor keeps its argument inside.
    argument = getattr(argument, "base", argument)
    return [argument] if hasattr(argument, "data_ptr") else []


class Executor(GridExecutor):
    def __call__(self, *args, **kwargs):
        builder, names = (
            triton_interpreter.interpreter_builder,
            inspect.signature(self.fn).parameters,
        )
        given = {
            **dict(zip(names, args, strict=False)),
            **{name: value for name, value in kwargs.items() if name in names},
        }
        outer = builder.arguments, builder.kernel
        builder.kernel = self.fn.__name__
        builder.arguments = tuple(
            Region(name, tensor) for name, value in given.items() for tensor in _tensors(value)
        )
        try:
            return super().__call__(*args, **kwargs)
        finally:
            builder.arguments, builder.kernel = outer


_apply = ReduceScanOpInterface.apply


def _reduce_or_scan(self, input):
    for tensor in input if isinstance(input, tuple) else (input,):
        if tensor.dtype == tl.bfloat16:
            raise NotImplementedError(
                "a reduction or scan in bfloat16 rounds at each step, in the compiler's order: "
                "convert to float32 first"
            )
    return _apply(self, input)


def install() -> None:
    triton_interpreter.interpreter_builder.__class__ = Builder
    triton_interpreter.GridExecutor = Executor
    ReduceScanOpInterface.apply = _reduce_or_scan


@contextlib.contextmanager
def visible(**tensors):
    """Tensors that kernels may also touch though they are no arguments of the launch, such as a
    peer's buffer given as an address.
    """
    builder = triton_interpreter.interpreter_builder
    before = builder.others
    builder.others = (*before, *(Region(name, tensor) for name, tensor in tensors.items()))
    try:
        yield
    finally:
        builder.others = before
