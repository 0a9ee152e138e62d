"""log P(token), a block of the vocabulary at a time, against the whole log-softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rrhf.models.logprobs
from rrhf.models.forward import causal_lm
from rrhf.models.kernels.cpu import logits as cpu_logits
from rrhf.models.kernels.cpu import products
from rrhf.models.logprobs import output_logits, token_logprobs
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.shared_prefix import tree_logprobs
from support.models import tiny_model
from support.trees import RECORDS, VOCABULARY, random_record, silently

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_blocks_of_log_softmax_in_fp64(
    keep: bool, with_bias: bool, softcap: float | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_logits, "LOGIT_ROWS", 3)  # 7 rows: two whole chunks and a rest
    monkeypatch.setattr(cpu_logits, "LOGIT_ELEMENTS", 12)  # 11 columns: two whole blocks and a rest
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = leaf(7, 4), leaf(11, 4), leaf(11) if with_bias else None
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 10])
    inputs = [hidden, weight, *([bias] if bias is not None else [])]

    def ours(*leaves: Tensor) -> Tensor:
        rest = leaves[2] if with_bias else None
        return rrhf.models.logprobs._TokenLogprobs.apply(leaves[0], leaves[1], rest, targets, scale, softcap, keep)

    def plain(*leaves: Tensor) -> Tensor:
        logits = leaves[0] @ leaves[1].t() + (leaves[2] if with_bias else 0)
        logits = logits * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, dim=-1)[torch.arange(7), targets]

    assert torch.allclose(ours(*inputs), plain(*inputs), atol=1e-12, rtol=0)
    weights = torch.randn(7, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((ours(*inputs) * weights).sum(), inputs)
    theirs = torch.autograd.grad((plain(*inputs) * weights).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(ours, inputs)


def test_logprobs_are_fp32_whatever_the_weights_are() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    assert silently(model, longest_row=40) == "tree"
    found = tree_logprobs(model, RECORDS)
    assert found.sums.dtype == torch.float32
    whole = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tree_logprobs(whole, RECORDS)
    assert mixed.sums.dtype == torch.float32
    exact = tree_logprobs(whole, RECORDS).sums
    lengths = found.lengths.clamp(min=1)
    assert float(((mixed.sums - exact) / lengths).abs().max()) < 5e-2


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in _tensors(result):
            self.largest = max(self.largest, value.numel())
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def largest_tensor(compute: Any) -> int:
    with LargestTensor() as mode:
        compute().backward()
    return mode.largest


@pytest.mark.parametrize("adapter", [False, True])
def test_the_logits_of_all_tokens_never_exist_together(adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 150_000
    monkeypatch.setattr(cpu_logits, "LOGIT_ELEMENTS", elements)
    vocabulary, record = 6000, random_record((40, (100, 90, 80, 70, 60)), vocabulary=6000)
    model = tiny_model("llama", vocabulary)
    if adapter:  # an output layer that is no plain linear map takes the other way
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        assert type(causal_lm(model).get_output_embeddings()) is not torch.nn.Linear
    naive = padded_logprobs(causal_lm(model), [record]).sums
    found = tree_logprobs(model, [record]).sums
    assert torch.allclose(found, naive, atol=2e-3)
    whole = 400 * vocabulary
    largest = largest_tensor(lambda: tree_logprobs(model, [record]).sums.sum())
    assert largest == 4 * elements if adapter else largest <= 32 * vocabulary  # else the largest is a weight
    # the same recorder sees the whole table where there is one, in both directions
    hidden = torch.randn(400, 32, requires_grad=True)
    weight = causal_lm(model).get_input_embeddings().weight
    assert largest_tensor(lambda: torch.log_softmax(hidden @ weight.t(), dim=-1).sum()) == whole
    assert largest < whole / 3


def test_token_logprobs_pass_a_gradient_to_frozen_and_trained_heads() -> None:
    model = tiny_model("llama")
    hidden = torch.randn(300, 32, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (300,))
    model.lm_head.weight.requires_grad_(False)
    frozen = torch.autograd.grad(token_logprobs(model, hidden, targets).sum(), hidden)[0]
    naive = torch.log_softmax(model.lm_head(hidden), dim=-1)[torch.arange(300), targets].sum()
    assert torch.allclose(frozen, torch.autograd.grad(naive, hidden)[0], atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_second_backward_pass_gives_the_same(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rrhf.models.logprobs, "KEPT_BYTES", kept)
    model = tiny_model("llama")
    hidden = torch.randn(30, 32, requires_grad=True)
    found = token_logprobs(model, hidden, torch.arange(30), keep_logits=True).sum()
    first = torch.autograd.grad(found, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(found, hidden)[0])
    assert float(first.norm()) > 0


def test_no_rows_have_a_gradient_of_zero() -> None:
    model = tiny_model("llama")
    hidden = torch.randn(0, 32, requires_grad=True)
    token_logprobs(model, hidden, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_of_bfloat16_products_are_not_rounded_to_bfloat16(rows: int, packed: bool, with_bias: bool) -> None:
    """Against products in fp64 of the same weights and states, at the size of real logits."""
    if not cpu_logits._rest_is_exact():
        pytest.skip("products of bfloat16 are rounded more than once here")
    if packed and not products._bfloat16_works():
        pytest.skip("bfloat16 weights are not laid out here")
    vocabulary, count = 4096, 50
    model = tiny_model("llama", vocabulary).bfloat16()
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, vocabulary, bias=with_bias, dtype=torch.bfloat16)
    model.set_output_embeddings(head)
    with torch.no_grad():
        head.weight.normal_(0.0, 1.0, generator=generator)
    hidden = torch.randn(rows, 32, generator=generator).bfloat16()
    context = products.packed(head, 32) if packed else contextlib.nullcontext()
    with torch.inference_mode(), context:
        assert products.is_packed(head.weight) == packed
        logits, rounded = output_logits(model, hidden), head(hidden)
        exact = hidden.double() @ head.weight.double().t() + (head.bias.double() if with_bias else 0.0)
    assert logits.dtype == torch.float32

    def variation(other: Tensor) -> float:
        """The largest total variation between what is drawn from and what should be."""
        difference = torch.softmax(other.double(), dim=-1) - torch.softmax(exact, dim=-1)
        return float(difference.abs().sum(dim=-1).max() / 2)

    def tied(other: Tensor) -> int:
        """Rows with equal logits on both sides of the cut at ``count``."""
        best = torch.topk(other, count + 1).values
        return int((best[:, -1] == best[:, -2]).sum())

    assert variation(logits) < 1e-4 < 4e-3 < variation(rounded)
    assert tied(logits) <= rows * 0.05
    assert rows == 1 or tied(rounded) > rows * 0.3
    with torch.no_grad():  # with the factor and the cap of other families
        model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 10.0
    with torch.inference_mode():
        torch.testing.assert_close(
            output_logits(model, hidden).double(), 10 * torch.tanh(exact / 20), atol=1e-3, rtol=1e-4
        )
