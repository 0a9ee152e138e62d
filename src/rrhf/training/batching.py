"""Which records go into which optimiser step, and which process computes them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


class StepSampler:
    """Indices of this process's share of every micro-batch, shuffled anew each epoch from the seed.

    A step has ``world · per_device · accumulation`` records, the last one of an epoch what is left: no record is left
    out and none is used twice, whatever the number of processes. Processes share a step by tokens, so that none waits
    long for the others; a share may be empty. It is spread over the step's micro-batches in the order of the step.

    Args:
        tokens: of each record.
        per_device: records of a process and micro-batch, on average.
        accumulation: micro-batches of a step.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        per_device: int,
        accumulation: int = 1,
        *,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        self.tokens, self.batch, self.accumulation = tokens, per_device * world, accumulation
        self.per_device, self.world, self.rank, self.seed = per_device, world, rank, seed
        self.epoch = 0
        self.batch_sampler = self  # where transformers looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.tokens)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for start in range(0, len(order), self.batch * self.accumulation):
            step = order[start : start + self.batch * self.accumulation]
            share = [step[i] for i in shares([self.tokens[index] for index in step], self.world)[self.rank]]
            batches = -(-len(step) // self.batch)
            size = max(self.per_device, -(-len(share) // batches))
            yield from (share[i * size : (i + 1) * size] for i in range(batches))


def shares(tokens: Sequence[int], count: int) -> list[list[int]]:
    """Split items into ``count`` shares of nearly equal sums: the largest first, each to the least filled share.

    The fullest share is at most 4/3 of what is possible (Graham, 1969). Indices stand in ascending order in a share.
    """
    filled = [0] * count
    result: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        least = filled.index(min(filled))
        filled[least] += tokens[index]
        result[least].append(index)
    return [sorted(share) for share in result]
