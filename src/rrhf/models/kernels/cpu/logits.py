"""Logits on a CPU: tiles that stay in its caches, e^x by 2^x, the best tokens looked for in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rrhf.models.kernels import reference

LOGIT_ELEMENTS = 1 << 20  # logits that exist at a time: a tile should stay in the processor's caches
LOGIT_ROWS = 2048  # tokens that share one pass over the output layer's weights
EVEN_ROWS = 16  # products of 779 rows take up to a quarter longer than those of 784
SAMPLING_ROWS = 16  # rows whose [rows, vocabulary] temporaries stay in the caches
TOP_BLOCK = 256  # tokens whose highest score is looked at before the tokens themselves
LOG2_E = math.log2(math.e)


def logit_tiles(rows: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    return reference.tiles(rows, vocabulary, LOGIT_ROWS, LOGIT_ELEMENTS)


def logit_rows(vocabulary: int) -> int:
    return max(1, 4 * LOGIT_ELEMENTS // vocabulary)


def sampling_rows(vocabulary: int) -> int:
    return SAMPLING_ROWS


def spare_rows(rows: int) -> int:
    return -rows % EVEN_ROWS


def exp_(x: Tensor) -> Tensor:
    """e^x in place by 2^x, which is several times as fast."""
    return x.mul_(LOG2_E).exp2_()


def exp_less_(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(y * -LOG2_E, x, alpha=LOG2_E, out=x).exp2_()


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` in the ``count`` blocks with the largest maxima, which hold the ``count`` highest scores."""
    rows, vocabulary = scores.shape
    if vocabulary % TOP_BLOCK or count * TOP_BLOCK >= vocabulary:
        return reference.top(scores, count)
    blocks = scores.view(rows, -1, TOP_BLOCK)
    best = torch.topk(blocks.amax(dim=-1), count, dim=-1).indices
    inside = blocks.gather(1, best[:, :, None].expand(-1, -1, TOP_BLOCK)).flatten(1)
    values, columns = torch.topk(inside, count, dim=-1)
    return values, best.gather(1, columns // TOP_BLOCK) * TOP_BLOCK + columns % TOP_BLOCK
