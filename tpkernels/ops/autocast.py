"""What nn.Linear does under torch.autocast, for layers that are autograd.Functions: cast on the way in, once."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(tensor: Tensor | None, device_type: str) -> Tensor | None:
    """`tensor` in autocast's dtype if autocast is on for the device, else as it is. Casts of leaf weights are cached."""
    if tensor is None or not torch.is_autocast_enabled(device_type):
        return tensor
    dtype = torch.get_autocast_dtype(device_type)
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    return torch.ops.tpkernels.autocast_to(tensor, dtype)
