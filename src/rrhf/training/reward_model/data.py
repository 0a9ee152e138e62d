"""Scored records as the rows of a reward model, ready to be trained on or measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rrhf.losses import pair_weights
from rrhf.records.record import Record
from rrhf.rewards.reward_models.passes import RewardModel


@dataclass(frozen=True)
class RankedRows:
    """One query's k scored responses: ``rows`` as the model reads them (k of an encoder's; of a causal model's fewer,
    with k responses in all), and their ``scores``."""

    id: str
    rows: tuple[Any, ...]
    scores: tuple[float, ...]

    def truth(self) -> Tensor:
        """The scores as a tensor of shape (k,), fp64."""
        return torch.tensor(self.scores, dtype=torch.float64)


class RankedRecords(Dataset):
    """Records in memory, without those that hold no pair; ``skipped`` counts them by reason, ``cut`` counts rows."""

    def __init__(self, records: Iterable[Record], model: RewardModel, ties: str = "none") -> None:
        self.records: list[RankedRows] = []
        self.skipped: Counter[str] = Counter()
        self.pairs = 0
        before = model.reader.cut
        for record in records:
            read = [index for index, score in enumerate(record.scores) if score is not None]
            scores = tuple(float(record.scores[index] or 0.0) for index in read)
            found = round(
                float(pair_weights(torch.tensor(scores, dtype=torch.float64), ties).sum())
            )  # two halves are one
            if not found:
                self.skipped["equal scores alone" if len(read) > 1 else "fewer than two scores"] += 1
                continue
            self.pairs += found
            self.records.append(RankedRows(record.id, tuple(model.encode(record, read)), scores))
        self.cut = model.reader.cut - before

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> RankedRows:
        return self.records[index]

    def summary(self) -> str:
        """What became of the records, in one line."""
        parts = [f"{len(self)} queries with {self.pairs} pairs"]
        parts += [f"{count} skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        parts += [f"{self.cut} rows cut from the left"] * bool(self.cut)
        return "; ".join(parts)
