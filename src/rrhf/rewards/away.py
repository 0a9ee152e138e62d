"""The steps of scoring as other processes do them: what travels there, and what is made here of what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rrhf.records.elsewhere import Answer, Away
from rrhf.records.record import Record
from rrhf.rewards.combination import Combination
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.logprob import fill_sums, logprob_model
from rrhf.rewards.scoring import Rewards
from rrhf.rewards.steps import SORTED_TOGETHER, with_values


def sums_away(name: str, model: str, context: RewardContext) -> Away:
    """Fills the records' ``rewards[name]`` with the log-probability sums of ``model``."""
    return _away([name], partial(_open_sums, name, model, context), None)


def rewards_away(names: Sequence[str], context: RewardContext, combination: Combination | None) -> Away:
    """Asks the named rewards; ``combination`` makes the scores of all where this is the last step."""
    return _away(names, partial(_open_rewards, list(names), context), combination)


def _away(names: Sequence[str], opened: Callable[[], Answer], combination: Combination | None) -> Away:
    def unite(record: Record, pieces: Sequence[Record | None]) -> Record:
        if not pieces:
            return record
        values = {name: [None if piece is None else piece.rewards[name][0] for piece in pieces] for name in names}
        return with_values(record, {**values})

    def settle(records: list[Record], counts: Counter[str]) -> list[Record]:
        return records if combination is None else [combination.score(record) for record in records]

    return Away(opened, lambda record: [record.keeping([i]) for i in range(len(record.responses))], unite, settle)


def _open_sums(name: str, model: str, context: RewardContext) -> Answer:
    held = logprob_model(model, context)

    def answer(block: list[Record], counts: Counter[str]) -> Iterator[tuple[int, Record]]:
        for start in range(0, len(block), SORTED_TOGETHER):
            yield from enumerate(fill_sums(block[start : start + SORTED_TOGETHER], name, held), start)

    return answer


def _open_rewards(names: list[str], context: RewardContext) -> Answer:
    rewards = Rewards(names, context=context)
    return lambda block, counts: enumerate(rewards.judge(block))
