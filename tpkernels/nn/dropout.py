"""Dropout whose mask is the same at any TP size."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.dropout import dropout


class Dropout(nn.Dropout):
    """torch.nn.Dropout that draws by seed and position; see `tpkernels.functional.dropout`.

    Args:
        p: probability of a zero. `inplace` is not supported.

    Raises:
        ValueError: p outside [0, 1].

    Example:
        >>> Dropout(0.1).eval()(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, p: float = 0.5):
        super().__init__(p)

    def forward(self, input: Tensor) -> Tensor:
        """Return input with elements dropped while training."""
        return dropout(input, self.p) if self.training and self.p else input
