"""The values of several rewards → one score a response: normalised, weighted, summed, shaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rrhf.common.errors import UserError, nearest
from rrhf.records.record import Record
from rrhf.rewards.kl import Shaping
from rrhf.rewards.normalise import NORMALISATIONS, Moments, normalised


@dataclass(frozen=True)
class Combination:
    """R = Σ_j w_j N_j(R_j), less β (s^π − s^ρ) where it is shaped; None where a part is None.

    Attributes:
        names: of the rewards, as they stand in ``Record.rewards``.
        weights: w_j.
        normalisation: N_j, each one of ``NORMALISATIONS``.
        shaping: the KL term.
    """

    names: Sequence[str]
    weights: Sequence[float]
    normalisation: Sequence[str]
    shaping: Shaping | None = None

    @property
    def over_the_data(self) -> list[str]:
        """The rewards whose moments over all responses are needed before anything can be scored."""
        return [name for name, method in self._methods if method == "data"]

    def score(self, record: Record, moments: Mapping[str, Moments] | None = None) -> Record:
        """A record with ``scores`` made of its ``rewards``, which stay as they are.

        Args:
            record: with the values of all ``names``, and the sums that ``shaping`` names.
            moments: of the rewards ``over_the_data``.
        """
        if not record.responses:
            return replace(record, scores=[])
        columns = [self._column(record, name, method, moments or {}) for name, method in self._methods]
        if len(columns) == 1:
            scores = [None if value is None else self.weights[0] * value for value in columns[0]]
        else:
            scores = [_weighted_sum(values, self.weights) for values in zip(*columns, strict=True)]
        return replace(record, scores=self.shaping.shaped(record, scores) if self.shaping else scores)

    @property
    def _methods(self) -> zip[tuple[str, str]]:
        return zip(self.names, self.normalisation, strict=True)

    def _column(self, record: Record, name: str, method: str, moments: Mapping[str, Moments]) -> Sequence[float | None]:
        values = record.rewards[name]
        if method == "none":
            return values
        return normalised(values, moments[name] if method == "data" else None)


def combination_of(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    normalisation: Sequence[str] | None = None,
    shaping: Shaping | None = None,
) -> Combination:
    """A ``Combination``, checked: weights are 1 each by default, and one normalisation is that of all rewards.

    Raises:
        UserError: numbers of weights or normalisations that do not fit, or ones that are none.
    """
    factors = [float(weight) for weight in weights] if weights is not None else [1.0] * len(names)
    if len(factors) != len(names) or not all(map(math.isfinite, factors)):
        raise UserError(f"reward weights {factors} for the rewards {', '.join(names)}: give one finite number each")
    methods = list(normalisation or ["none"])
    methods = methods * len(names) if len(methods) == 1 else methods
    if len(methods) != len(names):
        raise UserError(
            f"--reward_normalisation {' '.join(methods)} for the rewards {', '.join(names)}: give one, or one each"
        )
    for method in methods:
        if method not in NORMALISATIONS:
            raise UserError(f"--reward_normalisation {method}: {nearest(method, NORMALISATIONS)}")
    return Combination(names, factors, methods, shaping)


def _weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Σ_j w_j R_j, rounded once: the order of the rewards cannot make two equal sums differ in their last bit."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return math.fsum(terms) if len(terms) == len(values) else None
