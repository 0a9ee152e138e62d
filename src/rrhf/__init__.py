"""Align language models by ranking responses (RRHF, arXiv 2304.05302)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "RRHFConfig": "rrhf.trainer",
    "RRHFTrainer": "rrhf.trainer",
    "Record": "rrhf.records",
    "UserError": "rrhf.errors",
    "evaluate": "rrhf.evaluation",
    "read_records": "rrhf.records",
    "sample": "rrhf.sampling",
    "score": "rrhf.rewards",
    "write_records": "rrhf.records",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from rrhf.errors import UserError as UserError
    from rrhf.evaluation import evaluate as evaluate
    from rrhf.records import Record as Record
    from rrhf.records import read_records as read_records
    from rrhf.records import write_records as write_records
    from rrhf.rewards import score as score
    from rrhf.sampling import sample as sample
    from rrhf.trainer import RRHFConfig as RRHFConfig
    from rrhf.trainer import RRHFTrainer as RRHFTrainer


def __getattr__(name: str) -> Any:
    # Imported on first use: `rrhf --help` must not wait for torch.
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rrhf' has no attribute {name!r}")
