"""Which records go into which optimiser step."""

from __future__ import annotations

import random
from collections.abc import Iterator


class StepSampler:
    """Indices of this process's share of every micro-batch, shuffled anew each epoch from the seed.

    A micro-batch has ``world · per_device`` records; process ``rank`` takes every ``world``-th of them. The last one of
    an epoch may be smaller, and a process's share of it empty: no record is left out and none is used twice, whatever
    the number of processes.
    """

    def __init__(self, size: int, per_device: int, world: int = 1, rank: int = 0, seed: int = 0) -> None:
        self.size, self.batch, self.world, self.rank, self.seed = size, per_device * world, world, rank, seed
        self.epoch = 0
        self.batch_sampler = self  # where transformers looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.size))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for start in range(0, self.size, self.batch):
            yield order[start : start + self.batch][self.rank :: self.world]
