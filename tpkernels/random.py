"""Random numbers inside a split region."""

from __future__ import annotations

import torch


class RankRandom:
    """Lets ranks draw different numbers, and different counts of them, while their default generators stay in step.

    `enter` reseeds the device's default generator from its own state and the rank; `leave` puts it back, one step on, the same
    on every rank. The seed comes from the default generator, so activation checkpointing, which restores that one, recomputes
    the same masks with nothing more to restore. No GPU is synchronised.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self._generator: torch.Generator | None = None
        self._state: torch.Tensor | None = None

    def enter(self, device: torch.device) -> None:
        if self._generator is not None:
            return
        if device.type == "cuda":
            generator = torch.cuda.default_generators[
                device.index if device.index is not None else torch.cuda.current_device()
            ]
            seed, offset = generator.initial_seed(), generator.get_offset()
            generator.set_offset(offset + 4)  # Philox: four numbers a step
            draw = hash((seed, offset))
        else:
            generator = torch.default_generator
            draw = int(torch.randint(2**62, (), generator=generator))
        self._generator, self._state = generator, generator.get_state()
        generator.manual_seed((draw + 0x9E3779B97F4A7C15 * (self.rank + 1)) % 2**63)

    def leave(self) -> None:
        if self._generator is not None:
            self._generator.set_state(self._state)
            self._generator = self._state = None

    def __deepcopy__(self, memo):
        return RankRandom(self.rank)
