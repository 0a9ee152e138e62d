"""The reward that takes one source's responses: a score for those, none for the others."""

from __future__ import annotations

import pytest

from rrhf.common.errors import UserError
from rrhf.records.record import Record
from rrhf.rewards.scoring import is_provided, score_records

RECORD = Record("q", ["a", "b", "c"], ["system/one", "human/0|system/two", "system/two-b"], id="r")


def test_the_responses_of_a_source_are_the_only_ones_with_a_score() -> None:
    (scored,) = score_records([RECORD], ["source:system/two"])
    assert scored.scores == [None, 1.0, None]
    assert is_provided("source:system/two")  # new texts come from no such source


def test_a_source_that_no_response_has() -> None:
    with pytest.raises(UserError, match="one of human/0, system/one, system/two, system/two-b"):
        list(score_records([RECORD], ["source:system/thre"]))
    with pytest.raises(UserError, match="give the tag"):
        score_records([], ["source:"])
