"""Where a record's query and responses stand in a row of tokens, and which token may read which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """One record in the row: ``start``, the query's length, the responses' input lengths (‖y_i‖ − 1)."""

    start: int
    query: int
    responses: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of the query and all responses."""
        return self.query + sum(self.responses)

    @property
    def reach(self) -> int:
        """Positions of the query and its longest response together."""
        return self.query + max(self.responses, default=0)


def column_ends(trees: Sequence[Tree]) -> list[int]:
    """Where each token stops being read: row q reads column k iff k ≤ q < end[k].

    A query's tokens are read up to the end of their tree, a response's up to its own end.
    """
    ends: list[int] = []
    for tree in trees:
        ends += [tree.start + tree.size] * tree.query
        for size in tree.responses:
            ends += [len(ends) + size] * size
    return ends


def visible(ends: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Which row reads which column: Tensor of shape (t, t), bool.

    Args:
        ends: ``column_ends`` of the t tokens, counted from the first of them. Tensor of shape (t,).
        positions: Tensor of shape (t,).
        window: with a sliding window only columns with position_q − position_k < window are read.
    """
    order = torch.arange(len(ends), device=ends.device)
    seen = (order[None, :] <= order[:, None]) & (order[:, None] < ends[None, :])
    if window is not None:
        seen &= positions[:, None] - positions[None, :] < window
    return seen
