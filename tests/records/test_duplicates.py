from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from rrhf.records.duplicates import merge_duplicates
from rrhf.records.inspection import inspect_records
from rrhf.records.record import Record, record_from_row, record_to_row
from rrhf.records.sources import source_names


def test_merges_into_the_first_and_keeps_all_that_is_known() -> None:
    record = Record(
        query="q",
        responses=["a", "b", "a", " \n", "a", "c"],
        sources=["top-p/0", "top-p/1", "diverse-beam/2", "top-p/2", "human/chosen", "top-p/3"],
        finish=["length", "length", "stop", "stop", "length", "stop"],
        scores=[None, 0.5, 0.7, 9.0, 0.8, None],
        rewards={"r": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
        id="x",
        extra={"topic": "t"},
    )
    before = json.dumps(record_to_row(record))
    merged, duplicates, empty = merge_duplicates(record)
    assert (duplicates, empty) == (2, 1)
    assert merged == Record(
        query="q",
        responses=["a", "b", "c"],
        sources=["top-p/0|diverse-beam/2|human/chosen", "top-p/1", "top-p/3"],
        finish=["stop", "length", "stop"],
        scores=[0.7, 0.5, None],
        rewards={"r": [1.0, 2.0, 6.0]},
        id="x",
        extra={"topic": "t"},
    )
    assert json.dumps(record_to_row(record)) == before  # the record that came in is untouched


def test_inspection_counts_a_merged_response_for_each_of_its_sources() -> None:
    assert source_names("top-p/0|top-p/3|diverse-beam/1|human/chosen") == ["top-p", "diverse-beam", "human/chosen"]
    record = Record(
        query="q",
        responses=["a", "a", "b", "c"],
        sources=["top-p/0", "beam/0", "top-p/1", "beam/1"],
        scores=[3.0, 3.0, 1.0, 2.0],
    )
    result = inspect_records([merge_duplicates(record)[0]])
    assert result["responses"] == 3
    assert {name: row["responses"] for name, row in result["diversity"]["by_source"].items()} == {"top-p": 2, "beam": 2}
    assert {name: row["mean"] for name, row in result["scores_by_source"].items()} == {"top-p": 2.0, "beam": 2.5}
    assert {name: row["win_share"] for name, row in result["scores_by_source"].items()} == {"top-p": 1.0, "beam": 1.0}


def test_texts_that_differ_in_white_space_are_different() -> None:
    record = Record(query="q", responses=["a", "a ", "A"])
    assert merge_duplicates(record) == (record, 0, 0)


def test_a_source_is_named_once_however_often_it_is_merged() -> None:
    record = Record(query="q", responses=["a", "a", "a"], sources=["x/0|y/0", "y/0", "x/1"])
    merged, duplicates, _ = merge_duplicates(record)
    assert (merged.sources, duplicates) == (["x/0|y/0|x/1"], 2)


def test_nothing_is_left_of_empty_responses_alone() -> None:
    record = Record(query="q", responses=["", "\t"], scores=[1.0, 2.0], rewards={"r": [1.0, 2.0]})
    merged, duplicates, empty = merge_duplicates(record)
    assert (duplicates, empty) == (0, 2)
    assert (merged.responses, merged.sources, merged.finish, merged.scores, merged.rewards) == ([], [], [], [], {})


@given(st.lists(st.tuples(st.sampled_from(["", " ", "a", "b", "c"]), st.sampled_from(["stop", "length"]))))
def test_is_a_valid_record_without_duplicates_and_merging_again_changes_nothing(rows: list[tuple[str, str]]) -> None:
    record = Record(query="q", responses=[text for text, _ in rows], finish=[finish for _, finish in rows])
    merged, duplicates, empty = merge_duplicates(record)
    assert len(merged.responses) + duplicates + empty == len(rows)
    assert empty == sum(not text.strip() for text, _ in rows)
    assert len(set(merged.responses)) == len(merged.responses)
    named = [tag for tags in merged.sources for tag in tags.split("|")]
    assert sorted(named) == sorted(
        tag for tag, text in zip(record.sources, record.responses, strict=True) if text.strip()
    )
    row = record_to_row(merged)
    assert record_from_row(row, "here", require="responses" if merged.responses else "query") == merged
    assert merge_duplicates(merged) == (merged, 0, 0)
