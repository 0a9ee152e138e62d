"""Agreement by hand-worked numbers."""

from __future__ import annotations

import pytest

from rrhf.evaluation.agreement import agreement, cohen_kappa, outcome_alpha, outcome_of

pytest.importorskip("krippendorff", reason="the extra `judging` is not installed")


def test_the_shares_of_appendix_d_and_kappa() -> None:
    labels = [("1", "win", "win"), ("2", "win", "tie"), ("3", "win", "lose"), ("4", "lose", "lose")]
    found = agreement(labels)
    assert (found["n"], found["same"]["mean"], found["not_contradicting"]["mean"]) == (4, 0.5, 0.75)
    assert found["same"]["low"] < 0.5 < found["same"]["high"]
    # By chance: both win 3/4 · 1/4, both lose 1/4 · 2/4, a tie of the first never: 5/16.
    assert found["kappa"] == pytest.approx((8 / 16 - 5 / 16) / (1 - 5 / 16))
    # A query with two labels counts once: the mean of 1 and 0 with 1.
    assert agreement([("1", "win", "win"), ("1", "win", "lose"), ("2", "tie", "tie")])["same"]["mean"] == 0.75
    assert agreement([]) == {"n": 0, "same": None, "not_contradicting": None, "kappa": None}
    assert cohen_kappa([("tie", "tie")] * 3) is None


def test_krippendorff_s_alpha_of_outcomes() -> None:
    # Units (win, win), (tie, win), (lose, lose), and one label alone, which is in no pair.
    units = [{"r": "win", "s": "win"}, {"r": "tie", "s": "win"}, {"s": "lose", "t": "lose"}, {"r": "tie"}]
    # Nominal: observed 2 of 6 ordered pairs differ. Values 3 wins, 1 tie, 2 losses: expected 2 (3 + 6 + 2) / 30.
    assert outcome_alpha(units)["nominal"] == pytest.approx(1 - (2 / 6) / (22 / 30))
    ordinal = outcome_alpha(units)["ordinal"]
    assert ordinal is not None and ordinal > 1 - (2 / 6) / (22 / 30)  # the tie lies beside the win
    assert outcome_alpha([{"r": "win", "s": "win"}]) == {"nominal": None, "ordinal": None}


def test_equal_scores_are_a_tie() -> None:
    assert [outcome_of(1, 2), outcome_of(0.1 + 0.2, 0.3), outcome_of(2, 1)] == ["lose", "tie", "win"]
