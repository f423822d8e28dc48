"""The RNG tracker on a GPU's generator, recorded: its seeds, its offset, and what it puts back."""

import itertools

import pytest
import torch

from tpkernels.rng import RngTracker


class Generator:
    """Philox: a state is a seed and an offset, and drawing moves the offset."""

    def __init__(self, seed):
        self.state = (seed, 0)

    def initial_seed(self):
        return self.state[0]

    def get_offset(self):
        return self.state[1]

    def set_offset(self, offset):
        assert offset % 4 == 0  # torch refuses others
        self.state = (self.state[0], offset)

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def manual_seed(self, seed):
        assert 0 <= seed < 2**63
        self.state = (seed, 0)


@pytest.fixture
def generators(monkeypatch):
    made = [Generator(5), Generator(6)]
    monkeypatch.setattr(torch.cuda, "default_generators", made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return made


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_a_fork_and_its_end(generators, device):
    first, second = generators
    second.set_offset(8)
    tracker = RngTracker(rank=2)
    tracker.fork(torch.device(device))
    forked = second.state
    assert tracker.is_forked and forked[0] != 6
    second.set_offset(400)
    tracker.fork(torch.device(device))  # within a fork
    assert second.state == (forked[0], 400)
    for _ in range(2):
        tracker.restore()
        assert second.state == (6, 12) and not tracker.is_forked
    assert first.state == (5, 0)


def test_seeds_of_ranks_steps_and_users_differ(generators):
    seeds = set()
    for rank, steps, seed in itertools.product(range(3), range(3), (5, 7)):
        generators[0].state = (seed, 4 * steps)
        RngTracker(rank).fork(torch.device("cuda:0"))
        seeds.add(generators[0].initial_seed())
    assert len(seeds) == 18
