"""A CPU's kernels against plain torch's: the same functions, the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf.models.kernels import reference
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import Kernels, kernels_for
from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.kernels.reference import additive
from rrhf.models.trees import Tree, column_ends

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_devices_without_kernels_of_their_own_take_the_reference() -> None:
    assert kernels_for(torch.device("cpu")) is cpu
    assert kernels_for(torch.device("mps")) is reference
    assert kernels_for(torch.device("cuda:1")) is reference


@pytest.mark.parametrize(
    "compute",
    [
        lambda k: k.matmul(random(5, 7), random(7, 3)),
        lambda k: k.matmul(random(5, 7), random(7, 3), out=torch.empty(5, 3)),
        lambda k: k.addmm(random(5, 3), random(5, 7), random(7, 3)),
        lambda k: k.linear(random(2, 5, 7), random(3, 7), random(3)),
        lambda k: k.exp_(random(5, 7)),
        lambda k: k.exp_less_(random(5, 7), random(5, 1, seed=1)),
        lambda k: k.top(random(5, 1024), 3)[0],
        lambda k: k.top(random(5, 1024), 3)[1],
    ],
)
def test_elementary_functions(compute: Callable[[Kernels], Tensor]) -> None:
    assert torch.allclose(compute(cpu), compute(reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 7), (1, 5), (2049, 600), (5000, 49_152)])
def test_tiles_cover_all_logits_once(kernels: Kernels, rows: int, vocabulary: int) -> None:
    tiles = list(kernels.logit_tiles(rows, vocabulary))
    seen: dict[tuple[int, int], list[slice]] = {}
    for part, columns in tiles:
        seen.setdefault((part.start, part.stop), []).append(columns)
    assert [stop for _, stop in seen] == [*[start for start, _ in seen][1:], *([rows] if rows else [])]
    for parts in seen.values():
        assert [column for part in parts for column in range(part.start, part.stop)] == list(range(vocabulary))


def call(length: int, columns: int, dtype: torch.dtype, batch: int = 1, **options: Any) -> AttentionCall:
    """Six heads of size 4 that share two key heads, and values of size 3."""
    sizes = (6, length, 4), (2, columns, 4), (2, columns, 3)
    return AttentionCall(*(random(batch, *size, seed=i, dtype=dtype) for i, size in enumerate(sizes)), 0.7, **options)


def naive(call: AttentionCall, seen: Tensor) -> Tensor:
    """softmax over what is seen, in fp64; [B, H, L, D]."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = call.scaling * query @ key.transpose(2, 3)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ value


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_over_trees(
    kernels: Kernels, dtype: torch.dtype, error: float, softcap: float | None, window: int | None
) -> None:
    trees = [Tree(0, 5, (3, 0, 4)), Tree(12, 2, (6,))]
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7])
    one = call(20, 20, dtype, softcap=softcap, window=window)
    found = kernels.tree_attention(trees, torch.tensor(column_ends(trees)), positions)(one)
    # who sees whom, token by token: the same tree, and the query or the same response, not ahead, in the window
    branch = [(0, 0)] * 5 + [(0, 1)] * 3 + [(0, 3)] * 4 + [(1, 0)] * 2 + [(1, 1)] * 6
    seen = torch.tensor(
        [
            [
                k <= q
                and branch[k] in ((branch[q][0], 0), branch[q])
                and (window is None or int(positions[q] - positions[k]) < window)
                for k in range(20)
            ]
            for q in range(20)
        ]
    )
    assert found.shape == (1, 20, 6, 3)
    assert float((found.transpose(1, 2) - naive(one, seen)).abs().max()) < error


@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_over_the_cache(kernels: Kernels, dtype: torch.dtype, error: float, softcap: float | None) -> None:
    """Three queries of at most 5 tokens, two slots, 40 steps; then one query leaves."""
    whole = call(2, 85, dtype, batch=3, softcap=softcap)
    cache = kernels.key_cache(whole.key[:1, :, :5], whole.value[:1, :, :5], 3, 5, 2, 85)
    block = cache.block(0)
    block.keys[:, :, :5], block.values[:, :, :5] = whole.key[:, :, :5], whole.value[:, :, :5]
    for column in range(5, 85, 2):
        block = cache.block(column)
        here, there = slice(column - block.start, column - block.start + 2), slice(column, column + 2)
        block.keys[:, :, here], block.values[:, :, here] = whole.key[:, :, there], whole.value[:, :, there]
    seen = random(3, 1, 6, 85, seed=9) > 0
    rows = torch.tensor([2, 0])
    queries = whole.query.reshape(3, 2, 6, 4)  # the heads that share keys are rows of one
    expected = naive(whole.over(queries, whole.key, whole.value), seen)
    for kept in (torch.arange(3), rows):
        cache.select(kept)
        mask = additive(seen[kept], cache.mask_type(dtype))
        assert cache.columns_read(85) == 85
        found = cache.attend(whole, queries[kept], mask)
        assert float((found - expected[kept]).abs().max()) < error
