"""From comparisons to numbers: win rates, raw and at equal length, flips, agreement of judges, strengths of systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rrhf.common.errors import UserError
from rrhf.evaluation.metrics import paired_bootstrap
from rrhf.evaluation.pairwise.comparisons import OUTCOMES, Comparison

PRIOR_VARIANCE = 10.0  # of the two coefficients of the length model, which keeps them finite
STRENGTH_PENALTY = 0.1  # alpha of choix: as if each system had won and lost a little against each other
MISSING = "judging in pairs needs scikit-learn and choix: pip install 'rrhf[judging]'"

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
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError(MISSING) from None
    spread = lengths.std()
    longer = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    columns = np.stack([np.ones_like(longer), longer], axis=1)
    # A tie is half a win and half a loss. A tiny weight keeps both classes there where one has none.
    weights = np.concatenate([won, 1 - won]) + 1e-9
    labels = np.repeat([1, 0], won.size)
    # The intercept is a column of its own, since scikit-learn penalises only those.
    model = LogisticRegression(C=PRIOR_VARIANCE, fit_intercept=False, tol=1e-6, max_iter=1000)
    model.fit(np.concatenate([columns, columns]), labels, sample_weight=weights)
    return float(1 / (1 + np.exp(-model.coef_[0, 0])))


def describe(comparisons: Sequence[Comparison], seed: int = 0, samples: int = 500) -> dict[str, Any]:
    """All numbers of one judge on one pair of systems; those without a judged question are left at None.

    Returns:
        n (questions judged in both orders), unjudged, win, tie, lose, win_rate, length_controlled_win_rate,
        position_flip_rate, first_position_win_rate (0.5: no liking for a position), summed_scores of a and b (each
        order counts half: Table 9 of the paper), mean_length of both, categories.
    """
    judged = [comparison for comparison in comparisons if comparison.is_judged]
    result: dict[str, Any] = {"n": len(judged), "unjudged": len(comparisons) - len(judged), **_outcomes(judged, seed)}
    names = (
        "length_controlled_win_rate",
        "position_flip_rate",
        "first_position_win_rate",
        "summed_scores",
        "mean_length",
    )
    if not judged:
        return {**result, **dict.fromkeys(names), "categories": {}}
    lengths = np.array([comparison.lengths for comparison in judged], dtype=float)
    orders = [comparison.preferences() for comparison in judged]
    values = [comparison.value for comparison in judged]
    sums = np.array([[comparison.a_first, comparison.b_first] for comparison in judged], dtype=float)
    a, b = sums.mean(axis=1).sum(axis=0)
    result |= {
        "length_controlled_win_rate": length_controlled_win_rate(values, lengths[:, 0] - lengths[:, 1], seed, samples),
        "position_flip_rate": sum(comparison.is_flipped for comparison in judged) / len(judged),
        "first_position_win_rate": sum(one + 1 - other for one, other in orders) / (2 * len(judged)),
        "summed_scores": {"a": float(a), "b": float(b)},
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
    counts: dict[str, Any] = {
        name: sum(comparison.outcome == name for comparison in judged) for name in reversed(OUTCOMES)
    }
    counts["win_rate"] = win_rate([comparison.value for comparison in judged], seed) if judged else None
    return counts


def agreement(one: Sequence[Comparison], other: Sequence[Comparison]) -> dict[str, Any]:
    """How far two judges agree on the questions that both have judged.

    Returns:
        n, same (share of equal outcomes), not_contradicting (share without a win against a loss; both as in Appendix D
        of the paper) and kappa (Cohen's; None where it is not defined, since both always say the same).
    """
    try:
        from sklearn.metrics import cohen_kappa_score
    except ImportError:
        raise UserError(MISSING) from None
    theirs = {comparison.id: comparison.outcome for comparison in other if comparison.is_judged}
    pairs = [(c.outcome, theirs[c.id]) for c in one if c.is_judged and c.id in theirs]
    if not pairs:
        return {"n": 0, "same": None, "not_contradicting": None, "kappa": None}
    left, right = zip(*pairs)
    defined = len(set(left) | set(right)) > 1
    return {
        "n": len(pairs),
        "same": sum(a == b for a, b in pairs) / len(pairs),
        "not_contradicting": sum({a, b} != {"win", "lose"} for a, b in pairs) / len(pairs),
        "kappa": float(cohen_kappa_score(left, right)) if defined else None,
    }


def strengths(
    pairs: Mapping[tuple[str, str], Sequence[Comparison]], seed: int = 0, samples: int = 200
) -> dict[str, Interval]:
    """Bradley–Terry strengths of systems by ``choix``: P(i beats j) = σ(s_i − s_j), a tie is half a win for each.

    Args:
        pairs: (system a, system b) → their comparisons.
        seed, samples: of the bootstrap over questions: a question is drawn with all its pairs.

    Returns:
        System → its strength s (natural logarithm, their mean is 0) with its 95 % interval.
    """
    systems = sorted({name for pair in pairs for name in pair})
    place = {name: number for number, name in enumerate(systems)}
    by_question: dict[str, Any] = {}
    for (a, b), comparisons in pairs.items():
        for comparison in comparisons:
            if comparison.is_judged:
                wins = by_question.setdefault(comparison.id, np.zeros((len(systems), len(systems))))
                wins[place[a], place[b]] += comparison.value
                wins[place[b], place[a]] += 1 - comparison.value
    if not by_question:
        return {}
    tables = np.stack(list(by_question.values()))
    best = _fit(tables.sum(axis=0))
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(tables), size=(samples, len(tables)))
    low, high = np.quantile([_fit(tables[rows].sum(axis=0)) for rows in drawn], [0.025, 0.975], axis=0)
    return {
        name: {"mean": float(best[at]), "low": float(low[at]), "high": float(high[at])} for name, at in place.items()
    }


def _fit(wins: Any) -> Any:
    try:
        import choix
    except ImportError:
        raise UserError(MISSING) from None
    return choix.ilsr_pairwise_dense(wins, alpha=STRENGTH_PENALTY, max_iter=1000)
