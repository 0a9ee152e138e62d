"""Classifiers whose last layer is computed for one token, against transformers' own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rrhf.models.first_token import _last_layer, first_token_alone

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "intermediate_size": 64, "initializer_range": 0.4, "num_labels": 3}  # fmt: skip


def classifier(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


@torch.no_grad()
def logits(model: Any, padded: int) -> torch.Tensor:
    ids = torch.arange(5, 5 + 2 * 9).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 9 - padded :] = 0
    return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Electra", "Camembert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_whole_layer(family: str, attention: str) -> None:
    model = classifier(family, attn_implementation=attention)
    for padded in (0, 4):
        expected = logits(model, padded)
        widths: list[int] = []
        hook = _last_layer(model).output.register_forward_hook(lambda *args, to=widths: to.append(args[2].shape[1]))
        with torch.no_grad(), first_token_alone(model):
            torch.testing.assert_close(logits(model, padded), expected, atol=1e-5, rtol=1e-5)
        hook.remove()
        assert widths == [1]
        assert torch.equal(logits(model, padded), expected)  # and it has its own forward pass again


def test_gradients_and_dropout_take_the_whole_layer() -> None:
    model = classifier("Bert")
    with torch.enable_grad(), first_token_alone(model):
        assert "forward" not in vars(model.bert.encoder.layer[-1])
    model.train()
    with torch.no_grad(), first_token_alone(model):
        assert "forward" not in vars(model.bert.encoder.layer[-1])


def test_a_head_that_reads_other_tokens_is_found_out() -> None:
    class Mean(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states.mean(dim=1)

    model = classifier("Bert")
    assert _last_layer(model) is model.bert.encoder.layer[-1]
    other = classifier("Bert")
    other.bert.pooler = Mean()
    expected = logits(other, 2)
    with torch.no_grad(), first_token_alone(other):
        assert torch.equal(logits(other, 2), expected)
    assert _last_layer(other) is None


def test_a_layer_that_computes_otherwise_is_found_out() -> None:
    model = classifier("Bert")
    layer = model.bert.encoder.layer[-1]
    layer.attention.self.scaling *= 1.5  # read by both ways: no difference
    assert _last_layer(model) is layer

    class Other(type(layer)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    model = classifier("Bert")
    model.bert.encoder.layer[-1].__class__ = Other
    assert _last_layer(model) is None
    assert _last_layer(classifier("DistilBert", dim=32, n_layers=1, n_heads=4, hidden_dim=64)) is None
