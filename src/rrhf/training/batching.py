"""Which records go into which optimiser step, and which process computes them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Steps:
    """The optimiser steps of a training on ``count`` records, which are shuffled anew each epoch from the seed.

    A step has ``per_device · world · accumulation`` records, the last one of an epoch what is left: no record is left
    out and none is used twice, whatever the number of processes.

    Args:
        count: records.
        per_device: records of a process and micro-batch, on average.
        accumulation: micro-batches of a step.
    """

    count: int
    per_device: int
    accumulation: int = 1
    world: int = 1
    seed: int = 0

    @property
    def batch(self) -> int:
        """Records of a micro-batch over all processes."""
        return self.per_device * self.world

    @property
    def size(self) -> int:
        return self.batch * self.accumulation

    @property
    def an_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.count // self.size)

    def of_epoch(self, epoch: int) -> Iterator[Sequence[int]]:
        """The indices of each step of an epoch."""
        order = _shuffled(self.count, self.seed, epoch)
        return (order[start : start + self.size] for start in range(0, len(order), self.size))

    def step(self, number: int) -> Sequence[int]:
        """The indices of the ``number``-th step of the whole training, from 0."""
        epoch, place = divmod(number, self.an_epoch)
        return _shuffled(self.count, self.seed, epoch)[place * self.size : (place + 1) * self.size]

    def micro_batches(self, number: int) -> int:
        """How many micro-batches that step has."""
        return -(-len(self.step(number)) // self.batch)

    def split(self, share: Sequence[T], batches: int) -> list[list[T]]:
        """A process's share of a step, spread over its micro-batches in the order of the step."""
        size = max(self.per_device, -(-len(share) // batches))
        return [list(share[i * size : (i + 1) * size]) for i in range(batches)]


@lru_cache(maxsize=2)  # two epochs meet in a window of OP-k
def _shuffled(count: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class StepSampler:
    """Indices of this process's share of every micro-batch; see ``Steps``.

    Processes share a step by tokens, so that none waits long for the others; a share may be empty.

    Args:
        tokens: of each record.
        per_device, accumulation, world, seed: as in ``Steps``.
        rank: of this process.
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
        self.tokens, self.rank = tokens, rank
        self.steps = Steps(len(tokens), per_device, accumulation, world, seed)
        self.epoch = 0
        self.batch_sampler = self  # where transformers looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.steps.batch)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps.of_epoch(self.epoch):
            mine = shares([self.tokens[index] for index in step], self.steps.world)[self.rank]
            yield from self.steps.split([step[i] for i in mine], -(-len(step) // self.steps.batch))


class MicroBatchSampler:
    """Names of micro-batches, (step of the whole training, micro-batch in it), for a data set that makes them itself.

    What a name stands for is made when it is asked for, so that a resumed training passes over those done before.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.epoch = 0
        self.batch_sampler = self  # where transformers looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.steps.count // self.steps.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.epoch * self.steps.an_epoch
        for number in range(first, first + self.steps.an_epoch):
            for batch in range(self.steps.micro_batches(number)):
                yield [(number, batch)]


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
