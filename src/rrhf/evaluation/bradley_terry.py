"""Strengths of systems from who beat whom: the Bradley–Terry model, fitted by ``choix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rrhf.common.imports import of_extra
from rrhf.evaluation.agreement import MISSING

PENALTY = 0.1  # alpha of choix: as if each system had won and lost a little against each other

Game = tuple[str, str, float]  # system a, system b, and 1 where a won, 0.5 for a tie, 0 where b won


def bradley_terry(
    games: Mapping[str, Sequence[Game]], seed: int = 0, samples: int = 200, level: float = 0.95
) -> dict[str, dict[str, float]]:
    """Bradley–Terry strengths: P(i beats j) = σ(s_i − s_j), a tie is half a win for each.

    Args:
        games: query → the games on it.
        seed, samples: of the bootstrap over queries: a query is drawn with all its games.
        level: the intervals' coverage, between 0 and 1.

    Returns:
        System → its strength s (natural logarithm, their mean is 0) with its interval. Systems that were never
        compared, not even by way of others (``unlinked``), have strengths that say nothing of each other.

    Raises:
        UserError: choix is not installed.
    """
    systems = sorted({name for played in games.values() for a, b, _ in played for name in (a, b)})
    if not systems:
        return {}
    place = {name: number for number, name in enumerate(systems)}
    tables = np.zeros((len(games), len(systems), len(systems)))
    for table, played in zip(tables, games.values()):
        for a, b, value in played:
            table[place[a], place[b]] += value
            table[place[b], place[a]] += 1 - value
    best = _fit(tables.sum(axis=0))
    generator = np.random.default_rng(seed)
    # How often each query is drawn, instead of the queries themselves: no copy of the tables a sample.
    drawn = generator.multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=samples)
    fits = [_fit(np.tensordot(counts, tables, axes=1), best) for counts in drawn]
    low, high = np.quantile(fits, [(1 - level) / 2, (1 + level) / 2], axis=0) if fits else (best, best)
    return {
        name: {"mean": float(best[at]), "low": float(low[at]), "high": float(high[at])} for name, at in place.items()
    }


def _fit(wins: Any, start: Any = None) -> Any:
    choix = of_extra("choix", MISSING)
    return choix.ilsr_pairwise_dense(wins, alpha=PENALTY, initial_params=start, max_iter=1000)


def unlinked(games: Mapping[str, Sequence[Game]]) -> list[list[str]]:
    """The groups of systems that comparisons link, where there is more than one; their strengths are told apart."""
    groups: list[set[str]] = []
    for played in games.values():
        for a, b, _ in played:
            joined = [group for group in groups if a in group or b in group]
            groups = [group for group in groups if group not in joined] + [set().union({a, b}, *joined)]
    return sorted(map(sorted, groups)) if len(groups) > 1 else []
