"""RNG tracker: random numbers inside a tensor-parallel region."""

from __future__ import annotations

import torch


class RngTracker:
    """Lets ranks draw different random numbers while their default generators stay in step.

    `fork` reseeds the device's default generator from its own state and the rank. `restore` puts
    it back, one step on, the same on every rank. The ranks may draw different counts in between.
    The seed comes from the default generator: activation checkpointing, which restores that one,
    recomputes the same masks with nothing more to restore. No GPU is synchronised.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.is_forked = False  # between `fork` and `restore`
        self._generator: torch.Generator | None = None
        self._state: torch.Tensor | None = None

    def fork(self, device: torch.device) -> None:
        """Draw from this rank's own stream on `device` until `restore`."""
        if self.is_forked:
            return
        self.is_forked = True
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            generator = torch.cuda.default_generators[index]
            seed, offset = generator.initial_seed(), generator.get_offset()
            generator.set_offset(offset + 4)  # Philox: four numbers a step
            draw = hash((seed, offset))
        else:
            generator = torch.default_generator
            draw = int(torch.randint(2**62, (), generator=generator))
        self._generator, self._state = generator, generator.get_state()
        # The multiplier is 2^64 / golden ratio: neighbouring ranks get distant seeds.
        generator.manual_seed((draw + 0x9E3779B97F4A7C15 * (self.rank + 1)) % 2**63)

    def restore(self) -> None:
        """Put the default generator back; do nothing outside of a fork."""
        if self._generator is not None and self._state is not None:
            self._generator.set_state(self._state)
            self._generator = self._state = None
            self.is_forked = False

    def __deepcopy__(self, memo) -> RngTracker:
        return RngTracker(self.rank)
