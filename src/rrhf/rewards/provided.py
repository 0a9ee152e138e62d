"""The scores that a data set already has."""

from __future__ import annotations

from collections.abc import Sequence

from rrhf.common.errors import UserError
from rrhf.records.record import Record
from rrhf.rewards.kind import Item, RewardContext, RewardKind, Scorer


def provided_scorer(argument: str, context: RewardContext) -> Scorer:
    """Return the scorer of ``provided`` (the records' ``scores``) or ``provided:NAME`` (their ``rewards[NAME]``).

    Raises (the scorer):
        UserError: a record has none.
    """

    def scores(items: Sequence[Item]) -> list[float | None]:
        return [_values(record, argument)[index] for record, index in items]

    return scores


def _values(record: Record, argument: str) -> list[float | None]:
    if argument:
        if argument not in record.rewards:
            raise UserError(
                f"record {record.id!r} has no rewards {argument!r} (it has {', '.join(record.rewards) or 'none'}): "
                "name one it has, or a function pkg.module:function"
            )
        return record.rewards[argument]
    # Scored before, `scores` may be a sum in which the provided ones are a part: they are kept under their name.
    values = record.rewards.get("provided") or record.scores
    if not values:
        raise UserError(
            f"record {record.id!r} has no scores to take: "
            "give them in the file, or score with --reward pkg.module:function"
        )
    return values


PROVIDED = RewardKind(("provided", "provided:NAME"), provided_scorer, lambda argument, context: "", judges_new=False)
