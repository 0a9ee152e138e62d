"""Responses → scores: r_i = R(x, y_i).

A reward is named by its form: ``pkg.module:function`` (a function with TRL's signature), ``provided`` (the records'
own ``scores``) or ``provided:NAME`` (their ``rewards[NAME]``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import code_digest
from rrhf.records.record import Record
from rrhf.rewards.functions import RewardFunction, function_scorer, load_reward
from rrhf.rewards.judges.reward import JUDGE
from rrhf.rewards.kind import RewardContext, RewardKind, Scorer
from rrhf.rewards.provided import PROVIDED
from rrhf.rewards.source import SOURCE

__all__ = [
    "REWARDS",
    "RewardContext",
    "Rewards",
    "Scorer",
    "is_provided",
    "load_reward",
    "make_scorer",
    "reward_digest",
    "reward_name",
    "score",
    "score_records",
]

REWARDS: dict[str, RewardKind] = {  # what stands before ":" → its kind
    "judge": JUDGE,
    "provided": PROVIDED,
    "source": SOURCE,
}
FORMS = ("pkg.module:function", *(form for kind in REWARDS.values() for form in kind.forms))


def reward_name(reward: str | RewardFunction) -> str:
    """Return the name under which a reward's values stand in ``Record.rewards``."""
    if isinstance(reward, str):
        return reward
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def make_scorer(reward: str | RewardFunction, context: RewardContext | None = None) -> Scorer:
    """Return the scorer of a reward: of its name, or of a function with TRL's signature.

    Raises:
        UserError: the form is unknown (the known ones are listed), or the function cannot be found.
    """
    if not isinstance(reward, str):
        return function_scorer(reward, reward_name(reward))
    kind, colon, argument = reward.partition(":")
    if kind in REWARDS:
        return REWARDS[kind].make(argument, context or RewardContext())
    if not colon or not argument:
        raise UserError(f"reward {reward!r} has an unknown form: {nearest(reward, FORMS)}")
    return function_scorer(load_reward(reward), reward)


def is_provided(reward: str | RewardFunction) -> bool:
    """Whether a reward reads scores that stand in the records, and so has none for new texts."""
    kind = REWARDS.get(reward.partition(":")[0]) if isinstance(reward, str) else None
    return kind is not None and not kind.judges_new


def reward_digest(reward: str | RewardFunction, context: RewardContext | None = None) -> str:
    """A digest of what a reward's scores depend on; ``""`` for what records hold already and what nobody knows."""
    if not isinstance(reward, str):
        return code_digest(reward)
    name, _, argument = reward.partition(":")
    if name in REWARDS:
        return REWARDS[name].digest(argument, context or RewardContext())
    return code_digest(load_reward(reward))


class Rewards:
    """R = Σ_j w_j R_j, ready to score many times; what its rewards hold (models, servers) is held until ``close``.

    Args:
        rewards: names (see ``REWARDS`` and ``load_reward``) or functions.
        weights: w_j, one a reward; 1 each by default.
        batch_size: records whose responses one call of a reward gets.
        missing_only: keep the values that stand in ``record.rewards`` already and ask only for the others.
        context: what rewards need beside their names.

    Raises:
        UserError: a reward is unknown or named twice, or the weights do not fit.
    """

    def __init__(
        self,
        rewards: Sequence[str | RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        batch_size: int = 64,
        missing_only: bool = False,
        context: RewardContext | None = None,
    ) -> None:
        names = [reward_name(reward) for reward in rewards]
        if not names:
            raise UserError(f"no reward is named: give --reward, one of {', '.join(FORMS)}")
        if len(set(names)) < len(names):
            raise UserError(f"a reward is named twice: {', '.join(names)}")
        factors = [float(weight) for weight in weights] if weights is not None else [1.0] * len(names)
        if len(factors) != len(names) or not all(map(math.isfinite, factors)):
            raise UserError(f"reward weights {factors} for the rewards {', '.join(names)}: give one finite number each")
        if batch_size < 1:
            raise UserError(f"--batch_size {batch_size}: must be at least 1")
        self.weights, self.batch_size, self.missing_only = factors, batch_size, missing_only
        self.scorers = {name: make_scorer(reward, context) for name, reward in zip(names, rewards)}

    def score(self, records: Iterable[Record]) -> Iterator[Record]:
        """Score the responses of each record, in a stream; see ``score_records``."""
        for batch in _batches(records, self.batch_size):
            scored = batch
            for name, scorer in self.scorers.items():
                scored = _with_reward(scored, name, scorer, self.missing_only)
            for record in scored:
                columns = [record.rewards[name] for name in self.scorers] if record.responses else []
                yield replace(record, scores=[_weighted_sum(values, self.weights) for values in zip(*columns)])

    def close(self) -> None:
        """Let go of what the rewards hold."""
        for scorer in self.scorers.values():
            getattr(scorer, "close", lambda: None)()


def score_records(
    records: Iterable[Record],
    rewards: Sequence[str | RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 64,
    missing_only: bool = False,
    context: RewardContext | None = None,
) -> Iterator[Record]:
    """Score the responses of each record, in a stream: new records come out, in order; those given stay as they are.

    ``rewards[name]`` of a new record holds each reward's values, and ``scores`` their sum R = Σ_j w_j R_j, None where
    one of them is None. Other rewards that ``rewards`` of the given record holds stay in it. A record without
    responses has no scores afterwards. The arguments are those of ``Rewards``, which is for scoring many times.

    Raises:
        UserError: at once for an unknown reward or unfit weights; while iterating where a reward fails.
    """
    kept = Rewards(rewards, weights=weights, batch_size=batch_size, missing_only=missing_only, context=context)

    def scored() -> Iterator[Record]:
        try:
            yield from kept.score(records)
        finally:
            kept.close()

    return scored()


score = score_records  # the name of the stage


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _with_reward(batch: Sequence[Record], name: str, scorer: Scorer, missing_only: bool) -> list[Record]:
    """The records of ``batch`` with the reward's values, from one call of the scorer."""
    values = [_known(record, name, missing_only) for record in batch]
    missing = [(row, index) for row, known in enumerate(values) for index, value in enumerate(known) if value is None]
    for (row, index), value in zip(missing, scorer([(batch[row], index) for row, index in missing]), strict=True):
        values[row][index] = value
    return [
        replace(record, rewards={**record.rewards, name: known}) if record.responses else record
        for record, known in zip(batch, values)
    ]


def _known(record: Record, name: str, missing_only: bool) -> list[float | None]:
    values = record.rewards.get(name, [])
    if missing_only and len(values) == len(record.responses):
        return list(values)
    return [None] * len(record.responses)


def _weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Σ_j w_j R_j, rounded once: the order of the rewards cannot make two equal sums differ in their last bit."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return math.fsum(terms) if len(terms) == len(values) else None
