"""Responses → scores: r_i = R(x, y_i).

A reward is named by its form: ``pkg.module:function`` (a function with TRL's signature), ``provided`` (the records'
own ``scores``) or ``provided:NAME`` (their ``rewards[NAME]``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from rrhf.common.errors import UserError, nearest
from rrhf.records.record import Record
from rrhf.rewards.functions import Item, RewardFunction, Scorer, function_scorer, load_reward
from rrhf.rewards.provided import provided_scorer

__all__ = ["REWARDS", "Scorer", "load_reward", "make_scorer", "reward_name", "score", "score_records"]

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


def score_records(
    records: Iterable[Record],
    rewards: Sequence[str | RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 64,
    missing_only: bool = False,
) -> Iterator[Record]:
    """Score the responses of each record, in a stream: the records come out changed and in order.

    ``record.rewards[name]`` gets each reward's values, and ``record.scores`` their sum R = Σ_j w_j R_j, None where
    one of them is None. Rewards that other runs left in ``record.rewards`` stay.

    Args:
        records: records with responses; one without comes out as it is.
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
        for name, scorer in scorers.items():
            _fill(batch, name, scorer, missing_only)
        for record in batch:
            columns = [record.rewards[name] for name in scorers] if record.responses else []
            record.scores = [_weighted_sum(values, weights) for values in zip(*columns)]
        yield from batch


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _fill(batch: list[Record], name: str, scorer: Scorer, missing_only: bool) -> None:
    known = {id(record): _known(record, name, missing_only) for record in batch}
    items: list[Item] = [(r, i) for r in batch for i, value in enumerate(known[id(r)]) if value is None]
    for (record, index), value in zip(items, scorer(items), strict=True):
        known[id(record)][index] = value
    for record in batch:
        if record.responses:
            record.rewards[name] = known[id(record)]


def _known(record: Record, name: str, missing_only: bool) -> list[float | None]:
    values = record.rewards.get(name, [])
    if missing_only and len(values) == len(record.responses):
        return list(values)
    return [None] * len(record.responses)


def _weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        if value is None:
            return None
        total += weight * value
    return total
