"""The kernels with FlexAttention, as ``rrhf.models.kernels.choice.Kernels`` lists them; the rest is plain torch."""

from __future__ import annotations

from rrhf.models.kernels.cuda.flex_attention import tree_attention
from rrhf.models.kernels.reference import (
    addmm,
    exp_,
    exp_less_,
    fp64_device,
    key_cache,
    lean,
    linear,
    logit_rows,
    logit_tiles,
    logits,
    masked_attention,
    matmul,
    most_queries,
    nucleus,
    packed,
    sampling_rows,
    spare_rows,
    steps_between_checks,
    top,
)

__all__ = [
    "addmm",
    "exp_",
    "exp_less_",
    "fp64_device",
    "key_cache",
    "lean",
    "linear",
    "logit_rows",
    "logit_tiles",
    "logits",
    "masked_attention",
    "matmul",
    "most_queries",
    "nucleus",
    "packed",
    "sampling_rows",
    "spare_rows",
    "steps_between_checks",
    "top",
    "tree_attention",
]
