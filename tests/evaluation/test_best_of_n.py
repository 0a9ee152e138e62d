"""The best of m among n samples: the estimator against all subsets, by hand and in expectation."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from rrhf.evaluation.best_of_n import best_index, best_of_n_curve, kl_bound, values_of_best


@pytest.mark.parametrize("seed", range(4))
def test_the_estimator_is_the_mean_over_all_subsets(seed: int) -> None:
    draw = random.Random(seed)
    scores = [draw.choice([0.0, 0.5, 1.0, draw.random()]) for _ in range(7)]  # with ties
    values = [draw.random() for _ in scores]
    found = values_of_best(scores, values)
    for m in range(1, 8):
        chosen = [values[max(subset, key=lambda i: (scores[i], -i))] for subset in itertools.combinations(range(7), m)]
        assert found[m - 1] == pytest.approx(sum(chosen) / len(chosen))


def test_by_hand() -> None:
    # Of 1, 2, 4: one sample 7/3; pairs have the best 2, 4, 4; all three 4.
    assert values_of_best([4.0, 1.0, 2.0], [4.0, 1.0, 2.0]).tolist() == pytest.approx([7 / 3, 10 / 3, 4])


def test_it_is_unbiased_for_fewer_samples_than_were_drawn() -> None:
    """E[max of m uniform numbers] = m / (m + 1)."""
    generator = np.random.default_rng(0)
    draws = generator.random((4000, 6))
    means = np.mean([values_of_best(row, row) for row in draws.tolist()], axis=0)
    assert means == pytest.approx([m / (m + 1) for m in range(1, 7)], abs=0.01)


def test_equal_and_missing_scores() -> None:
    assert best_index([None, 0.1 + 0.2, 0.3, 0.3]) == 1  # the first of equals, though the others are lower by a bit
    assert best_index([None, None]) is None and best_index([]) is None
    assert values_of_best([None, 1.0, 2.0], [5.0, 3.0, 4.0]).tolist() == [3.5, 4.0]
    assert values_of_best([1.0, 2.0], [None, 4.0]).tolist() == [4.0]
    curve = best_of_n_curve([[1.0, 2.0], [None, 3.0], [None, None]], [[1.0, 2.0], [None, 3.0], [None, None]], seed=0)
    assert [(line["n"], line["mean"], line["prompts"]) for line in curve] == [(1, 2.25, 2), (2, 2.0, 1)]
    assert best_of_n_curve([[]], [[]], seed=0) == []


def test_the_bound_on_kl() -> None:
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_the_interval_covers_over_prompts() -> None:
    rows = np.random.default_rng(1).random((200, 4)).tolist()
    for line in best_of_n_curve(rows, rows, seed=0):
        assert line["low"] < line["mean"] < line["high"]
        assert line["low"] < line["n"] / (line["n"] + 1) < line["high"]
