"""Weights between those that training began with and those that it came to.

A policy on the straight line from ρ to π is nearer to ρ than π, without another training (WiSE-FT, arXiv 2109.01903;
WARP, arXiv 2406.16768, for rewarded policies). What it is worth here: docs/relative.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """start + share · (end − start), each weight in the type and on the device that ``end`` has it in.

    Args:
        start, end: tensors of the same shapes by name; one that ``start`` lacks, or that holds no fractions, stays.
        share: 0 gives ``start``, 1 ``end``.
    """
    found = {}
    for name, weight in end.items():
        before = start.get(name)
        if before is None or not weight.is_floating_point():
            found[name] = weight
            continue
        exact = torch.promote_types(weight.dtype, torch.float32)
        found[name] = torch.lerp(before.to(weight.device, exact), weight.to(exact), share).to(weight.dtype)
    return found
