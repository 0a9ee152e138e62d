"""Rows of other trainers as training data: the query is where the row has it."""

from __future__ import annotations

import pytest

from rrhf.common.errors import UserError
from rrhf.models.tokenization import TextFormat
from rrhf.training.dataset import EncodedRecords
from support.models import tiny_tokenizer

PAIR = {"chosen": "The sum is 3.", "rejected": "The sum is 4."}


def test_preference_rows_train_with_the_query_that_they_name() -> None:
    tokenizer = tiny_tokenizer()
    rows = [PAIR, {"instruction": "Add.", "input": "1 2", **PAIR}]
    shared, named = EncodedRecords(rows, TextFormat(tokenizer), 192)
    assert tokenizer.decode(shared.query) == "The sum is"
    assert "Add.\n\n1 2" in tokenizer.decode(named.query)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in named.responses] == [*PAIR.values()]
    with pytest.raises(UserError, match="row 0: chosen and rejected with `input`"):
        EncodedRecords([{"input": "1 2", **PAIR}], TextFormat(tokenizer), 192)
