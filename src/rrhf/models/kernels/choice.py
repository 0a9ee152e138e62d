"""The functions that kernels have, and which device has which kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from rrhf.models.kernels import reference
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.kernels.cuda import flex_attention
from rrhf.models.kernels.key_cache import KeyCache
from rrhf.models.trees import Tree


class Kernels(Protocol):
    """What a device computes in a way of its own. Products and in-place functions are without autograd."""

    def matmul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a · b for matrices."""
        ...

    def addmm(self, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """c + a · b for matrices."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias."""
        ...

    def lean(self, model: nn.Module) -> AbstractContextManager[None]:
        """While it lasts, modules of ``model`` compute the same in less memory or time."""
        ...

    def packed(self, model: nn.Module, rows: int, steps: int) -> AbstractContextManager[None]:
        """While it lasts, weights are laid out for ``steps`` forward passes of ``rows`` rows, if that pays."""
        ...

    def masked_attention(self, call: AttentionCall, mask: Tensor) -> Tensor:
        """``call`` under an additive ``mask`` [L, K] or [B, 1, L, K], which has the window in it; [B, H, L, D]."""
        ...

    def tree_attention(
        self, trees: Sequence[Tree], ends: Tensor, positions: Tensor
    ) -> Callable[[AttentionCall], Tensor]:
        """The attention of all layers in a forward call over a row of ``trees``; its results are [1, T, H, D].

        ``ends`` (``column_ends``) and ``positions`` are [T].
        """
        ...

    def key_cache(self, key: Tensor, value: Tensor, count: int, prompt: int, width: int, columns: int) -> KeyCache:
        """A layer's cache for ``count`` queries: ``prompt`` columns for a query, then ``width`` a step.

        ``key`` and ``value`` [1, H_kv, T, D] are some that the layer made. The cache ends at ``columns`` columns.
        """
        ...

    def logit_tiles(self, rows: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of logits [rows, vocabulary] that exist at a time; a row's columns come in order."""
        ...

    def logit_rows(self, vocabulary: int) -> int:
        """How many rows of logits exist at a time where all columns of a row must."""
        ...

    def sampling_rows(self, vocabulary: int) -> int:
        """How many rows of logits a sampling policy works on at a time."""
        ...

    def spare_rows(self, rows: int) -> int:
        """Rows to add to ``rows`` so that products with them are fast."""
        ...

    def exp_(self, x: Tensor) -> Tensor:
        """e^x in place."""
        ...

    def exp_less_(self, x: Tensor, y: Tensor) -> Tensor:
        """e^(x − y) in place of x."""
        ...

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias for matrices; of 16-bit ones in fp32, unrounded, where the device can."""
        ...

    def top(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` highest of each row of [R, V] and their columns; both [R, count].

        Highest first, of equals the lower column first: on every device the same.
        """
        ...

    def nucleus(self, vocabulary: int) -> int:
        """Among how many of the likeliest tokens a nucleus is looked for before the whole vocabulary is sorted.

        Less than the vocabulary where the host may look at the result without waiting for the device.
        """
        ...

    def lanes(self, rows: int) -> int:
        """Into how many lanes, computed at the same time, decoding ``rows`` rows a step is best cut."""
        ...

    def most_queries(self) -> int:
        """How many queries are decoded together at most where nobody says so."""
        ...

    def steps_between_checks(self) -> int:
        """Every how many decode steps the host looks which responses have ended and whether all numbers are finite."""
        ...

    def fp64_device(self, device: torch.device) -> torch.device:
        """Where sums in fp64 are made for tensors on ``device``: there, or on the CPU."""
        ...


KERNELS: dict[str, Kernels] = {"cpu": cpu}
# Plain torch, but for the attention over trees.
WITH_FLEX = cast(Kernels, SimpleNamespace(**{**vars(reference), "tree_attention": flex_attention.tree_attention}))

_FLEX = "_rrhf_flex"  # the attribute in which a model carries that its trees attend by FlexAttention


def kernels_for(device: torch.device, flex: bool = False) -> Kernels:
    """The kernels of a device, plain torch where none are listed; those with FlexAttention if ``flex``."""
    return WITH_FLEX if flex else KERNELS.get(device.type, reference)


def ask_for_flex(model: nn.Module, flex: bool = True) -> None:
    """Let ``model``'s trees attend by FlexAttention, or no longer. With gradients that takes a CUDA GPU.

    It has not run on one yet, so that masked calls of torch's own attention are what GPUs take unless asked.
    """
    vars(model)[_FLEX] = flex


def wants_flex(model: nn.Module) -> bool:
    return bool(vars(model).get(_FLEX))
