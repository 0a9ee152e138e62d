"""Attention over trees by FlexAttention, without a GPU: its blocks against the whole mask, its numbers uncompiled.

Uncompiled, ``flex_attention`` looks at the mask function alone and not at the blocks, and has no backward pass on a
CPU. So the blocks have tests of their own; a long test compiles the kernel for the CPU, and gradients need a GPU.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf.models.kernels import reference
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import ask_for_flex, kernels_for, wants_flex
from rrhf.models.kernels.cpu.branch_attention import branch_attention, branches
from rrhf.models.kernels.cuda.flex_attention import (
    BLOCK,
    FlexTrees,
    block_mask,
    compiled,
    padded_length,
    padded_row,
    tree_attention,
)
from rrhf.models.path_check import usable_path
from rrhf.models.shared_prefix import lay_out, tree_logprobs
from rrhf.models.trees import Tree, column_ends, visible
from support.models import tiny_model
from support.trees import RECORDS, VOCABULARY, random_record, silently

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

CPU = torch.device("cpu")


def forest(*shapes: tuple[int, Sequence[int]]) -> list[Tree]:
    """Trees one behind the other: (tokens of the query, tokens of each response)."""
    trees: list[Tree] = []
    for query, responses in shapes:
        start = trees[-1].start + trees[-1].size if trees else 0
        trees.append(Tree(start, query, tuple(responses)))
    return trees


def ragged(seed: int) -> list[Tree]:
    draw = random.Random(seed)
    return forest(
        *[
            (
                draw.randint(1, 400),
                [draw.choice([0, 1, 30, 250]) * draw.randint(0, 2) for _ in range(draw.randint(0, 6))],
            )
            for _ in range(draw.randint(1, 5))
        ]
    )


FORESTS = [
    forest((5, (3, 0, 4)), (2, (6,))),
    forest((128, (128, 128))),
    forest((300, (200, 20, 200)), (1, ()), (40, (0, 0, 90))),
    *[ragged(seed) for seed in range(6)],
]


def places(trees: Sequence[Tree]) -> Tensor:
    """The position of every token, run by run."""
    runs = [torch.arange(tree.query) for tree in trees]
    for i, tree in enumerate(trees):
        runs[i] = torch.cat([runs[i], *[torch.arange(tree.query, tree.query + size) for size in tree.responses]])
    return torch.cat(runs)


def flex(trees: Sequence[Tree], **options: Any) -> FlexTrees:
    ends, positions = torch.tensor(column_ends(trees)), places(trees)
    return FlexTrees(trees, CPU, reference.tree_attention(trees, ends, positions), **options)


# --- the row and its blocks ---------------------------------------------------------------------------------------


def test_rows_are_padded_to_few_lengths() -> None:
    examples = {1: 128, 128: 128, 129: 256, 1024: 1024, 1025: 1280, 2048: 2048, 2049: 2560, 9000: 10240}
    assert {tokens: padded_length(tokens) for tokens in examples} == examples
    lengths = [padded_length(tokens) for tokens in range(1, 16_385)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 24
    assert all(length % BLOCK == 0 for length in set(lengths))
    assert all(tokens <= length <= max(1.25 * tokens + 1, tokens + BLOCK) for tokens, length in enumerate(lengths, 1))


def test_the_padded_row() -> None:
    laid_out = lay_out(RECORDS)
    row = padded_row(laid_out.trees)
    tokens = len(laid_out.ends)
    assert row.ends[:tokens].tolist() == laid_out.ends.tolist()
    assert row.positions[:tokens].tolist() == laid_out.position_ids[0].tolist()
    assert len(row.ends) == len(row.positions) == padded_length(tokens)
    assert row.ends[tokens:].tolist() == list(range(tokens + 1, len(row.ends) + 1))  # read by itself alone


def listed(numbers: Tensor, indices: Tensor) -> Tensor:
    """[n, n], bool: the blocks in a ``BlockMask``'s lists."""
    chosen = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for i, (count, row) in enumerate(zip(numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        assert sorted(set(row[:count])) == row[:count]  # each block once, in order
        chosen[i, row[:count]] = True
    return chosen


def whole(chosen: Tensor) -> Tensor:
    return chosen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


@pytest.mark.parametrize("trees", FORESTS)
@pytest.mark.parametrize("window", [None, 40, 200])
def test_blocks_give_the_mask_of_trees(trees: list[Tree], window: int | None) -> None:
    row = padded_row(trees)
    size = len(row.ends)
    expected = visible(torch.tensor(row.ends), torch.tensor(row.positions), window)
    mask = block_mask(row, window, CPU)
    order = torch.arange(size)
    by_token = mask.mask_mod(0, 0, order[:, None], order[None, :])
    assert torch.equal(by_token, expected)
    partial, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not bool((partial & full).any())
    assert torch.equal(whole(full) | whole(partial) & by_token, expected)
    tiles = expected.view(size // BLOCK, BLOCK, -1, BLOCK).transpose(1, 2)
    assert bool((full <= tiles.all(-1).all(-1)).all())
    if window is None:  # with one a block may be masked though no row reads it, but it is never the other way round
        assert torch.equal(full, tiles.all(-1).all(-1))
        assert torch.equal(partial | full, tiles.any(-1).any(-1))
    # the backward pass goes by columns
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)


def test_blocks_are_skipped_and_taken_whole() -> None:
    """A long row: 8 responses of 512 tokens to a query of 1,024, with and without a window."""
    row = padded_row(forest((1024, [512] * 8)))
    counts = {}
    for window in (None, 256):
        mask = block_mask(row, window, CPU)
        counts[window] = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    # a block on the diagonal for each of the 40; below it 28 of the query, each response's 4 · 8 of it and 6 of its own
    assert counts[None] == (40, 28 + 8 * (32 + 6))
    assert sum(counts[256]) < sum(counts[None]) / 2
    assert counts[256][1] >= 7 + 8 * 3  # the block before, where it lies in the same query or response


def test_the_lists_are_those_that_torch_makes() -> None:
    row = padded_row(FORESTS[2])
    mask = block_mask(row, None, CPU)
    theirs = BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK, mask.mask_mod
    )
    assert theirs.shape == mask.shape
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        mine, other = getattr(mask, name), getattr(theirs, name)
        assert torch.equal(mine, other) and mine.dtype == other.dtype, name


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_no_mask_of_all_tokens_is_made() -> None:
    row = padded_row(forest(*[(500, [200] * 6)] * 9))
    with LargestTensor() as largest:
        block_mask(row, 128, torch.device("meta"))
    assert len(row.ends) == 16_384
    assert 0 < largest.elements <= 4 * (len(row.ends) // BLOCK) ** 2 + 3 * len(row.ends)


# --- its numbers ----------------------------------------------------------------------------------------------------


def call(
    tokens: int, dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int], **options: Any
) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    shapes = (heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])
    tensors = [torch.randn(1, h, tokens, d, generator=generator).to(dtype) for h, d in shapes]
    return AttentionCall(*tensors, 0.3, **options)


def naive(one: AttentionCall, seen: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64: the result [1, T, H, E] and log Σ e^score [1, T, H]."""
    query, key, value = (x.double() for x in (one.query, one.key, one.value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = one.scaling * query @ key.transpose(2, 3)
    if one.softcap is not None:
        scores = one.softcap * torch.tanh(scores / one.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), scores.logsumexp(dim=-1).transpose(1, 2)


SMALL, LARGE = FORESTS[0], forest((100, (60, 20, 60)), (1, ()), (40, (0, 0, 30)))
HEADS = {"plain": ((4, 4), (8, 8)), "grouped": ((6, 2), (8, 8)), "MLA": ((4, 4), (24, 16))}  # values of another size


@pytest.mark.parametrize(  # every two of the four meet; uncompiled, each takes a while
    ("heads", "trees", "window", "softcap"),
    [
        ("plain", LARGE, None, None), ("plain", LARGE, 30, 2.0), ("plain", SMALL, None, 2.0),
        ("plain", SMALL, 30, None),
        ("grouped", LARGE, None, 2.0), ("grouped", LARGE, 30, None), ("grouped", SMALL, None, None),
        ("MLA", LARGE, None, None), ("MLA", LARGE, 30, 2.0), ("MLA", SMALL, None, 2.0), ("MLA", SMALL, 30, None),
    ],
    ids=lambda value: None if not isinstance(value, list) else f"{sum(tree.size for tree in value)} tokens",
)  # fmt: skip
def test_it_equals_naive_attention(heads: str, trees: list[Tree], window: int | None, softcap: float | None) -> None:
    heads_of, sizes = HEADS[heads]
    ends = torch.tensor(column_ends(trees))
    one = call(len(ends), torch.float32, heads_of, sizes, window=window, softcap=softcap)
    output, lse = naive(one, visible(ends, places(trees), window))
    attention = flex(trees)
    found, partition = attention.with_lse(one)
    assert found.shape == (1, len(ends), heads_of[0], sizes[1])
    assert float((found - output).abs().max()) < 1e-5
    assert float((partition - lse).abs().max()) < 1e-5
    assert torch.equal(attention(one), found)
    half = call(len(ends), torch.bfloat16, heads_of, sizes, window=window, softcap=softcap)
    assert float((attention(half) - output).abs().max()) < 0.05
    if window is None and softcap is None:
        branched = branch_attention(one.query, one.key, one.value, one.scaling, branches(trees))
        assert float((found - branched).abs().max()) < 1e-5


def test_layers_share_masks_and_a_window_that_nothing_outgrows_is_none() -> None:
    trees = forest((20, (9, 30)))
    attention = flex(trees)
    assert attention.mask(8) is attention.mask(8)
    assert attention.mask(50) is attention.mask(None) is attention.mask(400)  # 50 positions
    assert attention.mask(49) is not attention.mask(None)


def test_dropout_takes_masked_calls() -> None:
    trees = FORESTS[0]
    one = call(20, torch.float32, (4, 2), (8, 8), dropout=0.5)
    torch.manual_seed(3)
    expected = reference.tree_attention(trees, torch.tensor(column_ends(trees)), places(trees))(one)
    torch.manual_seed(3)
    assert torch.equal(flex(trees)(one), expected)
    with pytest.raises(NotImplementedError, match="dropout"):
        flex(trees).with_lse(one)


def test_a_new_length_is_compiled_only_beyond_the_padding() -> None:
    """Once for all rows of 129 to 256 tokens, whatever their trees; once more for each window and cap of layers."""
    counter = CompileCounter()
    function = compiled(counter)

    def run(trees: list[Tree], **options: Any) -> int:
        tokens = sum(tree.size for tree in trees)
        one = call(tokens, torch.float32, (4, 2), (16, 16), **options)
        found = flex(trees, attention=function)(one)
        assert float((found - flex(trees)(one)).abs().max()) < 1e-5
        return counter.frame_count

    assert run(forest((100, (30,)))) == 1
    assert run(forest((100, (30, 40)), (7, (1, 2)))) == 1
    assert run(forest((256, ()))) == 1
    assert run(forest((100, (100, 30))), window=16) == 2
    assert run(forest((90, (100, 60))), window=16) == 2
    assert run(forest((90, (100, 60))), window=24) == 3
    assert run(forest((90, (100, 60))), softcap=2.0) == 4
    assert run(forest((100, (100, 60)))) == 5  # 260 tokens


# --- in a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gemma3"])
def test_a_model_that_asks_for_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = tiny_model(family), tiny_model(family)
    ask_for_flex(asked)
    assert wants_flex(asked) and not wants_flex(plain)
    calls = []
    original = FlexTrees._attend
    monkeypatch.setattr(FlexTrees, "_attend", lambda *a, **k: calls.append(a) or original(*a, **k))
    with torch.no_grad():
        expected = tree_logprobs(plain, RECORDS).sums
        assert not calls
        found = tree_logprobs(asked, RECORDS).sums
    assert len(calls) == 2  # layers
    assert float((found - expected).abs().max()) < 1e-4


def test_the_check_at_start_up_takes_masked_calls_where_it_does_not_run() -> None:
    """On a CPU it has no backward pass."""
    model = tiny_model("llama")
    ask_for_flex(model)
    with pytest.warns(UserWarning, match="flex is not taken .NotImplementedError: FlexAttention does not"):
        assert usable_path(model) == "tree"
    assert not wants_flex(model)
    assert silently(model, longest_row=0) == "tree"


class Wrong(torch.autograd.Function):
    """Its values are right or twice what they should be, and so are its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float, gradient: float) -> Tensor:
        ctx.factor = gradient
        return x * value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] * ctx.factor, None, None


@pytest.mark.parametrize(
    ("value", "gradient", "fault"),
    [
        (1.0, 1.0, None),
        (2.0, 2.0, "its log-probabilities differ by"),
        (1.0, 2.0, "its gradients differ by"),
        (1.0, math.nan, "its gradients differ by nan"),
    ],
)
def test_the_check_at_start_up_compares_values_and_gradients(
    value: float, gradient: float, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked calls with an error put in stand in for a kernel that a CPU cannot run."""
    monkeypatch.setattr(FlexTrees, "__call__", lambda self, one: Wrong.apply(self.masked(one), value, gradient))
    model = tiny_model("llama")
    ask_for_flex(model)
    if fault is None:
        assert silently(model, longest_row=0) == "tree"
        assert wants_flex(model)
        return
    with pytest.warns(UserWarning, match=f"flex is not taken .{fault}"):
        assert usable_path(model) == "tree"
    assert not wants_flex(model)
    assert all(p.grad is None for p in model.parameters())


def test_gpus_take_masked_calls_unless_asked() -> None:
    assert kernels_for(torch.device("cuda")) is reference
    assert kernels_for(torch.device("cuda"), flex=True).tree_attention is tree_attention


@pytest.mark.skipif(not os.environ.get("RRHF_LONG"), reason="compiles C++ for a minute: RRHF_LONG=1")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (30, None), (30, 2.0)])
def test_compiled_for_the_cpu(window: int | None, softcap: float | None) -> None:
    """The compiled kernel skips blocks and takes them whole as the lists say."""
    trees = FORESTS[2]
    one = call(sum(tree.size for tree in trees), torch.float32, (6, 2), (16, 24), window=window, softcap=softcap)
    output, _ = naive(one, visible(torch.tensor(column_ends(trees)), places(trees), window))
    found = flex(trees, attention=compiled())(one)  # its log-sum-exp is not to be had on a CPU
    assert float((found - output).abs().max()) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass without a CUDA GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_its_gradients_on_a_gpu(dtype: torch.dtype, bound: float, window: int | None, softcap: float | None) -> None:
    """Against naive attention in fp64; the bound is on the error of a whole gradient relative to its norm."""
    trees = FORESTS[2]
    seen = visible(torch.tensor(column_ends(trees)), places(trees), window)
    one = call(len(seen), dtype, (6, 2), (64, 64), window=window, softcap=softcap)
    exact = [x.double().requires_grad_() for x in (one.query, one.key, one.value)]
    output, lse = naive(one.over(*exact), seen)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((output * weights).sum() + lse.sum(), exact)
    device = torch.device("cuda")
    leaves = [x.detach().to(device).requires_grad_() for x in (one.query, one.key, one.value)]
    ends = torch.tensor(column_ends(trees), device=device)
    found, partition = tree_attention(trees, ends, places(trees).to(device)).with_lse(one.over(*leaves))
    gradients = torch.autograd.grad((found * weights.to(device)).sum() + partition.sum(), leaves)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert float((mine.cpu().double() - theirs).norm()) <= bound * float(theirs.norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass without a CUDA GPU")
def test_a_models_gradients_on_a_gpu() -> None:
    """The tree by FlexAttention against the tree by masked calls, whole: sums and gradients of every parameter."""
    results = []
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    for asks in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to("cuda")
        if asks:
            ask_for_flex(model)
        sums = tree_logprobs(model, [*RECORDS, random_record((200, (90, 40)), 7)]).sums
        sums.mean().backward()
        results.append((sums.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (sums, gradient), (flex_sums, flex_gradient) = results
    assert float((flex_sums - sums).abs().max()) < 1e-2
    assert float((flex_gradient - gradient).norm()) <= 1e-2 * float(gradient.norm())
