"""The Bradley–Terry loss: a number worked by hand, and the naive sum over pairs."""

from __future__ import annotations

import math
import random

import pytest
import torch

from oracles import reward_loss
from rrhf.training.reward_model.loss import bradley_terry


def test_three_responses_by_hand() -> None:
    """R = (0, ln 2, ln 4) for r = (2, 1, 1): both pairs are wrong, σ(−ln 2) = 1/3 and σ(−ln 4) = 1/5."""
    rewards, scores = torch.tensor([0.0, math.log(2), math.log(4)]), torch.tensor([2.0, 1.0, 1.0])
    dropped = bradley_terry(rewards, scores)
    assert float(dropped) == pytest.approx((math.log(3) + math.log(5)) / 2)
    tie = (math.log(3) + math.log(3 / 2)) / 2  # between ln 2 and ln 4: half of each way
    halves = bradley_terry(rewards, scores, ties="half")
    assert float(halves) == pytest.approx((math.log(3) + math.log(5) + tie) / 3)
    centred = bradley_terry(rewards, scores, center=0.5)
    squares = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert float(centred) == pytest.approx(float(dropped) + 0.5 * squares)


@pytest.mark.parametrize("ties", ["none", "half"])
@pytest.mark.parametrize("center", [0.0, 0.1])
def test_like_one_pair_after_the_other(ties: str, center: float) -> None:
    draw = random.Random(0)
    for _ in range(40):
        k = draw.randint(1, 6)
        scores = [draw.choice([None, 0.0, 0.5, 0.5, 1.0]) for _ in range(k)]
        rewards = torch.tensor([draw.gauss(0, 2) for _ in range(k)], dtype=torch.float64, requires_grad=True)
        found = bradley_terry(rewards, torch.tensor([math.nan if s is None else s for s in scores]), ties, center)
        expected = reward_loss.bradley_terry(rewards.tolist(), scores, ties, center)
        if expected is None:
            assert found is None
            continue
        assert found.item() == pytest.approx(expected)
        found.backward()
        assert bool(torch.isfinite(rewards.grad).all())
