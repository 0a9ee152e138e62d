"""The reward ``source:TAG``: 1 for the response that comes from there, none for the others.

With ``ranking_loss: none`` a policy is fitted on that source's responses alone, as the arm that RRHF is compared with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rrhf.common.errors import UserError
from rrhf.records.sources import JOIN
from rrhf.rewards.kind import Item, RewardContext, RewardKind, Scorer

log = logging.getLogger("rrhf")


def source_scorer(argument: str, context: RewardContext) -> Scorer:
    """Return the scorer of ``source:TAG``; a response merged of several sources bears all their tags.

    Raises:
        UserError: no tag is given.
    """
    if not argument:
        raise UserError("reward 'source:': give the tag that stands in the records' sources, as source:human/chosen")

    found_once = False

    def scores(items: Sequence[Item]) -> list[float | None]:
        nonlocal found_once
        found: list[float | None] = [
            1.0 if argument in record.sources[index].split(JOIN) else None for record, index in items
        ]
        # Those of other records may have it, and which records come together must not matter.
        if items and not found_once and not any(found):
            tags = sorted({tag for record, index in items for tag in record.sources[index].split(JOIN)})
            log.warning(
                f"reward source:{argument}: none of {len(items)} responses has this source; there are "
                f"{', '.join(tags[:20])}"
            )
        found_once = found_once or any(found)
        return found

    return scores


SOURCE = RewardKind(("source:TAG",), source_scorer, lambda argument, context: "", judges_new=False)
