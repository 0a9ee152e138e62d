"""Every family of docs/families.md: its path, and its numbers against one response at a time through the model.

Rows outgrow windows, chunks, chosen keys and Llama 4's scale, all of which the tiny models have at 8 tokens or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.logprobs import all_sums
from rrhf.models.attention import attention, our_attention
from rrhf.models.kernels import reference
from rrhf.models.kernels.cpu import device as cpu
from rrhf.models.kernels.cuda import flex_attention
from rrhf.models.passes import response_logprobs
from rrhf.sampling import decoding
from rrhf.sampling.batch_size import queries_at_once, query_bytes
from rrhf.sampling.policies import Draws
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.shared_cache import SharedCache
from support.families import FAMILIES, QUERIES, draw, table
from support.trees import path_and_reason, random_record

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDS = [random_record((13, (11, 4, 1, 7)), 1), random_record((3, (2, 5)), 2)]


def flat_gradient(model: Any, sums: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = (torch.linspace(-1, 2, len(sums)) * sums).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, gradients)])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_path_and_its_log_probabilities(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    path, reason = path_and_reason(model)
    assert path == family.path
    assert family.reason in reason
    assert bool(reason) == (path == "padded")
    naive = all_sums(model, RECORDS)
    sums = response_logprobs(model, RECORDS, path).sums
    torch.testing.assert_close(sums, naive, rtol=5e-7, atol=1e-5)  # fp32 itself rounds a sum of 60 to 4e-6
    ours, theirs = flat_gradient(model, sums), flat_gradient(model, naive)
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def greedily(model: Any, query: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens, everything computed anew for each."""
    ids = list(query)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(query) :]


PATHS = [(name, path) for name, family in FAMILIES.items() for path in dict.fromkeys((family.path, "padded"))]


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_greedy_decoding(name: str, path: str) -> None:
    """Three queries of unlike length in one batch; by the path it takes, and by transformers' cache."""
    model = FAMILIES[name].make()
    with torch.no_grad():
        drawn = draw(model, path, policy="greedy")
        expected = [greedily(model, query, 12) for query in QUERIES]
    assert drawn == expected


@pytest.mark.parametrize("name", ["llama4", "gpt-oss", "gemma4"])
def test_several_slots_a_query(name: str) -> None:
    """Chunks, sinks and shared keys where beams branch and slots end, by our cache and by transformers'."""
    model = FAMILIES[name].make()
    for options in ({"policy": "beam", "num_beams": 3}, {"policy": "top-p", "num_responses": 3}):
        drawn = draw(model, "tree", **options)
        assert drawn == draw(model, "padded", **options)
        assert len({tuple(tokens) for tokens in drawn}) == 9


@pytest.mark.parametrize("name", ["llama", "afmoe"])
def test_several_slots_of_one_query(name: str) -> None:
    """What attention returns is contiguous, for models that take a view of it."""
    model = FAMILIES[name].make()
    settings = SamplingSettings(policy="top-p", num_responses=3, max_new_tokens=8)

    def drawn(path: str) -> list[list[int]]:
        policy = Draws(settings, ["a"], [{3, 40}], None, torch.device("cpu"))
        return [response.tokens for response in decoding.decode(model, QUERIES[1:2], policy, 8, path)[0]]

    assert drawn("tree") == drawn("padded")


@pytest.mark.parametrize("name", ["llama4", "gpt-oss", "mistral"])
def test_slots_that_read_their_own_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long responses are drawn: chunks, sinks and windows there too."""
    model = FAMILIES[name].make()
    expected = draw(model, "padded", policy="top-p", num_responses=3)
    monkeypatch.setattr(decoding, "LONG", 1)
    assert draw(model, "tree", policy="top-p", num_responses=3) == expected


@pytest.mark.parametrize(
    ("name", "kernels"),
    # Chunks and sinks by FlexAttention, forward alone, as it runs on a CPU; and models that take a view of what comes
    # back, by masked calls, as on devices without kernels of their own.
    [("llama4", flex_attention), ("gpt-oss", flex_attention), ("afmoe", reference), ("jetmoe", reference)],
)
def test_kernels_of_other_devices(name: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "tree_attention", kernels.tree_attention)
    model = FAMILIES[name].make()
    with torch.no_grad():
        sums = response_logprobs(model, RECORDS, "tree").sums
        assert float((sums - all_sums(model, RECORDS)).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_size_is_found_for_every_family(name: str) -> None:
    """Mamba's have no heads to count."""
    model, settings = FAMILIES[name].make(), SamplingSettings(num_responses=3, max_new_tokens=5)
    tree, padded = (query_bytes(model, settings, 100, path) for path in ("tree", "padded"))
    assert tree > 0 and queries_at_once(model, settings, 100) >= 1
    assert padded > tree if hasattr(model.config.get_text_config(), "num_attention_heads") else padded == tree


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma4", "gpt-oss", "deepseek-v3"])
def test_the_bytes_planned_for_a_query_are_those_of_its_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[int, int] = {}
    layer = SharedCache.layer

    def counted(self: SharedCache, number: int, key: Tensor, value: Tensor) -> Any:
        held[number] = key.shape[1] * (key.shape[-1] + value.shape[-1]) * key.element_size()
        return layer(self, number, key, value)

    monkeypatch.setattr(SharedCache, "layer", counted)
    model, settings = FAMILIES[name].make(), SamplingSettings(policy="greedy", max_new_tokens=2)
    policy = Draws(settings, ["a"], [set()], None, torch.device("cpu"))
    decoding.decode(model, QUERIES[1:2], policy, 2, "tree")
    planned = query_bytes(model, settings, 101) - query_bytes(model, settings, 100)
    assert planned == sum(held.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_matters(name: str) -> None:
    """The comparisons above would say little of models whose log-probabilities hardly depend on the query."""
    model = FAMILIES[name].make()
    other = [random_record((13, ()), 9), random_record((3, ()), 8)]
    exchanged = [type(r)(r.id, o.query, r.responses, r.scores) for r, o in zip(RECORDS, other, strict=True)]
    with torch.no_grad():
        assert float((all_sums(model, RECORDS) - all_sums(model, exchanged)).abs().min()) > 1e-3


def test_plain_calls_with_soft_caps_are_contiguous_too() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    layer = torch.nn.Module()
    layer.layer_idx = 0
    output, _ = attention(layer, query, key, key, None, softcap=30.0)
    assert output.shape == (1, 5, 4, 8) and output.is_contiguous()


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2"])
def test_plain_calls_under_our_attention_keep_sinks_and_soft_caps(name: str) -> None:
    """As in an evaluation while training holds the attention; padded on either side, or not at all."""
    model = FAMILIES[name].make()
    model.set_attn_implementation("eager")
    ids = torch.tensor([RECORDS[0].query, RECORDS[0].query[::-1]])
    ones = torch.ones_like(ids)
    for mask in (None, ones, ones.index_fill(1, torch.arange(4), 0), ones.index_fill(1, torch.arange(9, 13), 0)):
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
            with our_attention(model):
                logits = model(input_ids=ids, attention_mask=mask).logits
        seen = slice(None) if mask is None else mask.bool()
        assert torch.allclose(logits[seen], expected[seen], atol=1e-5)


def test_the_document_has_this_table() -> None:
    document = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line for line in document.splitlines() if line.startswith("|")]
    assert rows == table().splitlines(), "python tests/support/families.py prints the table that belongs there"
