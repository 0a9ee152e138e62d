"""Attention sinks (GPT-OSS): one more score in the softmax, without a value; all kernels against that in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rrhf.models.kernels import reference
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import Kernels
from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.kernels.cpu.blocked_cache import BlockedCache
from rrhf.models.trees import Tree, column_ends, visible

pytestmark = pytest.mark.usefixtures("one_thread")

TREES = [Tree(0, 5, (3, 0, 4)), Tree(12, 2, (6,))]
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def one_call(**options: object) -> AttentionCall:
    """Six heads of size 4 that share two key heads, values of size 3, and six sinks of like size as the scores."""
    query, key, value = random(1, 6, 20, 4, seed=0), random(1, 2, 20, 4, seed=1), random(1, 2, 20, 3, seed=2)
    return AttentionCall(query, key, value, 0.7, sinks=random(6, 1, seed=3), **options)  # type: ignore[arg-type]


def naive(call: AttentionCall, seen: Tensor) -> Tensor:
    """The sink as a column of its own, whose weight is left out of the products; [B, H, L, D]."""
    key, value = call.key.repeat_interleave(3, dim=1), call.value.repeat_interleave(3, dim=1)
    scores = (call.scaling * call.query @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    assert call.sinks is not None
    sinks = call.sinks[..., None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1] @ value


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize("limits", [{}, {"window": 4}, {"chunk": 4}])
def test_over_trees(kernels: Kernels, limits: dict[str, int]) -> None:
    call, ends = one_call(**limits), torch.tensor(column_ends(TREES))
    seen = visible(ends, POSITIONS, call.window)
    if call.chunk is not None:
        seen &= POSITIONS[:, None] // 4 == POSITIONS // 4
    found, expected = kernels.tree_attention(TREES, ends, POSITIONS)(call).transpose(1, 2), naive(call, seen)
    error = 1e-12 if kernels is cpu and not limits else 1e-6  # products have their softmax in fp32
    assert float((found - expected).detach().abs().max()) < error
    outer, leaves = torch.randn_like(expected), [call.query, call.key, call.value, call.sinks]
    ours, theirs = (torch.autograd.grad(output, leaves, outer) for output in (found, expected))
    for mine, exact in zip(ours, theirs, strict=True):
        assert float((mine - exact).abs().max()) < 5 * error


def test_in_a_cache_of_blocks() -> None:
    """Rows of a key head stand below each other there: a sink for each of them."""
    call = one_call()
    with torch.no_grad():
        queries = call.query[:, :, :2]  # two slots
        cache = BlockedCache(call.key, call.value, 1, 11, 2, 20)
        for column in range(20):
            block = cache.block(column)
            block.keys[:, :, column - block.start] = call.key[:, :, column]
            block.values[:, :, column - block.start] = call.value[:, :, column]
        assert len(cache.blocks) == 2
        assert call.sinks is not None
        rows = replace(call, sinks=call.sinks.view(2, 3).repeat_interleave(2, dim=1))
        found = cache.attend(rows, queries.reshape(1, 2, 6, 4), torch.zeros(1, 1, 6, 20))
        expected = naive(replace(call, query=queries), torch.ones(2, 20, dtype=torch.bool))
    assert float((found.view_as(expected) - expected).abs().max()) < 1e-5
