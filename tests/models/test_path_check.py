"""Which models take the tree: the check must refuse those whose numbers it would change, by more than one sign."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from oracles.logprobs import all_sums
from rrhf.models import path_check
from rrhf.models.kernels import reference
from rrhf.models.kernels.choice import KERNELS
from rrhf.models.path_check import usable_path
from rrhf.models.shared_prefix import tree_logprobs
from support.models import tiny_model
from support.trees import random_record, silently

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}


def lfm2() -> Any:
    return t.Lfm2ForCausalLM(t.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))


def qwen3_5() -> Any:
    heads = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = ["linear_attention", "full_attention"]
    return t.Qwen3_5ForCausalLM(
        t.Qwen3_5TextConfig(**SIZES, **heads, layer_types=layers, linear_num_key_heads=2, linear_num_value_heads=4)
    )


def stablelm() -> Any:
    return t.StableLmForCausalLM(t.StableLmConfig(**SIZES))


def deepseek_v32() -> Any:
    sparse = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
    return t.DeepseekV32ForCausalLM(t.DeepseekV32Config(**SIZES, **LATENT, **ROUTED, **sparse))


def deepseek_v3() -> Any:
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**SIZES, **LATENT, **ROUTED))


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def path_and_reason(model: Any, longest_row: int = 40) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = usable_path(model, longest_row)
    return path, " ".join(str(w.message) for w in caught if "shared-prefix" in str(w.message))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lfm2, "1 of its 2 layers attended by the tree once, 1 calls in all"),
        (qwen3_5, "1 of its 2 layers attended by the tree once, 1 calls in all"),
        (stablelm, "0 of its 2 layers"),
        (deepseek_v32, "attention option indices"),
    ],
)
def test_models_that_mix_tokens_in_other_ways_are_refused(
    make: Callable[[], Any], reason: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models too large for a copy in fp32 are checked, whose numbers may be apart by rounding."""
    monkeypatch.setattr(path_check, "COPIED_PARAMETERS", 0)
    path, why = path_and_reason(made(make).to(dtype))
    assert path == "padded"
    assert reason in why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_others_take_the_tree_without_a_copy(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_check, "COPIED_PARAMETERS", 0)
    assert silently(tiny_model(family).to(dtype), longest_row=40) == "tree"


def test_latent_attention_takes_the_tree() -> None:
    """DeepSeek-V3: values of another size than keys, and experts."""
    model, records = made(deepseek_v3), [random_record((6, (4, 7)), 1)]
    assert path_and_reason(model) == ("tree", "")
    assert torch.allclose(tree_logprobs(model, records).sums, all_sums(model, records), atol=1e-4)


def test_a_response_that_leaks_into_the_next_is_noticed_by_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak too small for the comparison of numbers in bfloat16."""
    visible = reference.visible

    def one_cell_too_many(ends: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
        seen = visible(ends, positions, window)
        seen[-1, 5] = True  # the last response's last input reads the first response's first token
        return seen

    monkeypatch.delitem(KERNELS, "cpu")
    monkeypatch.setattr(path_check, "COPIED_PARAMETERS", 0)
    model = tiny_model("llama").bfloat16()
    assert path_and_reason(model, 0) == ("tree", "")
    monkeypatch.setattr(reference, "visible", one_cell_too_many)
    path, why = path_and_reason(model, 0)
    assert path == "padded"
    assert "exchanging one response changes another's" in why


def test_a_layer_that_asks_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[0]])
    path, why = path_and_reason(model)
    assert path == "padded"
    assert "0 of its 2 layers attended by the tree once, 2 calls in all" in why


@pytest.mark.parametrize("name", ["sliding_window", "attention_chunk_size", "index_topk"])
def test_the_check_is_longer_than_windows_chunks_and_chosen_keys_where_the_data_is(name: str) -> None:
    model = tiny_model("llama")
    setattr(model.config, name, 20)
    assert len(path_check._probe(model, 20).query) == 5
    assert len(path_check._probe(model, 21).query) == 22
