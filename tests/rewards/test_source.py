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


@pytest.mark.parametrize("batch_size", [1, 2])
def test_which_records_come_together_does_not_matter(batch_size: int) -> None:
    others = Record("p", ["d"], ["system/one"], id="s")
    scored = score_records([others, RECORD], ["source:system/two"], batch_size=batch_size)
    assert [record.scores for record in scored] == [[None], [None, 1.0, None]]


def test_a_source_that_no_response_has(caplog: pytest.LogCaptureFixture) -> None:
    (scored,) = score_records([RECORD], ["source:system/thre"])
    assert scored.scores == [None] * 3
    assert "there are human/0, system/one, system/two, system/two-b" in caplog.text
    with pytest.raises(UserError, match="give the tag"):
        score_records([], ["source:"])
