"""What the host made, brought to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 4  # compiled kernels copy what does not begin at a multiple of 16 bytes, which are 4 int32


def on_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of one type as tensors on ``device`` by one copy, from pinned memory where it is a CUDA GPU's.

    A copy of ordinary memory makes the host wait until the GPU has done all that was asked of it before.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]
    dtype = torch.from_numpy(arrays[0][:0]).dtype
    host = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
    places = [0, *np.cumsum(sizes)[:-1].tolist()]
    for array, place in zip(arrays, places, strict=True):
        host[place : place + array.size].copy_(torch.from_numpy(array.ravel()))
    there = torch.empty(len(host), dtype=dtype, device=device).copy_(host, non_blocking=True)
    return [there[place : place + array.size].view(array.shape) for array, place in zip(arrays, places, strict=True)]
