"""PyTorch's own distributed tests over shm: `make test-c10d` runs them on 2 and on 3 ranks.

C10D_BACKEND=gloo runs the same over gloo, which must pass whatever shm is not asked for below.
"""

import os
import unittest

import torch
from torch_tests import load

import tpkernels  # noqa: F401  registers the backend

BACKEND = os.environ.get("C10D_BACKEND", "shm")
# Ranks are forked from here, and OpenMP's threads do not follow a fork.
torch.set_num_threads(1)
tests = load(BACKEND, int(os.environ.get("WORLD_SIZE", "2")))

# Torch itself refuses these by the backend's name, or tells of it.
BY_NAME = {
    "test_monitored_barrier_gloo": "torch takes monitored_barrier for gloo alone",
    "test_monitored_barrier_gloo_subgroup": "torch takes monitored_barrier for gloo alone",
    "test_ddp_logging_data_cpu": "torch's C++ calls every backend from outside 'custom'",
}
# These fail over gloo too, once they are rewritten to the CPU.
NOT_ON_CPU = {
    "needs a GPU: torch's SyncBatchNorm takes no CPU tensors": (
        "test_DistributedDataParallel_SyncBatchNorm",
        "test_DistributedDataParallel_SyncBatchNorm_2D_Input",
        "test_DistributedDataParallel_SyncBatchNorm_Channels_Last",
        "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value",
        "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient",
        "test_DistributedDataParallel_SyncBatchNorm_No_Affine",
        "test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process",
        "test_DistributedDataParallel_SyncBatchNorm_half",
        "test_ddp_inference",
        "test_ddp_uneven_inputs_stop_iteration_sync_bn",
        "test_sync_bn_logged",
    ),
    "needs a GPU: it uses a device's events, index or name": (
        "test_ddp_apply_optim_in_backward",
        "test_ddp_apply_optim_in_backward_grad_as_bucket_view_false",
        "test_ddp_apply_optim_in_backward_ignored_params",
        "test_ddp_device",
        "test_ddp_logging_data_gpu",
        "test_ddp_native_mixed_precision_grad_as_bucket_view_no_set_grad_none",
        "test_ddp_native_mixed_precision_grad_as_bucket_view_set_grad_to_none",
        "test_ddp_native_mixed_precision_no_grad_as_bucket_view_no_set_grad_none",
        "test_ddp_native_mixed_precision_no_grad_as_bucket_view_set_grad_to_none",
        "test_stateless_api_with_ddp",
    ),
    "needs NCCL": (
        "test_average_parameters",
        "test_monitored_barrier_allreduce_hang",
        "test_monitored_barrier_allreduce_hang_wait_all_ranks",
    ),
    "needs a GPU: on CPUs it does not end within 100 s": ("test_ddp_uneven_inputs",),
}


def reason_to_skip(name: str) -> str | None:
    """Return why a test is not asked for, or None."""
    if BACKEND != "gloo" and name in BY_NAME:
        return BY_NAME[name]
    return next((reason for reason, names in NOT_ON_CPU.items() if name in names), None)


class TestDistributed(tests.TestDistBackend, tests.DistributedTest._DistTestBase):
    """Each test in ranks that are forked from this process, which has imported torch."""

    def setUp(self):
        if reason := reason_to_skip(self._testMethodName):
            raise unittest.SkipTest(reason)
        super().setUp()
        self._start_processes(torch.multiprocessing.get_context("fork").Process)
