"""Attention by branches against one masked softmax over the whole tree."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import rrhf.models.kernels.cpu.branch_attention
from rrhf.models.kernels.cpu.branch_attention import branch_attention, branches
from rrhf.models.trees import Tree, column_ends, visible

# (query, responses' input lengths); ragged, empty, of like and unlike length, a query of one token
FORESTS = [
    [(5, (3, 4, 1))],
    [(1, (0, 6)), (7, (2,)), (3, ())],
    [(4, (0, 0)), (2, (9, 9, 8, 7, 6, 1, 1))],
]


def laid_out(shapes: Sequence[tuple[int, Sequence[int]]]) -> list[Tree]:
    trees: list[Tree] = []
    for query, responses in shapes:
        trees.append(Tree(trees[-1].start + trees[-1].size if trees else 0, query, tuple(responses)))
    return trees


def naive(query: Tensor, key: Tensor, value: Tensor, scaling: float, trees: Sequence[Tree]):
    """softmax over the visible columns of the whole row, [1, T, H, D]."""
    tokens = query.shape[2]
    seen = visible(torch.tensor(column_ends(trees)), torch.arange(tokens))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (scaling * query @ key.transpose(2, 3)).masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


def leaves(trees: Sequence[Tree], heads: int, kv_heads: int) -> list[Tensor]:
    tokens = sum(tree.size for tree in trees)
    generator = torch.Generator().manual_seed(0)

    def leaf(count: int, size: int) -> Tensor:  # as a model hands them over: a transposed view
        rows = torch.randn(1, tokens, count, size, generator=generator, dtype=torch.float64)
        return rows.transpose(1, 2).requires_grad_()

    return [leaf(heads, 4), leaf(kv_heads, 4), leaf(kv_heads, 3)]


@pytest.mark.parametrize("shapes", FORESTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_branches_are_one_masked_softmax(shapes: list[tuple[int, tuple[int, ...]]], heads: int, kv_heads: int) -> None:
    trees = laid_out(shapes)
    inputs = leaves(trees, heads, kv_heads)
    ours, theirs = branch_attention(*inputs, 0.7, branches(trees)), naive(*inputs, 0.7, trees)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)
    outer = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, plain = (torch.autograd.grad(found, inputs, outer) for found in (ours, theirs))
    for a, b in zip(mine, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_low_precision_is_rounding_away() -> None:
    trees = laid_out(FORESTS[2])
    inputs = leaves(trees, 6, 2)
    exact = naive(*inputs, 0.5, trees)
    low = branch_attention(*[x.detach().bfloat16() for x in inputs], 0.5, branches(trees))
    assert low.dtype == torch.bfloat16
    assert float((low - exact).abs().max()) < 0.05


def test_scores_far_above_the_first_tokens_do_not_overflow() -> None:
    trees = laid_out(FORESTS[2])
    query, key, value = (x.detach().float() for x in leaves(trees, 6, 2))
    key[:, :, [tree.start for tree in trees]] = -200.0  # sinks that most rows dislike
    query = query.abs() + 1.0
    inputs = [x.requires_grad_() for x in (query, key, value)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = branch_attention(*inputs, 0.7, branches(trees)), naive(*exact, 0.7, trees)
    assert torch.allclose(ours.double(), theirs, atol=1e-5)
    outer = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    mine, plain = torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, exact, outer.double())
    for a, b in zip(mine, plain, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-3)
    # the sums would overflow: relative to the first token's score the others' weights are no fp32 numbers
    gaps = 0.7 * (exact[0][0, 0, -1] @ (exact[1][0, 0] - exact[1][0, 0, trees[-1].start]).t())
    assert float(gaps.max()) > 128


def test_rows_that_would_overflow_change_no_other_rows() -> None:
    trees = laid_out(FORESTS[2])
    query, key, value = (x.detach().float() for x in leaves(trees, 6, 2))
    before = branch_attention(query, key, value, 0.7, branches(trees))
    last = trees[-1].start + trees[-1].query + sum(trees[-1].responses[:-1])  # of the last response the first token
    key[:, :, last], query[:, :, last] = 20.0, 20.0
    after = branch_attention(query, key, value, 0.7, branches(trees))
    scores = 0.7 * (query[0, 0, last] @ (key[0, 0, last] - key[0, 0, trees[-1].start]))
    assert float(scores) > 128  # 2 to that power is no fp32 number
    changed = (before != after).flatten(2).any(dim=2)[0].nonzero()[:, 0].tolist()
    assert changed == list(range(last, last + trees[-1].responses[-1]))


def grid_sizes(shapes: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, int]]:
    """Responses and columns of every group."""
    found = branches(laid_out(shapes))
    return [(group.count, len(group.grid) // group.count) for group in found.groups]


def test_responses_of_like_length_share_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(3, (10, 9, 2)), (2, (8, 0, 7))]
    assert grid_sizes(shapes) == [(5, 10)]  # small ones may as well be padded
    monkeypatch.setattr(rrhf.models.kernels.cpu.branch_attention, "SPARE_CELLS", 60)
    assert grid_sizes(shapes) == [(3, 10), (2, 7)]  # 9 and 8 in ten columns leave 19 + 36 cells, 7 another 51
    monkeypatch.setattr(rrhf.models.kernels.cpu.branch_attention, "SPARE_CELLS", 0)
    assert grid_sizes(shapes) == [(1, 10), (1, 9), (1, 8), (1, 7), (1, 2)]
    assert [(rows.start, rows.stop, rows.query) for rows in branches(laid_out(shapes)).records] == [
        (0, 24, 3),
        (24, 41, 2),
    ]


@pytest.mark.parametrize("spare", [0, 60, 1 << 14])
def test_every_token_finds_its_cell(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rrhf.models.kernels.cpu.branch_attention, "SPARE_CELLS", spare)
    trees = laid_out([(3, (10, 9, 2)), (2, (8, 0, 7))])
    found = branches(trees)
    grid = torch.cat([group.grid for group in found.groups])
    queries = [*range(3), 24, 25]
    responses = [token for token in range(41) if token not in queries]
    assert grid[found.cells[responses]].tolist() == responses
    assert found.cells[queries].tolist() == [len(grid)] * 5
    # the keys' order: queries' tokens, then all cells
    assert torch.cat([torch.tensor(queries), grid])[found.keys].tolist() == list(range(41))
    padding = torch.cat([group.padding for group in found.groups])
    assert len(grid) - len(padding) == len(responses)
