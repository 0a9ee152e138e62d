"""What a ranking loss needs beside sums, lengths and scores, and where training has it from (``rrhf.losses.needs``).

The trainer makes ``token_logprobs`` (of its forward passes), ``batch_kl`` (over the step at hand) and, for records that
are in memory, ``reference_sums`` (before the first step). What is of the policy that drew the responses, or of the
reference's tokens, the records must bring.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rrhf.common.errors import UserError
from rrhf.losses import OPTIONAL
from rrhf.records.record import TOKEN_COLUMNS
from rrhf.training.dataset import EncodedRecords, TrainingRecord

OF_THE_STEP = ("token_logprobs", "batch_kl")
CURES = {
    "reference_sums": "give --reference_model, or train on records that are scored beforehand",
    "old_token_logprobs": "it is for training that samples its responses itself (--resample_steps) and keeps how "
    "likely each token was then; or give records with that column",
    "reference_token_logprobs": "leave --token_kl 0, or give records with that column",
}


def refuse_unmet(loss: str, needed: Collection[str], data: Any, flag: str) -> None:
    """Refuse a loss that ``data`` does not bring what it needs for.

    Records that come while training says what they will have in the data set's ``provides``.

    Args:
        data: ``EncodedRecords``, or a data set that makes its records while training.
        flag: what brought the data.

    Raises:
        UserError: something is missing; the message says how to mend it.
    """
    for name in OPTIONAL:
        if name in needed and name not in OF_THE_STEP and (lacking := _lacking(data, name, flag)):
            raise UserError(f"--ranking_loss {loss}: it needs {name}, which {lacking}: {CURES[name]}")


def _lacking(data: Any, name: str, flag: str) -> str:
    """Where ``name`` is missing, in words; empty where it is not, or will be made."""
    if not isinstance(data, EncodedRecords):
        return "" if name in getattr(data, "provides", ()) else f"{flag} does not have"
    lacking = [record.id for record in data.records if getattr(record, name) is None]
    return f"record {lacking[0]!r} of {flag} does not have" if lacking and name != "reference_sums" else ""


def optional_tensors(
    record: TrainingRecord, needed: Collection[str], sums: Tensor, tokens: Tensor | None, kl: Tensor | None
) -> dict[str, Any]:
    """The optional arguments of ``rrhf_loss`` for this record, those that are ``needed``.

    Args:
        sums: of its responses, Tensor of shape (k,).
        tokens: the log-probabilities of all its tokens in order, Tensor of shape (Σ ‖y_i‖,).
        kl: over the optimiser step, a scalar.
    """
    given: dict[str, Any] = {"batch_kl": kl}
    if tokens is not None:
        given["token_logprobs"] = tokens.split([len(response) for response in record.responses])
    if record.reference_sums is not None:
        given["reference_sums"] = torch.tensor(record.reference_sums, dtype=sums.dtype)
    for name in TOKEN_COLUMNS:
        values: Sequence[Sequence[float]] | None = getattr(record, name)
        if values is not None:
            given[name] = [torch.tensor(row, dtype=sums.dtype) for row in values]
    return {name: value for name, value in given.items() if name in needed}
