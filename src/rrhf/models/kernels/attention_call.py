"""What an attention layer asks for in one forward call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """softmax(scaling · q kᵀ) v over what may be read.

    ``query``: Tensor of shape (B, H, L, D). ``key``, ``value``: Tensors of shape (B, H_kv, K, D); H is a multiple of
    H_kv (grouped queries). ``window``: only keys less than so many positions before the query are read. ``softcap``
    (Gemma 2): a score s becomes c · tanh(s / c). ``dropout``: the probability that a weight is dropped.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def over(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The same attention over other tensors."""
        return replace(self, query=query, key=key, value=value)
