"""Random records for the passes over responses, and a model's path without its warning."""

from __future__ import annotations

import warnings
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


def silently(model: Any, longest_row: int) -> str:
    """usable_path, with any warning turned into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return usable_path(model, longest_row)
