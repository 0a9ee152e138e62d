"""Measures of a ranking: worked by hand, and against scipy's."""

from __future__ import annotations

import math
import random

import pytest

from rrhf.evaluation.pairs import verdict
from rrhf.evaluation.ranking import calibration, kendall_tau, pair_margins, ranking_report, right


def test_margins_and_accuracy_by_hand() -> None:
    assert pair_margins([1.0, 3.0, 1.0], [0.5, 0.2, 0.2]) == pytest.approx([-0.3, 0.0])  # equal scores are no pair
    assert right([-0.3, 0.0, 2.0]) == 1.5
    assert pair_margins([0.1 + 0.2, 0.3], [1.0, 2.0]) == []


def test_kendalls_tau_is_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    draw = random.Random(1)
    for _ in range(60):
        k = draw.randint(2, 7)
        a, b = ([float(draw.randint(0, 4)) for _ in range(k)] for _ in range(2))
        expected = scipy_stats.kendalltau(a, b).statistic
        found = kendall_tau(a, b)
        assert (found is None) == math.isnan(expected)
        if found is not None:
            assert found == pytest.approx(expected)


def test_a_query_counts_once_however_many_its_pairs() -> None:
    """Six pairs of one query, all right, and one pair of another, wrong: a half; and of queries alone the interval."""
    ranked = [([0.0, 1.0, 2.0, 3.0], [0.0, 0.1, 0.2, 0.3]), ([1.0, 0.0], [0.0, 1.0])]
    report = ranking_report(ranked)
    assert report["queries"] == 2 and report["pairs"] == 7
    assert report["accuracy"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    shares = [verdict(*query).pairs for query in ranked]
    assert report["accuracy"]["mean"] == sum(shares) / len(shares)  # as `rrhf evaluate --pairs` counts
    with pytest.raises(ValueError, match="at least one"):
        ranking_report([([1.0, 1.0], [0.0, 1.0])])


def test_calibration_of_a_model_that_says_75_percent_and_is_right_half_the_time() -> None:
    bins, error = calibration([math.log(3), -math.log(3)] * 10, bins=2)
    assert [b["n"] for b in bins] == [10, 10]
    assert bins[0]["confidence"] == pytest.approx(0.75) and bins[0]["accuracy"] == 0.5
    assert error == pytest.approx(0.25)


def test_the_report_counts_lists_and_pairs() -> None:
    ranked = [([0.0, 1.0, 2.0], [0.0, 0.1, 0.2]), ([1.0, 0.0], [0.0, 1.0]), ([1.0, 1.0], [0.0, 1.0])]
    report = ranking_report(ranked)
    assert report["queries"] == 2
    assert report["pairs"] == 4 and report["accuracy"]["mean"] == 0.5
    assert report["kendall_tau"]["n"] == 1 and report["kendall_tau"]["mean"] == 1.0
    assert ranking_report(ranked[1:])["kendall_tau"] is None
