"""The naive Bradley–Terry loss: one pair after the other, in Python's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def bradley_terry(rewards: Sequence[float], scores: Sequence[float | None], ties: str, center: float) -> float | None:
    terms = []
    for i in range(len(rewards)):
        for j in range(i + 1, len(rewards)):
            r_i, r_j = scores[i], scores[j]
            if r_i is None or r_j is None or (r_i == r_j and ties == "none"):
                continue
            won = {True: 1.0, False: 0.0}[r_i > r_j] if r_i != r_j else 0.5
            probability = 1 / (1 + math.exp(rewards[j] - rewards[i]))
            loss = -won * math.log(probability) - (1 - won) * math.log(1 - probability)
            terms.append(loss + center * (rewards[i] + rewards[j]) ** 2)
    return sum(terms) / len(terms) if terms else None
