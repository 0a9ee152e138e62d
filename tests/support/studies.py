"""Studies with raters of known minds, for the tests of results: 330 pairs of three systems, laid out as in Appendix D.

``human`` raters agree with each other as the paper's do: the same label on 57.5 % of pairs, no contradiction on 85.9 %
(57.7 and 84.4 there), over 200,000 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from rrhf.arena.votes import Choice, Vote

SYSTEMS = ("rrhf", "ppo", "good")
PAIRS = (("rrhf", "good"), ("rrhf", "ppo"), ("ppo", "good"))

# What a rater thinks of a pair (a, b): its number, then 1, 0.5 or 0 of a.
Mind = Callable[[np.random.Generator, str, str, int], float]


def human(seed: int, advantage: float = 0.3) -> Mind:
    """A mind that sees each pair's true difference N(±advantage, 1) with an error N(0, 0.8²); below 0.3 it is a tie."""

    def mind(draw: np.random.Generator, a: str, b: str, pair: int) -> float:
        true = np.random.default_rng([seed, pair]).normal(advantage * (1 if a == "rrhf" else -1))
        seen = true + draw.normal(0, 0.8)
        return 0.5 if abs(seen) < 0.3 else float(seen > 0)

    return mind


def by_strengths(strengths: dict[str, float], ties: float = 0.4) -> Mind:
    """A mind whose mean value of a is σ(s_a − s_b): so Bradley–Terry with a tie as half a win holds."""

    def mind(draw: np.random.Generator, a: str, b: str, pair: int) -> float:
        win = 1 / (1 + np.exp(strengths[b] - strengths[a]))
        tie = ties * 2 * min(win, 1 - win)
        return float(draw.choice([1.0, 0.5, 0.0], p=[win - tie / 2, tie, 1 - win - tie / 2]))

    return mind


def careless(draw: np.random.Generator, a: str, b: str, pair: int) -> float:
    """A mind that does not read."""
    return float(draw.choice([1.0, 0.5, 0.0]))


def study(minds: dict[str, Mind], seed: int, *, common: int = 30, own: int = 100, checks: int = 5) -> list[Vote]:
    """The votes of a study in which every rater sees the common pairs and the checks, and each other pair one rater.

    ``careless`` raters fail a check two times out of three, the others one time out of twenty.
    """
    votes = []
    for number, (rater, mind) in enumerate(minds.items()):
        draw = np.random.default_rng([seed, 7, number])
        mine = [*range(common), *range(common + number * own, common + (number + 1) * own)]
        for pair in mine:
            a, b = PAIRS[pair % 3]
            votes.append(_vote(draw, rater, a, b, pair, mind(draw, a, b, pair), common=pair < common))
        for check in range(checks):
            failure = 2 / 3 if mind is careless else 0.05
            said = (0.0 if draw.random() < 0.5 else 0.5) if draw.random() < failure else 1.0
            votes.append(_vote(draw, rater, *PAIRS[check % 3], 10_000 + check, said, spoilt="b"))
    return votes


def _vote(draw: np.random.Generator, rater: str, a: str, b: str, pair: int, value: float, **more: Any) -> Vote:
    turned = bool(draw.random() < 0.5)
    left, right = (b, a) if turned else (a, b)
    choices: tuple[Choice, Choice, Choice] = ("left", "tie", "right")
    choice = choices[int((value if turned else 1 - value) * 2)]
    spoilt: Literal["left", "right"] | None = None
    if more.pop("spoilt", None) is not None:
        spoilt = "left" if turned else "right"
    return Vote(rater, f"p{pair}", f"q{pair}", left, right, choice, "", float(pair), more.get("common", False), spoilt)
