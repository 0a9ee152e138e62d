"""A layer's keys and values while responses are decoded: a query's columns first, then one column a slot each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rrhf.models.kernels.attention_call import AttentionCall


@dataclass
class KeyBlock:
    """``keys`` and ``values`` [N, H_kv, C, D] of the columns [start, start + C)."""

    start: int
    keys: Tensor
    values: Tensor

    @property
    def end(self) -> int:
        return self.start + self.keys.shape[2]


class KeyCache(Protocol):
    """The cache of one layer for N queries."""

    def block(self, column: int) -> KeyBlock:
        """The block with ``column``, whose step's columns all lie in it; made when it is first asked for."""
        ...

    def columns_read(self, end: int) -> int:
        """How many columns ``attend`` reads, so that a mask has as many, where ``end`` columns hold keys."""
        ...

    def mask_type(self, dtype: torch.dtype) -> torch.dtype:
        """The type of a mask for queries of ``dtype``."""
        ...

    def attend(self, call: AttentionCall, queries: Tensor, mask: Tensor) -> Tensor:
        """``queries`` [N, H_kv, L, D] over the cached keys, under an additive mask [N, 1, L, columns read].

        ``call`` has the scaling, the soft cap and the sinks, [H_kv, L]; its own tensors are not used.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these queries' keys, in this order."""
        ...
