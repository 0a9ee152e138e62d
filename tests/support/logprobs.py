"""Log-probabilities of a few toy responses, each from a row and a forward of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from oracles.logprobs import response_sum
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.tokenization import TextFormat, TextSettings
from rrhf.records.record import Record
from support.models import toy_records


def settings(folder: Path) -> ModelSettings:
    return ModelSettings(str(folder), device="cpu", dtype="float32")


def records() -> list[Record]:
    return [replace(record, scores=[]) for record in toy_records(7, seed=3)]


def naive(folder: Path, text: TextSettings | None = None, max_length: int | None = None) -> list[list[list[float]]]:
    """[sum, length] of each response of ``records()``."""
    import torch

    model, tokenizer = load_policy(settings(folder))
    encode = TextFormat(tokenizer, text)
    encoded = [encode.encode_record(record, max_length) for record in records()]
    with torch.no_grad():
        return [
            [[float(response_sum(model, one.query, response)), len(response)] for response in one.responses]
            for one in encoded
        ]


def flat(values: list[list[Any]]) -> list[Any]:
    return [value for row in values for value in row]
