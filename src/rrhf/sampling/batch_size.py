"""How many queries are decoded together where nobody says so: what fits into the memory that is free."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

from rrhf.models.devices import free_memory
from rrhf.models.forward import causal_lm
from rrhf.models.kernels.choice import kernels_for
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.stepping import device_of

log = logging.getLogger("rrhf")

SHARE = 0.5  # of the free memory; the rest is for a step's own tensors
LOGIT_BYTES = 24  # a logit's fp32 value, its copies, and what is sorted and summed with it


def queries_at_once(model: PreTrainedModel, settings: SamplingSettings, longest: int, path: str = "tree") -> int:
    """``--batch_size``, or the largest power of two that fits, up to what is fast on the device; says which.

    Args:
        longest: tokens of the longest query.
        path: "tree", or "padded" where every response keeps its query's keys too.
    """
    if settings.batch_size is not None:
        return settings.batch_size
    device = device_of(model)
    free, size = free_memory(device), query_bytes(model, settings, longest, path)
    most = kernels_for(device).most_queries()
    fitting = most if free is None else max(1, min(most, int(SHARE * free / size)))
    count = 1 << (fitting.bit_length() - 1)
    memory = "" if free is None else f", {free / 1e9:.1f} GB free"
    log.info(f"sample: {count} queries at a time, {count * size / 1e9:.2f} GB{memory} (--batch_size)")
    return count


def query_bytes(model: PreTrainedModel, settings: SamplingSettings, longest: int, path: str = "tree") -> int:
    """About the bytes that a query takes while its responses are decoded: keys, values and logits.

    A model without attention (Mamba) keeps a state that does not grow with the tokens: its logits count alone.
    """
    config = causal_lm(model).config.get_text_config()
    queries = longest * (settings.width if path == "padded" else 1)
    columns = queries + settings.width * (settings.max_new_tokens - 1)
    # Layers may differ in their heads (Gemma 4).
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    numbers = columns * sum(map(_numbers_a_column, layers))
    return int(numbers * model.dtype.itemsize + LOGIT_BYTES * settings.width * config.vocab_size)


def _numbers_a_column(layer: Any) -> int:
    """Of a layer's keys and values, for one token."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        return 0
    if getattr(layer, "kv_lora_rank", None):  # MLA: every head's own, made of what is latent before it is kept
        return heads * int(layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim)
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return 2 * (getattr(layer, "num_key_value_heads", None) or heads) * int(size)
