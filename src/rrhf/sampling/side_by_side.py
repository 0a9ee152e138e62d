"""A batch decoded in lanes side by side, each by processor threads of its own.

Most operations of a decode step are too small to be shared by several threads, and one that is shared ends when its
slowest thread does. Lanes share nothing but the weights, and wait for nothing.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from rrhf.models.kernels.choice import kernels_for
from rrhf.models.rotations import changes_with_length
from rrhf.sampling.stepping import device_of

T = TypeVar("T")


def lanes_of(model: PreTrainedModel, queries: int, width: int) -> int:
    """Into how many lanes a batch of ``queries`` of ``width`` rows is cut; 1 where they might disturb each other.

    Lanes are computed at the same time: rotary embeddings that change with the length of what they see, and processes
    that talk to each other during a forward pass, forbid that. Threads do not know of a caller's autocast.
    """
    device = device_of(model)
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if spread or torch.is_autocast_enabled(device.type) or any(map(changes_with_length, model.modules())):
        return 1
    return min(queries, kernels_for(device).lanes(queries * width))


def side_by_side(work: Callable[[Sequence[int], threading.Event], list[T]], count: int, lanes: int) -> list[T]:
    """What ``work`` returns for the numbers 0 to ``count`` − 1, of which every lane takes each ``lanes``-th.

    Args:
        work: returns one result a number; it ends early, with whatever result, once the event is set, which happens
            where another lane fails or the program is told to stop.
    """
    threads, given_up = torch.get_num_threads(), threading.Event()
    shares = [range(lane, count, lanes) for lane in range(lanes)]

    def run(share: Sequence[int]) -> list[T]:
        torch.set_num_threads(max(1, threads // lanes))  # of this thread
        try:
            return work(share, given_up)
        except BaseException:
            given_up.set()
            raise

    results: list[Any] = [None] * count
    with ThreadPoolExecutor(lanes) as pool:
        try:
            futures = [pool.submit(contextvars.copy_context().run, run, share) for share in shares]
            for share, future in zip(shares, futures, strict=True):
                for number, result in zip(share, future.result(), strict=True):
                    results[number] = result
        finally:
            given_up.set()
            pool.shutdown()
            torch.set_num_threads(threads)
    return results
