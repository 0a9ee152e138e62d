"""From comparisons to numbers: win rates, raw and at equal length, flips, agreement of judges, strengths of systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rrhf.common.imports import of_extra
from rrhf.evaluation.agreement import MISSING, OUTCOMES
from rrhf.evaluation.agreement import agreement as label_agreement
from rrhf.evaluation.bradley_terry import Game, bradley_terry
from rrhf.evaluation.metrics import paired_bootstrap
from rrhf.evaluation.pairwise.comparisons import Comparison

PRIOR_VARIANCE = 10.0  # of the two coefficients of the length model, which keeps them finite

Interval = dict[str, float]


def win_rate(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of 1 a win, 0.5 a tie, 0 a loss, with its 95 % bootstrap interval over questions."""
    return paired_bootstrap(values, seed)


def length_controlled_win_rate(
    values: Sequence[float], length_differences: Sequence[float], seed: int = 0, samples: int = 500
) -> Interval:
    """The win rate that a logistic model predicts at equal length (AlpacaEval 2, Dubois et al. 2024, arXiv 2404.04475).

    P(a wins) = σ(θ + φ · tanh(Δ / s)), Δ = len(a) − len(b), s its standard deviation over the questions; the rate is
    σ(θ). AlpacaEval's term for a question's difficulty, which is fitted on many systems, is left out. θ and φ have a
    normal prior of variance 10, so that there is a number also where all is won, where length alone decides, and where
    all lengths are equal: there an unregularised fit has none.

    Args:
        values: 1, 0.5 or 0 a question.
        length_differences: Δ, in any unit.
        seed, samples: of the bootstrap over questions.

    Returns:
        ``mean`` (the rate), ``low`` and ``high``.

    Raises:
        ValueError: nothing to fit, or as many lengths as values are not there.
    """
    won, lengths = np.asarray(values, dtype=float), np.asarray(length_differences, dtype=float)
    if not won.size or won.shape != lengths.shape:
        raise ValueError("the length model needs a length difference a value, and at least one")
    generator = np.random.default_rng(seed)
    rates = [
        _rate_at_equal_length(won[rows], lengths[rows])
        for rows in generator.integers(0, won.size, size=(samples, won.size))
    ]
    low, high = np.quantile(rates, [0.025, 0.975])
    return {"mean": _rate_at_equal_length(won, lengths), "low": float(low), "high": float(high)}


def _rate_at_equal_length(won: Any, lengths: Any) -> float:
    linear = of_extra("sklearn.linear_model", MISSING)
    spread = lengths.std()
    longer = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    columns = np.stack([np.ones_like(longer), longer], axis=1)
    # A tie is half a win and half a loss. A tiny weight keeps both classes there where one has none.
    weights = np.concatenate([won, 1 - won]) + 1e-9
    labels = np.repeat([1, 0], won.size)
    # The intercept is a column of its own, since scikit-learn penalises only those.
    model = linear.LogisticRegression(C=PRIOR_VARIANCE, fit_intercept=False, tol=1e-6, max_iter=1000)
    model.fit(np.concatenate([columns, columns]), labels, sample_weight=weights)
    return float(1 / (1 + np.exp(-model.coef_[0, 0])))


def describe(comparisons: Sequence[Comparison], seed: int = 0, samples: int = 500) -> dict[str, Any]:
    """All numbers of one judge on one pair of systems; those without a judged question are left at None.

    Rates are ``mean``, ``low`` and ``high``: the 95 % bootstrap interval over questions.

    Returns:
        n (questions judged in both orders), unjudged, win, tie, lose (questions), win_rate, length_controlled_win_rate,
        position_flip_rate, first_position_win_rate (0.5: no liking for a position), summed_scores (Table 9 of the
        paper: of a and b over all questions, each order counts half, and their difference a − b as a rate), mean_length
        of both, categories (name → n, win, tie, lose, win_rate, position_flip_rate, summed_scores).
    """
    judged = [comparison for comparison in comparisons if comparison.is_judged]
    result: dict[str, Any] = {
        "n": len(judged),
        "unjudged": len(comparisons) - len(judged),
        **_outcomes(judged, seed),
        **dict.fromkeys(("length_controlled_win_rate", "first_position_win_rate", "mean_length")),
    }
    if not judged:
        return {**result, "categories": {}}
    lengths = np.array([comparison.lengths for comparison in judged], dtype=float)
    orders = [comparison.preferences() for comparison in judged]
    values = [comparison.value for comparison in judged]
    result |= {
        "length_controlled_win_rate": length_controlled_win_rate(values, lengths[:, 0] - lengths[:, 1], seed, samples),
        "first_position_win_rate": paired_bootstrap([(one + 1 - other) / 2 for one, other in orders], seed),
        "mean_length": {"a": float(lengths[:, 0].mean()), "b": float(lengths[:, 1].mean())},
    }
    categories = sorted({comparison.category for comparison in judged} - {""})
    result["categories"] = {
        name: {"n": len(part), **_outcomes(part, seed)}
        for name in categories
        for part in [[comparison for comparison in judged if comparison.category == name]]
    }
    return result


def _outcomes(judged: Sequence[Comparison], seed: int) -> dict[str, Any]:
    """What is said of all questions, and of those of a category."""
    counts: dict[str, Any] = {
        name: sum(comparison.outcome == name for comparison in judged) for name in reversed(OUTCOMES)
    }
    if not judged:
        return {**counts, **dict.fromkeys(("win_rate", "position_flip_rate", "summed_scores"))}
    sums = np.array([comparison.sums for comparison in judged])
    apart = paired_bootstrap(sums[:, 0] - sums[:, 1], seed)
    return {
        **counts,
        "win_rate": win_rate([comparison.value for comparison in judged], seed),
        "position_flip_rate": paired_bootstrap([float(comparison.is_flipped) for comparison in judged], seed),
        "summed_scores": {
            "a": float(sums[:, 0].sum()),
            "b": float(sums[:, 1].sum()),
            "difference": {name: value * len(judged) for name, value in apart.items()},
        },
    }


def agreement(one: Sequence[Comparison], other: Sequence[Comparison], seed: int = 0) -> dict[str, Any]:
    """How far two judges agree on the questions that both have judged: see ``rrhf.evaluation.agreement``."""
    theirs = {comparison.id: comparison.outcome for comparison in other if comparison.is_judged}
    return label_agreement(
        [(c.id, c.outcome, theirs[c.id]) for c in one if c.is_judged and c.id in theirs],
        seed,
    )


def strengths(
    pairs: Mapping[tuple[str, str], Sequence[Comparison]], seed: int = 0, samples: int = 200
) -> dict[str, Interval]:
    """Bradley–Terry strengths of systems, from (system a, system b) → their comparisons: see ``bradley_terry``."""
    games: dict[str, list[Game]] = {}
    for (a, b), comparisons in pairs.items():
        for comparison in comparisons:
            if comparison.is_judged:
                games.setdefault(comparison.id, []).append((a, b, comparison.value))
    return bradley_terry(games, seed, samples)
