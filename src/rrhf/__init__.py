"""Align language models by ranking responses (RRHF, arXiv 2304.05302)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "RRHFConfig": "rrhf.training.config",
    "RRHFTrainer": "rrhf.training.trainer",
    "Record": "rrhf.records.record",
    "UserError": "rrhf.common.errors",
    "evaluate": "rrhf.evaluation.evaluate",
    "read_records": "rrhf.records.files",
    "sample": "rrhf.sampling.sampler",
    "score": "rrhf.rewards.scoring",
    "write_records": "rrhf.records.files",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from rrhf.common.errors import UserError as UserError
    from rrhf.evaluation.evaluate import evaluate as evaluate
    from rrhf.records.files import read_records as read_records
    from rrhf.records.files import write_records as write_records
    from rrhf.records.record import Record as Record
    from rrhf.rewards.scoring import score as score
    from rrhf.sampling.sampler import sample as sample
    from rrhf.training.config import RRHFConfig as RRHFConfig
    from rrhf.training.trainer import RRHFTrainer as RRHFTrainer


def __getattr__(name: str) -> Any:
    # Imported on first use: `rrhf --help` must not wait for torch.
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rrhf' has no attribute {name!r}")
