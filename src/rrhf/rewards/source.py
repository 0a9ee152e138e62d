"""The reward ``source:TAG``: 1 for the response that comes from there, none for the others.

With ``ranking_loss: none`` a policy is fitted on that source's responses alone, as the arm that RRHF is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

from rrhf.common.errors import UserError
from rrhf.records.sources import JOIN
from rrhf.rewards.kind import Item, RewardContext, RewardKind, Scorer


def source_scorer(argument: str, context: RewardContext) -> Scorer:
    """Return the scorer of ``source:TAG``; a response merged of several sources bears all their tags.

    Raises:
        UserError: no tag is given; (the scorer) no response at all has it.
    """
    if not argument:
        raise UserError("reward 'source:': give the tag that stands in the records' sources, as source:human/chosen")

    def scores(items: Sequence[Item]) -> list[float | None]:
        found: list[float | None] = [
            1.0 if argument in record.sources[index].split(JOIN) else None for record, index in items
        ]
        if items and not any(found):
            tags = sorted({tag for record, index in items for tag in record.sources[index].split(JOIN)})
            raise UserError(
                f"reward source:{argument}: none of {len(items)} responses has this source: name one of "
                f"{', '.join(tags[:20])}"
            )
        return found

    return scores


SOURCE = RewardKind(("source:TAG",), source_scorer, lambda argument, context: "", judges_new=False)
