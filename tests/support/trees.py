"""Random records for the passes over responses, and a model's path with what the log says of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from rrhf.models.path_check import usable_path
from rrhf.models.tokenization import EncodedRecord

VOCABULARY = 97


def random_record(shape: tuple[int, Sequence[int]], seed: int = 0, vocabulary: int = VOCABULARY) -> EncodedRecord:
    """A record of random tokens: (query length, response lengths)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, vocabulary, (n,), generator=generator).tolist()

    responses = [tokens(n) for n in shape[1]]
    return EncodedRecord(f"r{seed}", tokens(shape[0]), responses, [None] * len(responses))


RECORDS = [
    random_record((13, (11, 4, 1, 0, 20)), 1),
    random_record((1, (3, 9)), 2),
    random_record((6, (7,)), 3),
    random_record((3, (1, 1, 2)), 4),
]


def path_and_reason(model: Any, longest_row: int = 40) -> tuple[str, str]:
    """usable_path, and what it logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rrhf").addHandler(handler)
    try:
        return usable_path(model, longest_row), " ".join(messages)
    finally:
        logging.getLogger("rrhf").removeHandler(handler)


def silently(model: Any, longest_row: int) -> str:
    """usable_path, which must log nothing."""
    path, reason = path_and_reason(model, longest_row)
    assert not reason
    return path
