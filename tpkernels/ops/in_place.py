"""Version counters of the ops that write to their first tensor.

Autograd compares them: a backward whose saved tensor has been written to raises, where it would
otherwise compute with the new values.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("tpkernels", "IMPL")  # its registrations end with it


def _counted(op):
    def kernel(keyset, tensor, *args, **kwargs):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            below = keyset & torch._C._after_ADInplaceOrView_keyset
            op.redispatch(below, tensor, *args, **kwargs)
        torch.autograd.graph.increment_version(tensor)

    return kernel


for _name in ("all_reduce_", "add_bias_residual_", "vocab_ce_grad_"):
    _op = getattr(torch.ops.tpkernels, _name).default
    _library.impl(_name, _counted(_op), "ADInplaceOrView", with_keyset=True)
