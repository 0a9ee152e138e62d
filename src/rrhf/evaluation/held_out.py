"""What the texts of an evaluation (``….generations.jsonl``) say beside ``evaluation.json``: intervals of each model's
mean, the gain at equal length, reward by length, and how far the rewards agree. Pure functions of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from rrhf.common.presentation import finite
from rrhf.evaluation.agreement import outcome_of, shares
from rrhf.evaluation.lengths import gain_at_equal_length, rewards_by_length
from rrhf.evaluation.metrics import mean_interval
from rrhf.evaluation.ranking import kendall_tau

MODELS = ("rho", "pi")
LARGEST_TAU = 400  # prompts from the front on which Kendall's τ is taken: it compares every two

Interval = dict[str, float]


@dataclass
class HeldOut:
    """The numbers of an evaluation's texts, in the order of the file.

    ``prompts``: id and digest of the query; ``lengths``: model → characters of each text; ``rewards``: reward → model →
    the reward of each text, None where it gave none. A model that was not evaluated has no entry.
    """

    prompts: list[tuple[str, str]] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    rewards: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of the file. Raises ``KeyError``, ``TypeError`` or ``AttributeError`` where it is none."""
        query = json.dumps(row.get("query"), sort_keys=True).encode()
        self.prompts.append((str(row.get("id", len(self.prompts))), hashlib.sha256(query).hexdigest()[:32]))
        for model in MODELS:
            if model not in row:
                continue
            self.lengths.setdefault(model, []).append(len(row[model]))
            for reward, value in (row.get(f"{model}_rewards") or {}).items():
                known = self.rewards.setdefault(reward, {}).setdefault(model, [])
                known.extend([None] * (len(self.prompts) - 1 - len(known)))
                known.append(finite(value))
        for sides in self.rewards.values():
            for known in sides.values():
                known.extend([None] * (len(self.prompts) - len(known)))

    def values(self, reward: str, model: str) -> list[float]:
        """The rewards of a model's texts that have one."""
        return [value for value in self.rewards.get(reward, {}).get(model, []) if value is not None]

    def gains(self, reward: str) -> list[float | None]:
        """R(x, π(x)) − R(x, ρ(x)) of every prompt, None where one of them is not known."""
        sides = self.rewards.get(reward, {})
        if set(MODELS) - set(sides):
            return [None] * len(self.prompts)
        return [None if a is None or b is None else b - a for a, b in zip(sides["rho"], sides["pi"], strict=True)]


def mean_of(held: HeldOut, reward: str, model: str, seed: int) -> Interval | None:
    """A model's mean reward with its 95 % bootstrap interval over prompts."""
    return mean_interval(held.values(reward, model), seed)


def matched_length(held: HeldOut, reward: str, seed: int) -> dict[str, Any] | None:
    """The gain of π over ρ by ``reward``, raw and at equal length; None where no prompt has both.

    Returns:
        ``raw`` and ``equal`` (``gain_at_equal_length``), ``lengths`` (model → mean in characters, of the prompts that
        count), ``n`` and ``bins`` (``rewards_by_length``).
    """
    places = [place for place, gain in enumerate(held.gains(reward)) if gain is not None]
    if not places:
        return None
    lengths = {model: [float(held.lengths[model][place]) for place in places] for model in MODELS}
    rewards = {model: [held.rewards[reward][model][place] or 0.0 for place in places] for model in MODELS}
    gained = [after - before for before, after in zip(rewards["rho"], rewards["pi"], strict=True)]
    longer = [after - before for before, after in zip(lengths["rho"], lengths["pi"], strict=True)]
    return {
        "raw": mean_interval(gained, seed),
        "equal": gain_at_equal_length(gained, longer, seed),
        "lengths": {model: sum(values) / len(values) for model, values in lengths.items()},
        "n": len(places),
        "bins": rewards_by_length(lengths, rewards, seed),  # type: ignore[arg-type]
    }


def rewards_agree(held: HeldOut, seed: int) -> list[dict[str, Any]]:
    """For each two rewards, how far they say the same of ρ's and π's texts.

    Returns:
        A line each two: ``rewards``; over prompts, ``same`` (share on which both prefer the same text, or neither) and
        ``not_contradicting`` (share on which they do not prefer different ones), with intervals, as Appendix D of the
        paper counts it for raters; ``tau``, Kendall's τ_b of the two gains; ``n`` prompts.
    """
    lines = []
    for one, other in combinations(held.rewards, 2):
        gains, theirs = held.gains(one), held.gains(other)
        places = [i for i, (a, b) in enumerate(zip(gains, theirs)) if a is not None and b is not None]
        if not places:
            continue
        both = [(gains[i] or 0.0, theirs[i] or 0.0) for i in places]
        labels = [(str(i), _of_texts(held, one, i), _of_texts(held, other, i)) for i in places]
        lines.append(
            {
                "rewards": (one, other),
                **shares(labels, seed),
                "tau": kendall_tau(*zip(*both[:LARGEST_TAU])) if len(both) > 2 else None,
                "n": len(both),
            }
        )
    return lines


def _of_texts(held: HeldOut, reward: str, place: int) -> str:
    """What ``reward`` says of π's text beside ρ's."""
    before, after = (held.rewards[reward][model][place] or 0.0 for model in MODELS)
    return outcome_of(after, before)


def paired_with(held: HeldOut, other: HeldOut, reward: str, seed: int) -> dict[str, float] | None:
    """How much more π of ``held`` earns than π of ``other`` on the prompts of both; None where there are none.

    A prompt of both has the same id and the same query: ids may be line numbers, which any two files share.

    Returns:
        ``mean``, ``low``, ``high`` and ``n`` prompts.
    """
    theirs = dict(zip(other.prompts, other.rewards.get(reward, {}).get("pi", []), strict=False))
    differences = [
        mine - value
        for name, mine in zip(held.prompts, held.rewards.get(reward, {}).get("pi", []), strict=False)
        if mine is not None and (value := theirs.get(name)) is not None
    ]
    interval = mean_interval(differences, seed)
    return None if interval is None else {**interval, "n": len(differences)}


def length_correlation(lengths: Sequence[float], rewards: Sequence[float | None]) -> float | None:
    """Pearson's r of reward and length over the texts that have a reward; None where one side does not vary."""
    from rrhf.records.inspection.statistics import Correlation

    found = Correlation()
    for length, reward in zip(lengths, rewards, strict=True):
        if reward is not None:
            found.add(length, reward)
    return found.result()
