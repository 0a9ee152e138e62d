"""Responses → scores: r_i = R(x, y_i).

A reward is named by its form: ``pkg.module:function`` (a function with TRL's signature), ``provided`` (the records'
own ``scores``) or ``provided:NAME`` (their ``rewards[NAME]``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import code_digest
from rrhf.records.record import Record
from rrhf.rewards.functions import RewardFunction, Scorer, function_scorer, load_reward
from rrhf.rewards.provided import provided_scorer

__all__ = [
    "REWARDS",
    "Scorer",
    "is_provided",
    "load_reward",
    "make_scorer",
    "reward_digest",
    "reward_name",
    "score",
    "score_records",
]

REWARDS: dict[str, Callable[[str], Scorer]] = {"provided": provided_scorer}  # what stands before ":" → its scorer
FORMS = ("pkg.module:function", "provided", "provided:NAME")


def reward_name(reward: str | RewardFunction) -> str:
    """Return the name under which a reward's values stand in ``Record.rewards``."""
    if isinstance(reward, str):
        return reward
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def make_scorer(reward: str | RewardFunction) -> Scorer:
    """Return the scorer of a reward: of its name, or of a function with TRL's signature.

    Raises:
        UserError: the form is unknown (the known ones are listed), or the function cannot be found.
    """
    if not isinstance(reward, str):
        return function_scorer(reward, reward_name(reward))
    kind, colon, argument = reward.partition(":")
    if kind in REWARDS:
        return REWARDS[kind](argument)
    if not colon or not argument:
        raise UserError(f"reward {reward!r} has an unknown form: {nearest(reward, FORMS)}")
    return function_scorer(load_reward(reward), reward)


def is_provided(reward: str | RewardFunction) -> bool:
    """Whether a reward reads scores that stand in the records, and so has none for new texts."""
    return isinstance(reward, str) and reward.partition(":")[0] == "provided"


def reward_digest(reward: str | RewardFunction) -> str:
    """The digest of a reward function's code; ``""`` for what records hold already."""
    if isinstance(reward, str):
        return "" if reward.partition(":")[0] in REWARDS else code_digest(load_reward(reward))
    return code_digest(reward)


def score_records(
    records: Iterable[Record],
    rewards: Sequence[str | RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 64,
    missing_only: bool = False,
) -> Iterator[Record]:
    """Score the responses of each record, in a stream: new records come out, in order; those given stay as they are.

    ``rewards[name]`` of a new record holds each reward's values, and ``scores`` their sum R = Σ_j w_j R_j, None where
    one of them is None. Other rewards that ``rewards`` of the given record holds stay in it.

    Args:
        records: records with responses; one without has no scores afterwards.
        rewards: names (see ``REWARDS`` and ``load_reward``) or functions.
        weights: w_j, one a reward; 1 each by default.
        batch_size: records whose responses one call of a reward gets.
        missing_only: keep the values that stand in ``record.rewards`` already and ask only for the others.

    Raises:
        UserError: at once for an unknown reward or unfit weights; while iterating where a reward fails.
    """
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
    scorers = {name: make_scorer(reward) for name, reward in zip(names, rewards)}
    return _score(records, scorers, factors, batch_size, missing_only)


score = score_records  # the name of the stage


def _score(
    records: Iterable[Record], scorers: dict[str, Scorer], weights: list[float], batch_size: int, missing_only: bool
) -> Iterator[Record]:
    for batch in _batches(records, batch_size):
        scored = batch
        for name, scorer in scorers.items():
            scored = _with_reward(scored, name, scorer, missing_only)
        for record in scored:
            columns = [record.rewards[name] for name in scorers] if record.responses else []
            yield replace(record, scores=[_weighted_sum(values, weights) for values in zip(*columns)])


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
