"""nn.Linear's behaviour under torch.autocast, for layers that are autograd.Functions."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def autocast(tensor: Tensor, device_type: str) -> Tensor: ...
@overload
def autocast(tensor: None, device_type: str) -> None: ...
def autocast(tensor: Tensor | None, device_type: str) -> Tensor | None:
    """Return `tensor` in autocast's dtype if autocast is on for the device, else unchanged.

    Casts of leaf weights are cached while autocast is on.
    """
    if tensor is None or not torch.is_autocast_enabled(device_type):
        return tensor
    dtype = torch.get_autocast_dtype(device_type)
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    return torch.ops.tpkernels.autocast_to(tensor, dtype)
