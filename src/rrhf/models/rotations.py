"""Rotary embeddings whose frequencies change with the longest row of a forward pass: a warning where one gets there.

transformers' "longrope" (Phi-3) and "dynamic" ones take other frequencies for all rows of a pass once the largest
position in it is past a length: the numbers of a shorter row then depend on what is computed with it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from rrhf.models.tokenization import EncodedRecord

log = logging.getLogger("rrhf")

_KNOWN = "_rrhf_rotation_changes"  # the attribute in which a model carries where its rotation changes, or None


def changes_with_length(module: Any) -> bool:
    """transformers' dynamic and long rotary embeddings write the frequencies that a length needs into the module."""
    return any(map(_is_changing, _kinds(module).values()))


def warn_of_rows(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> None:
    """``warn_of_length`` of the longest row of a forward pass over ``records``."""
    rows = (len(record.query) + max(map(len, record.responses), default=0) for record in records)
    warn_of_length(model, max(rows, default=0), "--max_length")


def warn_of_length(model: PreTrainedModel, tokens: int, cure: str) -> None:
    """Warn, once a model, where rows of so many ``tokens`` change its rotation; ``cure``: the flag that bounds them."""
    if _KNOWN not in vars(model):
        vars(model)[_KNOWN] = min(filter(None, map(_change, model.modules())), default=None)
    changes = vars(model)[_KNOWN]
    if changes is None or tokens <= changes:
        return
    vars(model)[_KNOWN] = None  # once is enough
    log.warning(
        f"{type(model).__name__}: rows of up to {tokens} tokens, but past {changes} its rotation changes for all rows "
        f"of a forward pass, so that numbers depend on what is computed together: keep rows within {changes} ({cure})"
    )


def _kinds(module: Any) -> dict[str | None, Any]:
    """The kind of a module's rotation, one a type of layer where these differ."""
    kinds = getattr(module, "rope_type", None)
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _is_changing(kind: Any) -> bool:
    return "dynamic" in str(kind) or kind == "longrope"


def _change(module: Any) -> int | None:
    """The most positions that a module's first frequencies are for; ``None`` where it has no others."""
    lengths = []
    for layers, kind in _kinds(module).items():
        if _is_changing(kind):
            settings = getattr(module.config, "rope_parameters", None) or {}
            settings = settings if layers is None else settings.get(layers) or {}
            # Dynamic ones count from the context.
            given = settings.get("original_max_position_embeddings") if kind == "longrope" else None
            lengths.append(given or getattr(module, "original_max_seq_len", None) or 0)
    return min(filter(None, lengths), default=None)
