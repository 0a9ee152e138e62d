"""Responses → scores: r_i = R(x, y_i).

A reward is named by its form: ``pkg.module:function`` (a function with TRL's signature), or what a kind in ``REWARDS``
says of its own, such as ``provided`` (the records' ``scores``) and ``logprob:MODEL``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import code_digest
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.combination import combination_of
from rrhf.rewards.functions import RewardFunction, function_scorer, load_reward
from rrhf.rewards.judges.reward import JUDGE
from rrhf.rewards.kind import RewardContext, RewardKind, Scorer
from rrhf.rewards.kl import Shaping
from rrhf.rewards.logprob import LOGPROB, LOGPROB_SUM
from rrhf.rewards.normalise import Moments
from rrhf.rewards.people import PEOPLE
from rrhf.rewards.provided import PROVIDED
from rrhf.rewards.reward_models.kind import MODEL, names_reward_model
from rrhf.rewards.source import SOURCE

__all__ = [
    "REWARDS",
    "RewardContext",
    "Rewards",
    "Scorer",
    "is_provided",
    "load_reward",
    "make_scorer",
    "may_hold_a_model",
    "opened",
    "reward_digest",
    "reward_name",
    "score",
    "score_records",
    "stays",
]

REWARDS: dict[str, RewardKind] = {  # what stands before ":" → its kind
    "judge": JUDGE,
    "provided": PROVIDED,
    "logprob": LOGPROB,
    "logprob-sum": LOGPROB_SUM,
    "model": MODEL,
    "people": PEOPLE,
    "source": SOURCE,
}
FORMS = ("pkg.module:function", *(form for kind in REWARDS.values() for form in kind.forms))
NEW_FORMS = (  # of rewards that score texts which are yet to be written
    "pkg.module:function",
    *(form for kind in REWARDS.values() if kind.judges_new for form in kind.forms),
)


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
    kind, argument = _kind(reward)
    if kind is not None:
        return kind.make(argument, context or RewardContext())
    if not reward.partition(":")[2]:
        raise UserError(f"reward {reward!r} has an unknown form: {nearest(reward, FORMS)}")
    return function_scorer(load_reward(reward), reward, cache(partial(_unknown_columns, context)))


def _unknown_columns(context: RewardContext | None) -> frozenset[str]:
    """The columns of the records that are scored which are none of ours; none where their file is not known here."""
    if context is None or context.records is None or not context.records.exists():
        return frozenset()
    return frozenset(column for record in read_records(context.records) for column in record.extra)


def _kind(reward: str) -> tuple[RewardKind | None, str]:
    """The kind of a reward and what its name says beside it; None for ``pkg.module:function`` and what is unknown."""
    name, _, argument = reward.partition(":")
    if name not in REWARDS and names_reward_model(reward):
        return REWARDS["model"], reward
    return REWARDS.get(name), argument


def is_provided(reward: str | RewardFunction) -> bool:
    """Whether a reward reads scores that stand in the records, and so has none for new texts."""
    kind = _kind(reward)[0] if isinstance(reward, str) else None
    return kind is not None and not kind.judges_new


def may_hold_a_model(reward: str) -> bool:
    """Whether a reward may hold a model or a server: none that is a function does, or reads what records bring."""
    kind = _kind(reward)[0]
    return kind is not None and kind.judges_new


def stays(reward: str) -> bool:
    """Whether a reward is asked where the command runs alone, and not on other machines."""
    kind = _kind(reward)[0]
    return kind is not None and kind.stays


def reward_digest(reward: str | RewardFunction, context: RewardContext | None = None) -> str:
    """A digest of what a reward's scores depend on; ``""`` for what records hold already and what nobody knows."""
    if not isinstance(reward, str):
        return code_digest(reward)
    kind, argument = _kind(reward)
    if kind is not None:
        return kind.digest(argument, context or RewardContext())
    return code_digest(load_reward(reward))


class Rewards:
    """R = Σ_j w_j R_j, ready to score many times; what its rewards hold (models, servers) is held until ``close``.

    Args:
        rewards: names (see ``REWARDS`` and ``load_reward``) or functions.
        weights: w_j, one a reward; 1 each by default.
        normalisation: of each reward before it is weighted, or one for all (``NORMALISATIONS``); "none" by default.
        moments: of the rewards that are normalised over the data (``data_moments``), by their names.
        shaping: the KL term that is taken off the sum, of columns that the records have.
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
        normalisation: Sequence[str] | None = None,
        moments: Mapping[str, Moments] | None = None,
        shaping: Shaping | None = None,
        batch_size: int = 64,
        missing_only: bool = False,
        context: RewardContext | None = None,
    ) -> None:
        names = [reward_name(reward) for reward in rewards]
        if not names:
            raise UserError(f"no reward is named: give --reward, one of {', '.join(FORMS)}")
        if len(set(names)) < len(names):
            raise UserError(f"a reward is named twice: {', '.join(names)}")
        if batch_size < 1:
            raise UserError(f"--batch_size {batch_size}: must be at least 1")
        self.combination = combination_of(names, weights, normalisation, shaping)
        self.moments, self.batch_size, self.missing_only = moments, batch_size, missing_only
        self.scorers = {name: make_scorer(reward, context) for name, reward in zip(names, rewards)}

    def score(self, records: Iterable[Record]) -> Iterator[Record]:
        """Score the responses of each record, in a stream; see ``score_records``."""
        missing = [name for name in self.combination.over_the_data if name not in (self.moments or {})]
        if missing:
            raise UserError(
                f"rewards {', '.join(missing)} are to be normalised over the data, whose moments are not known here: "
                "give the normalisation query, or score a file with `rrhf score`"
            )
        for record in self.judge(records):
            yield self.combination.score(record, self.moments)

    def judge(self, records: Iterable[Record], names: Iterable[str] | None = None) -> Iterator[Record]:
        """The records with the values of each reward, or of those with these ``names``, in ``rewards``; in a stream."""
        asked = list(self.scorers if names is None else names)
        for batch in _batches(records, self.batch_size):
            judged = batch
            for name in asked:
                judged = _with_reward(judged, name, self.scorers[name], self.missing_only)
            yield from judged

    def close(self) -> None:
        """Let go of what the rewards hold."""
        for scorer in self.scorers.values():
            getattr(scorer, "close", lambda: None)()


@contextmanager
def opened(rewards: Sequence[str | RewardFunction] | Rewards, **options: Any) -> Iterator[Rewards]:
    """``rewards`` as they are where they are ``Rewards`` already; else made, with these options, and closed again."""
    if isinstance(rewards, Rewards):
        yield rewards
        return
    made = Rewards(rewards, **options)
    try:
        yield made
    finally:
        made.close()


def score_records(
    records: Iterable[Record],
    rewards: Sequence[str | RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    normalisation: Sequence[str] | None = None,
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
    kept = Rewards(
        rewards,
        weights=weights,
        normalisation=normalisation,
        batch_size=batch_size,
        missing_only=missing_only,
        context=context,
    )

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
