"""The cache of packed weights: edits are seen, memory goes back, threads are safe."""

import threading

import pytest
import torch
import torch.nn.functional as F
from gemms import OPS, PACKED, forced, integers, needs_packing
from helpers import EXACT
from torch.testing import assert_close

from tpkernels import _C


def settled(w, x):
    """After this the weight's packed copy is in use."""
    for _ in range(3):
        OPS.linear(x, w, None, False)
    assert _C.packed_bytes(w)


EDITS = {
    "add_": lambda w: w.add_(1),
    "an element": lambda w: w[1, 3].add_(1),
    "data.mul_": lambda w: w.data.mul_(2),
    "data.copy_": lambda w: w.data.copy_(torch.ones_like(w)),
    "data: the first row": lambda w: w.data[0].add_(1),
    "data: the last row": lambda w: w.data[-1].add_(1),
    "data: two rows swapped": lambda w: w.data.__setitem__(slice(0, 2), w.data[:2].flip(0).clone()),
    "data: the first column": lambda w: w.data[:, 0].add_(1),
    "data: the last column": lambda w: w.data[:, -1].add_(1),
    "data: a column inside": lambda w: w.data[:, w.shape[1] // 2].add_(1),
    "numpy": lambda w: (
        w.detach().float().numpy().__imul__(2) if w.dtype == torch.float32 else w.data.mul_(2)
    ),
    "set_": lambda w: w.data.set_(torch.ones_like(w)),
    "data =": lambda w: setattr(w, "data", torch.ones_like(w)),
}


@needs_packing
@pytest.mark.parametrize("shape", [(64, 200), (3, 1000), (500, 5)], ids=str)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_seen(edit, inference, shape):
    if edit == "an element" and inference:
        pytest.skip(
            "an inference tensor has no version: one element's edit shows only where it is sampled"
        )
    with torch.inference_mode(inference), forced(PACKED):
        w, x = integers(*shape), integers(4, shape[1])
        settled(w, x)
        for _ in range(2):
            EDITS[edit](w)
            for _ in range(3):
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)


@needs_packing
def test_a_weight_that_always_changes_is_never_packed():
    with forced(PACKED):
        w, x = integers(64, 64), integers(4, 64)
        for _ in range(5):
            w.add_(1)
            assert_close(OPS.linear(x, w, None, False), F.linear(x, w))
            assert not _C.packed_bytes(w)


@needs_packing
def test_memory_goes_back():
    before = _C.packed_bytes()
    with forced(PACKED):
        x, weights = integers(4, 64), [integers(64, 64) for _ in range(3)]
        for w in weights:
            settled(w, x)
        assert _C.packed_bytes() == before + sum(_C.packed_bytes(w) for w in weights)
        OPS.linear(x, weights[0], None, True)  # training begins
        assert not _C.packed_bytes(weights[0])
        del w, weights
        assert _C.packed_bytes() == before
        for _ in range(20):  # addresses come back, with other content
            w = integers(64, 64)
            for _ in range(3):
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)


@needs_packing
def test_views_have_entries_of_their_own():
    with forced(PACKED):
        whole, x = integers(128, 64), integers(4, 64)
        views = [whole, whole[:64], whole[64:], whole[:64].t(), whole[::2]]
        for _ in range(3):
            for w in views:
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)
        assert_close(OPS.linear(x, whole[:64], None, False), F.linear(x, whole[:64]))
        settled(whole[64:], x)


@needs_packing
def test_threads():
    errors = []

    def work(weights, x):
        try:
            for i in range(60):
                w = weights[i % len(weights)]
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)
                fresh = integers(32, 64)
                for _ in range(2):
                    assert_close(OPS.linear(x, fresh, None, False), F.linear(x, fresh))
                if i % 7 == 0:
                    OPS.linear(x, w, None, True)
        except BaseException as error:
            errors.append(error)

    with forced(PACKED):
        weights, x = [integers(64, 64) for _ in range(3)], integers(4, 64)
        threads = [threading.Thread(target=work, args=(weights, x)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
