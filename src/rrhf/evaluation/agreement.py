"""How far those who compare responses agree: the two shares of Appendix D of the paper, Cohen's κ, Krippendorff's α.

They are people, judges and reward models alike: all of them say win, tie or lose of the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.imports import of_extra
from rrhf.common.scores import score_levels
from rrhf.evaluation.metrics import paired_bootstrap
from rrhf.rewards.people import krippendorff_alpha

OUTCOMES = ("lose", "tie", "win")
MISSING = "comparisons need scikit-learn, choix and krippendorff: pip install 'rrhf[judging]'"

Label = tuple[str, str, str]  # the query that was asked about, what the one said, what the other said


def outcome_of(a: float, b: float) -> str:
    """What two scores say of the first response; equal are those of ``rrhf.common.scores``."""
    one, other = score_levels((a, b))
    return OUTCOMES[1 + (one > other) - (one < other)]


def value_of(outcome: str) -> float:
    """An outcome as a number: 1 for a win, 0.5 for a tie, 0 for a loss."""
    return OUTCOMES.index(outcome) / 2


def agreement(labels: Sequence[Label], seed: int = 0, samples: int = 10_000) -> dict[str, Any]:
    """How far two agree.

    Args:
        labels: of what both have judged.
        seed, samples: of the bootstrap.

    Returns:
        n; same (share of equal outcomes) and not_contradicting (share without a win against a loss), means over queries
        with 95 % bootstrap intervals over queries, None without a label; kappa (Cohen's; None where it is not defined,
        since both always say the same one thing).

    Raises:
        UserError: scikit-learn is not installed.
    """
    if not labels:
        return {"n": 0, "same": None, "not_contradicting": None, "kappa": None}
    kappa = cohen_kappa([(one, other) for _, one, other in labels])
    return {"n": len(labels), **shares(labels, seed, samples), "kappa": kappa}


def shares(labels: Sequence[Label], seed: int = 0, samples: int = 10_000) -> dict[str, dict[str, float]]:
    """``same`` and ``not_contradicting`` of at least one label, each query with equal weight."""
    same: dict[str, list[float]] = {}
    harmless: dict[str, list[float]] = {}
    for query, one, other in labels:
        same.setdefault(query, []).append(one == other)
        harmless.setdefault(query, []).append({one, other} != {"win", "lose"})
    return {
        name: paired_bootstrap([sum(values) / len(values) for values in by_query.values()], seed, samples)
        for name, by_query in (("same", same), ("not_contradicting", harmless))
    }


def cohen_kappa(labels: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's κ = (p_same − p_chance) / (1 − p_chance), nominal; None where both always say the same one thing."""
    metrics = of_extra("sklearn.metrics", MISSING)
    if len({label for pair in labels for label in pair}) < 2:
        return None
    left, right = zip(*labels)
    return float(metrics.cohen_kappa_score(left, right))


def outcome_alpha(units: Sequence[Mapping[str, str]]) -> dict[str, float | None]:
    """Krippendorff's α of outcomes: nominal, and ordinal, for which a tie lies between a win and a loss.

    Args:
        units: of each thing judged, rater → outcome.

    Raises:
        UserError: krippendorff is not installed.
    """
    values = [{rater: value_of(outcome) for rater, outcome in unit.items()} for unit in units]
    try:
        return {level: krippendorff_alpha(values, level) for level in ("nominal", "ordinal")}
    except ModuleNotFoundError:
        raise UserError(MISSING) from None
