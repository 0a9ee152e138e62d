"""How many queries are decoded together where nobody says so: what fits into the memory that is free."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from rrhf.models.devices import free_memory
from rrhf.models.forward import causal_lm
from rrhf.models.kernels.choice import kernels_for
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.stepping import device_of

log = logging.getLogger("rrhf")

SHARE = 0.5  # of the free memory; the rest is for a step's own tensors
LOGIT_BYTES = 24  # a logit's fp32 value, its copies, and what is sorted and summed with it


def queries_at_once(model: PreTrainedModel, settings: SamplingSettings, longest: int) -> int:
    """``--batch_size``, or the largest power of two that fits, up to what is fast on the device; says which.

    Args:
        longest: tokens of the longest query.
    """
    if settings.batch_size is not None:
        return settings.batch_size
    device = device_of(model)
    free, size = free_memory(device), query_bytes(model, settings, longest)
    most = kernels_for(device).most_queries()
    fitting = most if free is None else max(1, min(most, int(SHARE * free / size)))
    count = 1 << (fitting.bit_length() - 1)
    memory = "" if free is None else f", {free / 1e9:.1f} GB free"
    log.info(f"sample: {count} queries at a time, {count * size / 1e9:.2f} GB{memory} (--batch_size)")
    return count


def query_bytes(model: PreTrainedModel, settings: SamplingSettings, longest: int) -> int:
    """About the bytes that a query takes while its responses are decoded: keys, values and logits."""
    config = causal_lm(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = longest + settings.width * (settings.max_new_tokens - 1)
    cached = 2 * config.num_hidden_layers * heads * size * columns * model.dtype.itemsize
    return int(cached + LOGIT_BYTES * settings.width * config.vocab_size)
