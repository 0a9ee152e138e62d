"""The tree pass against the padded pass and against one forward a response, on many families of models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.logprobs import all_sums
from rrhf.common.errors import UserError
from rrhf.models.kernels import reference
from rrhf.models.kernels.choice import KERNELS
from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.passes import response_logprobs
from rrhf.models.shared_prefix import lay_out, tree_logprobs
from rrhf.models.tokenization import EncodedRecord, TextFormat
from rrhf.models.trees import Tree, column_ends, visible
from support import families
from support.models import tiny_model
from support.trees import RECORDS, path_and_reason, random_record, silently

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "mistral", "gemma2", "gemma3", "mixtral"]
WINDOWED = ["mistral", "gemma2", "gemma3"]  # window 8


# Queries and rows below and above the window of 8; empty and one-token responses; k = 1; two equal responses' lengths.


def weighted(sums: Tensor, lengths: Tensor) -> Tensor:
    """A scalar that depends on every p_i, with a weight of its own for each."""
    weights = torch.linspace(-1, 2, len(sums), dtype=sums.dtype)
    return (weights * sums / lengths.clamp(min=1)).sum()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found)}


def assert_same_gradients(ours: dict[str, Tensor], naive: dict[str, Tensor], relative: float = 1e-3) -> None:
    whole = math.sqrt(sum(float(g.norm()) ** 2 for g in naive.values()))
    assert whole > 0
    for name, gradient in naive.items():
        # a parameter that does not act (a bias before a softmax, an expert nobody took) has rounding for a gradient
        allowed = relative * float(gradient.norm()) + 1e-6 * whole
        assert float((ours[name] - gradient).norm()) <= allowed, name


def assert_tree_padded_naive(model: Any, records: Sequence[EncodedRecord]) -> None:
    lengths = torch.tensor([len(response) for record in records for response in record.responses])
    naive = all_sums(model, records)
    naive_gradients = gradients(model, weighted(naive, lengths))
    for path in ("tree", "padded"):
        found = response_logprobs(model, records, path)
        assert found.lengths.tolist() == lengths.tolist()
        assert found.sums.dtype == torch.float32
        p, naive_p = found.sums / lengths.clamp(min=1), naive / lengths.clamp(min=1)
        assert (p - naive_p).abs().max().item() <= 1e-4, path
        assert_same_gradients(gradients(model, weighted(found.sums, lengths)), naive_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_padded_and_one_forward_a_response(family: str) -> None:
    model = tiny_model(family)
    assert silently(model, longest_row=49) == "tree"
    assert_tree_padded_naive(model, RECORDS)


def test_tree_equals_padded_and_one_forward_a_response_on_smollm2(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    format = TextFormat(tokenizer)
    chat = [{"role": "user", "content": "Name two fruits."}]
    texts = {
        "The film opens slowly, but": [" it grows on you.", " nothing ever happens.", " then"],
    }
    records = [
        EncodedRecord(
            "film",
            format.encode_query(query),
            [format.encode_response(query, response, "length") for response in responses],
            [None] * len(responses),
        )
        for query, responses in texts.items()
    ]
    answers = [format.encode_response(chat, answer, "stop") for answer in ("Apples.", "No.")]
    records.append(EncodedRecord("chat", format.encode_query(chat), answers, [None] * 2))
    assert silently(model, longest_row=60) == "tree"
    with torch.no_grad():
        naive = all_sums(model, records)
        for path in ("tree", "padded"):
            found = response_logprobs(model, records, path)
            assert float(((found.sums - naive) / found.lengths).abs().max()) <= 1e-4, path
    film = dataclasses.replace(records[0], responses=records[0].responses[:2], scores=[None] * 2)
    assert_tree_padded_naive(model, [film])  # gradients of 135 M parameters take their time


def test_bloom_falls_back_with_a_warning_to_the_same_numbers() -> None:
    model = tiny_model("bloom")
    path, reason = path_and_reason(model, longest_row=30)
    assert path == "padded"
    assert "BloomForCausalLM does not take the shared-prefix tree" in reason
    naive = all_sums(model, RECORDS)
    found = response_logprobs(model, RECORDS, path)
    assert float(((found.sums - naive) / found.lengths.clamp(min=1)).abs().max()) <= 1e-4


# --- the layout -------------------------------------------------------------------------------------------------


def test_forest_by_hand() -> None:
    # one record: query 10 11, responses 20 21 22 | 30 | (empty) | 40 41; the last token of each is no input
    record = EncodedRecord("r", [10, 11], [[20, 21, 22], [30], [], [40, 41]], [None] * 4)
    forest = lay_out([record, EncodedRecord("s", [50], [[60, 61]], [None])])
    assert forest.input_ids.tolist() == [[10, 11, 20, 21, 40, 50, 60]]
    assert forest.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    # row 1 (the query's last) predicts 20, 30 and 40; row 5 predicts 60
    assert forest.targets.tolist() == [20, 21, 22, 30, 40, 41, 60, 61]
    assert forest.rows.tolist() == [1, 2, 3, 1, 1, 4, 5, 6]
    assert forest.owners.tolist() == [0, 0, 0, 1, 3, 3, 4, 4]
    assert forest.lengths.tolist() == [3, 1, 0, 2, 2]
    assert forest.ends.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert forest.trees == (Tree(0, 2, (2, 0, 0, 1)), Tree(5, 1, (1,)))


def test_tree_mask_by_hand() -> None:
    tree = Tree(0, 2, (2, 1))
    ends, positions = torch.tensor(column_ends([tree])), torch.tensor([0, 1, 2, 3, 2])
    assert ends.tolist() == [5, 5, 4, 4, 5]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert visible(ends, positions).int().tolist() == expected
    # window 2: the token itself and the one before it in its own line of positions
    narrow = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert visible(ends, positions, window=2).int().tolist() == narrow


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_response_does_not_see_its_neighbours(family: str) -> None:
    """The number of a response is the same whoever stands beside it, in its record and in the row."""
    model = tiny_model(family)
    alone = torch.cat(
        [
            tree_logprobs(model, [dataclasses.replace(record, responses=[response], scores=[None])]).sums
            for record in RECORDS
            for response in record.responses
        ]
    )
    together = tree_logprobs(model, RECORDS).sums
    reversed_sums = tree_logprobs(model, RECORDS[::-1]).sums
    assert torch.allclose(alone, together, atol=1e-4)
    sizes = [len(record.responses) for record in RECORDS]
    back = torch.cat(reversed_sums.split(sizes[::-1])[::-1])
    assert torch.allclose(alone, back, atol=1e-4)


def test_empty_responses_are_zero() -> None:
    model = tiny_model("llama")
    record = random_record((4, (0, 3, 0)))
    for path in ("tree", "padded"):
        found = response_logprobs(model, [record], path)
        assert found.lengths.tolist() == [0, 3, 0]
        assert found.sums[[0, 2]].tolist() == [0, 0]
    nothing = response_logprobs(model, [random_record((4, (0, 0)))], "tree")
    nothing.sums.sum().backward()
    assert nothing.sums.tolist() == [0, 0]


def test_the_query_is_computed_once() -> None:
    record = random_record((50, (5, 5, 5, 5)))
    model = tiny_model("llama")
    assert tree_logprobs(model, [record]).tokens == 50 + 4 * 4
    assert padded_logprobs(model, [record]).tokens == 4 * 55


def test_a_model_goes_on_as_before_after_a_tree_pass() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    ids = torch.tensor([RECORDS[0].query])
    logits = model(input_ids=ids).logits
    tree_logprobs(model, RECORDS)
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_one_call_a_tree_gives_what_branches_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, run on the CPU."""
    model = tiny_model(family)
    by_branches = tree_logprobs(model, RECORDS)
    mine = gradients(model, weighted(by_branches.sums, by_branches.lengths))
    calls = dense_attention(monkeypatch)
    dense = tree_logprobs(model, RECORDS)
    assert len(calls) == len(RECORDS) * 2  # layers
    assert torch.allclose(dense.sums, by_branches.sums, atol=2e-5)
    assert_same_gradients(mine, gradients(model, weighted(dense.sums, dense.lengths)))


def dense_attention(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make the CPU attend as a GPU does, by one masked call a tree; the list grows by an entry a call."""
    calls: list[Any] = []
    plain = reference.masked_attention

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(reference, "masked_attention", counted)
    monkeypatch.delitem(KERNELS, "cpu")
    return calls


def test_bfloat16_weights_take_the_tree() -> None:
    """Its own attention and a check in fp32 on a copy: rounding alone must not look like a wrong layout."""
    model = tiny_model("llama").to(torch.bfloat16)
    assert silently(model, longest_row=0) == "tree"
    exact = tree_logprobs(tiny_model("llama"), RECORDS)
    low = tree_logprobs(model, RECORDS)
    assert float(((low.sums - exact.sums) / exact.lengths.clamp(min=1)).abs().max()) < 0.02


# --- the check at start-up --------------------------------------------------------------------------------------


def ignore_window(ends: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    return visible(ends, positions)


def branches_see_each_other(ends: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    return torch.ones(len(ends), len(ends), dtype=torch.bool).tril()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_broken_layout_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "visible", branches_see_each_other)
    dense_attention(monkeypatch)
    path, reason = path_and_reason(tiny_model(family))
    assert path == "padded"
    assert "tree log-probabilities differ by" in reason


@pytest.mark.parametrize("family", WINDOWED)
def test_a_forgotten_window_is_noticed_where_rows_outgrow_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask without the window is wrong on long rows alone, so that the check must be as long as the data."""
    monkeypatch.setattr(reference, "visible", ignore_window)
    model = tiny_model(family)
    long = [random_record((13, (11, 4)), 1)]
    assert float((tree_logprobs(model, long).sums - all_sums(model, long)).abs().max()) > 1e-2
    path, reason = path_and_reason(model, longest_row=26)
    assert path == "padded"
    assert "does not take the shared-prefix tree" in reason


@pytest.mark.parametrize("family", ["mistral"])
def test_rows_within_the_window_are_right_whatever_the_window(family: str) -> None:
    model, wide = tiny_model(family), tiny_model(family)
    wide.config.sliding_window = None
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    short = [random_record((3, (4, 5, 2)), 5)]
    assert torch.equal(tree_logprobs(model, short).sums, tree_logprobs(wide, short).sums)
    long = [random_record((13, (11, 4)), 1)]
    assert not torch.allclose(tree_logprobs(model, long).sums, tree_logprobs(wide, long).sums, atol=1e-3)
    assert silently(model, longest_row=0) == "tree"


def test_the_check_leaves_mode_and_random_state() -> None:
    model = tiny_model("gpt2").train()
    state = torch.get_rng_state()
    assert silently(model, longest_row=40) == "tree"
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_raises_falls_back_and_keeps_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()

    def refuse(*args: Any) -> Tensor:
        raise NotImplementedError("attention option s_aux")

    monkeypatch.setattr(cpu, "branch_attention", refuse)
    path, reason = path_and_reason(model)
    assert path == "padded"
    assert "NotImplementedError: attention option s_aux" in reason
    assert model.training


# --- a mixture of experts ---------------------------------------------------------------------------------------


def test_the_router_loss_is_included() -> None:
    model = tiny_model("mixtral")
    record = random_record((5, (6,)))
    found = tree_logprobs(model, [record])
    row = torch.tensor([[*record.query, *record.responses[0][:-1]]])
    expected = 0.02 * model(input_ids=row, output_router_logits=True).aux_loss
    assert found.router_loss is not None
    assert float(found.router_loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.router_loss) > 0
    router = model.model.layers[0].mlp.gate.weight
    assert float(torch.autograd.grad(found.router_loss, router)[0].norm()) > 0
    padded = padded_logprobs(model, RECORDS).router_loss
    assert padded is not None
    assert float(padded) > 0
    assert tree_logprobs(tiny_model("llama"), [record]).router_loss is None


def test_the_router_loss_under_another_name() -> None:
    model, record = families.FAMILIES["jetmoe"].make(), random_record((5, (6,)))
    row = torch.tensor([[*record.query, *record.responses[0][:-1]]])
    expected = 0.02 * model(input_ids=row, output_router_logits=True).aux_loss
    for found in (tree_logprobs(model, [record]), padded_logprobs(model, [record])):
        assert found.router_loss is not None and float(found.router_loss) > 0
    assert float(tree_logprobs(model, [record]).router_loss or 0) == pytest.approx(float(expected), rel=1e-5)


def test_a_router_loss_that_the_family_does_not_have() -> None:
    model, record = families.FAMILIES["afmoe"].make(output_router_logits=True), random_record((5, (6,)))
    for logprobs in (tree_logprobs, padded_logprobs):
        with pytest.raises(UserError, match=r"AfmoeForCausalLM asks for a router loss .* set output_router_logits to"):
            logprobs(model, [record])
