"""What an attention layer asks for in one forward call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """softmax(scaling · q kᵀ) v over what may be read.

    ``query``: Tensor of shape (B, H, L, D). ``key``, ``value``: Tensors of shape (B, H_kv, K, D); H is a multiple of
    H_kv (grouped queries). ``window``: only keys less than so many positions before the query are read. ``softcap``
    (Gemma 2): a score s becomes c · tanh(s / c). ``dropout``: the probability that a weight is dropped. ``chunk``
    (Llama 4): only keys of the query's own chunk of so many positions are read. ``sinks`` (GPT-OSS), Tensor of shape
    (H, 1) or (H, L): a score that takes its part of the softmax and has no value; see ``reference.with_sinks``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    chunk: int | None = None
    sinks: Tensor | None = None

    def over(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The same attention over other tensors."""
        return replace(self, query=query, key=key, value=value)

    def hides(self, reach: int) -> bool:
        """Whether the window or the chunk hides keys from queries whose positions are below ``reach``."""
        return any(limit is not None and reach > limit for limit in (self.window, self.chunk))
