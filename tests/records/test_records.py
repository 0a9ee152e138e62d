"""The record: what comes in is checked, what goes out comes back."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrhf.common.errors import UserError
from rrhf.records.duplicates import merge_duplicates
from rrhf.records.files import count_records, read_records, write_records
from rrhf.records.ids import Ids
from rrhf.records.record import Record, content_id, query_text, record_from_row, record_to_row

CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]


def lines(path: Path, *rows: Any) -> Path:
    """Write rows as JSON lines; text goes in as it is."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read_records(path, **options))
    return str(caught.value)


# --- round trips -------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
filled = texts.filter(lambda text: bool(text.strip()))
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | numbers | texts | st.just(""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
messages = st.lists(
    st.fixed_dictionaries({"role": texts, "content": filled}, optional={"name": texts}), min_size=1, max_size=3
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    k = draw(st.integers(0, 3))

    def column(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(values, min_size=k, max_size=k))

    scores = column(st.none() | numbers) if draw(st.booleans()) else []
    rewards = {name: column(st.none() | numbers) for name in draw(st.lists(texts, max_size=2, unique=True))}
    extra = draw(
        st.dictionaries(
            st.sampled_from(["label", "weight", "tags", "meta", "é "]) | texts.map(lambda name: "x" + name),
            json_values,
            max_size=3,
        )
    )
    return Record(
        query=draw(filled | messages),
        responses=column(filled),
        sources=column(texts),
        finish=column(st.sampled_from(["stop", "length"])),
        scores=scores,
        rewards=rewards,
        extra=extra,
    )


def numbered(values: list[Record]) -> list[Record]:
    for index, record in enumerate(values):
        record.id = f"{record.id}/{index}"
    return values


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records(), min_size=1, max_size=5).map(numbered))
def test_jsonl_to_parquet_to_jsonl_gives_equal_records(tmp_path: Path, before: list[Record]) -> None:
    first, parquet, last = (tmp_path / name for name in ("a.jsonl", "a.parquet", "b.jsonl.gz"))
    assert write_records(first, before, overwrite=True) == len(before)
    assert list(read_records(first)) == before
    write_records(parquet, read_records(first), overwrite=True)
    write_records(last, read_records(parquet), overwrite=True)
    after = list(read_records(last))
    assert after == before
    # Equality of numbers hides their types; JSON does not.
    assert [json.dumps(record.extra, sort_keys=True) for record in after] == [
        json.dumps(record.extra, sort_keys=True) for record in before
    ]


def test_parquet_keeps_plain_types_where_all_values_share_one(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = [
        Record(query="a", responses=["x"], scores=[1.0], rewards={"f": [1.0]}, extra={"label": 1, "mixed": "t"}),
        Record(query="b", responses=["y", "z"], rewards={"g": [None, 2.0]}, extra={"mixed": 2}),
    ]
    write_records(tmp_path / "a.parquet", rows)
    types = {column.name: str(column.type) for column in pq.read_schema(tmp_path / "a.parquet")}
    assert types["query"] == "string" and types["label"] == "int64" and types["mixed"] == "string"
    assert types["scores"].startswith("list<") and "double" in types["scores"]
    assert types["rewards"].startswith("struct<f: list<")
    assert list(read_records(tmp_path / "a.parquet")) == rows


def test_parquet_has_row_groups_and_streams_over_them(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "many.parquet"
    assert write_records(path, (Record(query=f"q{i}") for i in range(2500))) == 2500
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [record.query for record in read_records(path)] == [f"q{i}" for i in range(2500)]
    assert count_records(path) == 2500


def test_parquet_of_other_tools_is_read(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "query": ["a", "b"],
            "responses": [["x"], ["y"]],
            "scores": pa.array([[0.5], None]),
            "rewards": pa.array([[("f", [0.5])], None], pa.map_(pa.string(), pa.list_(pa.float32()))),
            "weight": [1.0, math.nan],
            "day": [datetime.date(2020, 1, 2), None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = read_records(tmp_path / "a.parquet")
    assert first.rewards == {"f": [0.5]} and first.extra == {"weight": 1.0, "day": "2020-01-02"}
    assert second.scores == [] and second.rewards == {} and second.extra == {"weight": None, "day": None}


def test_fields_come_in_the_fixed_order_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    record = record_from_row(
        {"who": "é", "rewards": {"f": [2]}, "scores": [1], "responses": ["é"], "query": "ü", "id": "7"}, "row"
    )
    assert list(record_to_row(record)) == ["id", "query", "responses", "sources", "finish", "scores", "rewards", "who"]
    assert list(record_to_row(Record(query="ü"))) == ["id", "query"]
    write_records(tmp_path / "a.jsonl", [record])
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert text == (
        '{"id": "7", "query": "ü", "responses": ["é"], "sources": ["provided/0"], "finish": ["stop"], '
        '"scores": [1.0], "rewards": {"f": [2.0]}, "who": "é"}\n'
    )


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    rows = [Record(query=f"q{i}", responses=["a", "b"], extra={"n": i}) for i in range(50)]
    for suffix in (".jsonl.gz", ".parquet"):
        for name in ("a", "b"):
            write_records(tmp_path / f"{name}{suffix}", iter(rows))
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


# --- what is taken as it stands ----------------------------------------------------------------------------------


def test_rows_of_the_released_code_are_valid(tmp_path: Path) -> None:
    row = {"query": "Human: hi", "responses": ["a", "b", "c"], "scores": [0, -1.5, 2e-3]}
    for name in ("a.jsonl", "a.json"):
        (record,) = read_records(lines(tmp_path / name, row), require="scores")
        assert record.scores == [0.0, -1.5, 0.002]
        assert record.sources == ["provided/0", "provided/1", "provided/2"]
        assert record.finish == ["stop"] * 3
        assert record.id == content_id("Human: hi")


def test_json_list_blank_lines_bom_and_line_separators(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"query": "a"}, {"query": "b"}], indent=1))
    assert [record.query for record in read_records(tmp_path / "a.json")] == ["a", "b"]
    (tmp_path / "b.jsonl").write_bytes(
        b'\xef\xbb\xbf{"query": "a"}\r\n\r\n  \n' + '{"query": "b\u2028c"}'.encode()  # no newline at the end
    )
    assert [record.query for record in read_records(tmp_path / "b.jsonl")] == ["a", "b\u2028c"]
    assert count_records(tmp_path / "b.jsonl") == 2


def test_null_fields_are_absent_fields() -> None:
    row = {"query": "q", "responses": ["a"], "sources": None, "finish": None, "scores": None, "rewards": {"f": None}}
    record = record_from_row({**row, "id": None}, "row")
    assert record == Record(query="q", responses=["a"])


def test_content_id_depends_on_the_query_alone() -> None:
    assert content_id("a") == content_id("a") != content_id("b")
    assert content_id("Hi") != content_id([{"role": "user", "content": "Hi"}])
    turned = [{"content": message["content"], "role": message["role"]} for message in CHAT]
    assert content_id(CHAT) == content_id(turned)  # the order of keys says nothing
    assert len(content_id("a")) == 16
    assert query_text(CHAT) == "system: \n\nuser: Hi" and query_text("x") == "x"


# --- ids ---------------------------------------------------------------------------------------------------------


def test_repeated_queries_get_suffixes_in_order(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"query": query} for query in "abaaba"))
    a, b = content_id("a"), content_id("b")
    assert [record.id for record in read_records(path)] == [a, b, f"{a}-2", f"{a}-3", f"{b}-2", f"{a}-4"]


def test_suffix_steps_over_an_id_that_is_taken(tmp_path: Path) -> None:
    taken = f"{content_id('a')}-2"
    path = lines(tmp_path / "a.jsonl", {"query": "a"}, {"id": taken, "query": "z"}, {"query": "a"}, {"query": "a"})
    ids = [record.id for record in read_records(path)]
    assert ids == [content_id("a"), taken, f"{content_id('a')}-3", f"{content_id('a')}-4"]


def test_an_id_given_twice_names_both_lines(tmp_path: Path) -> None:
    message = error_of(lines(tmp_path / "a.jsonl", {"id": "x", "query": "a"}, "", {"id": "x", "query": "b"}))
    assert "a.jsonl, line 3: id 'x' is that of line 1 already" in message
    write_records(tmp_path / "a.parquet", [Record(query="a", id="x"), Record(query="b", id="x")])
    assert "row 2: id 'x' is that of row 1 already" in error_of(tmp_path / "a.parquet")


def test_ids_of_many_repeats_stay_linear() -> None:
    ids = Ids()
    names = [ids.claim("a", line) for line in range(20_000)]
    assert names[-1] == "a-20000" and len(set(names)) == 20_000


def test_many_ids_are_known_again_in_little_memory() -> None:
    tracemalloc.start()
    ids = Ids()
    assert all(ids.claim(f"id {line}", line) == f"id {line}" for line in range(100_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(ids.first_line(f"id {line}") == line for line in range(0, 100_000, 77))
    assert ids.first_line("another") is None and ids.claim("id 7", 1) == "id 7-2"
    assert held < 100_000 * 45  # a dict of them takes 120 bytes each


def test_memory_of_reading_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """60,000 queries of 2,000 characters, 120 MB in all, are read within 40 MiB of what Python holds."""
    path = tmp_path / "a.jsonl.gz"
    write_records(path, (Record(query=f"{i} " + "x" * 2000) for i in range(60_000)))
    program = (
        "import resource, sys\nfrom rrhf.records.files import read_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in read_records(sys.argv[1]))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "assert not {'torch', 'pyarrow', 'transformers', 'matplotlib', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    n, kilobytes = map(int, done.stdout.split())
    assert n == 60_000 and kilobytes < 40 * 1024


# --- bad input ---------------------------------------------------------------------------------------------------

GOOD = {"query": "q", "responses": ["a", "b"], "scores": [1.0, 0.0]}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not JSON": ('{"query": "q"', "not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a list": ("[1, 2]", "a row must be a JSON object, not a list"),
    "text": ('"query"', "a row must be a JSON object, not text"),
    "no query": (
        {"prompt": "q"},
        "no query (columns: prompt): give `query`, or bring another format in with `rrhf con",
    ),
    "null query": ({"query": None}, "no query"),
    "number query": ({"query": 3}, "query is a number"),
    "blank query": ({"query": " \n"}, "the query is empty"),
    "no messages": ({"query": []}, "the query is empty"),
    "blank messages": ({"query": [{"role": "user", "content": " "}]}, "the query is empty"),
    "no content": ({"query": [{"role": "user"}]}, "lacks role or content"),
    "no role": ({"query": [{"content": "x"}]}, "lacks role or content"),
    "content of parts": ({"query": [{"role": "user", "content": [{"text": "x"}]}]}, "lacks role or content"),
    "message is text": ({"query": ["x"]}, "lacks role or content"),
    "responses is text": ({**GOOD, "responses": "ab"}, "responses is text: it must be a list"),
    "response is null": ({**GOOD, "responses": ["a", None]}, "responses[1] is null"),
    "short scores": ({**GOOD, "scores": [1.0]}, "scores and responses differ in length (1 and 2)"),
    "long scores": ({**GOOD, "scores": [1.0, 2, 3]}, "scores and responses differ in length (3 and 2)"),
    "no scores in list": ({**GOOD, "scores": []}, "scores and responses differ in length (0 and 2)"),
    "short sources": ({**GOOD, "sources": ["x"]}, "sources and responses differ in length"),
    "short finish": ({**GOOD, "finish": ["stop"]}, "finish and responses differ in length"),
    "short rewards": ({**GOOD, "rewards": {"f": [1]}}, "rewards 'f' and responses differ in length"),
    "rewards is a list": ({**GOOD, "rewards": [1, 2]}, "rewards is a list"),
    "NaN": ({**GOOD, "scores": [1.0, math.nan]}, "scores[1] is NaN: a score is a finite number, or null"),
    "infinity": ({**GOOD, "scores": [-math.inf, 1.0]}, "scores[0] is infinite"),
    "overflow": ('{"query": "q", "responses": ["a"], "scores": [1e999]}', "scores[0] is infinite"),
    "huge integer": ({**GOOD, "scores": [10**400, 0]}, "scores[0] is infinite"),
    "text score": ({**GOOD, "scores": ["0.5", 1]}, "scores[0] is text"),
    "bool score": ({**GOOD, "scores": [1, True]}, "scores[1] is true or false"),
    "NaN reward": ({**GOOD, "rewards": {"f": [1, math.nan]}}, "rewards 'f'[1] is NaN"),
    "NaN elsewhere": ({**GOOD, "weight": math.nan}, "NaN is not JSON"),
    "finish": ({**GOOD, "finish": ["stop", "eos"]}, "finish is 'eos': it must be 'stop' or 'length'"),
    "id": ({**GOOD, "id": 1.5}, "id is 1.5"),
    "empty id": ({**GOOD, "id": ""}, "id is ''"),
    "half a character": ('{"query": "\\ud83d"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("row, expected", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_names_file_and_line(tmp_path: Path, row: Any, expected: str) -> None:
    message = error_of(lines(tmp_path / "data.jsonl", {"query": "fine"}, "", row))
    assert "data.jsonl, line 3: " in message and expected in message


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (record,) = read_records(lines(tmp_path / "a.jsonl", '{"query": "\\ud83d\\ude00"}'))
    assert record.query == "😀"


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"query": "a"}\n{"query": "\xff"}\n')
    assert "a.jsonl, line 2: not UTF-8 (byte 12)" in error_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "row, require, expected",
    [
        ({"query": "q"}, "responses", "line 2: no responses: run `rrhf sample` first"),
        ({"query": "q", "responses": []}, "responses", "line 2: no responses: run `rrhf sample` first"),
        ({"query": "q"}, "scores", "line 2: no responses: run `rrhf sample` first"),
        ({"query": "q", "responses": ["a"]}, "scores", "line 2: no scores: run `rrhf score` first"),
        ({**GOOD, "responses": ["a", " \n"]}, "responses", "line 2: response 1 is empty: take it out"),
    ],
)
def test_a_stage_says_what_it_needs(tmp_path: Path, row: Any, require: Any, expected: str) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, row)
    assert expected in error_of(path, require=require)
    assert len(list(read_records(path))) == 2  # reading for an earlier stage takes it


def test_empty_responses_are_dropped_and_counted_on_demand(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "responses": ["", "b"],
        "sources": ["x", "y"],
        "finish": ["stop", "length"],
        "rewards": {"f": [5, 6]},
    }
    path = lines(tmp_path / "a.jsonl", row, {"query": "z", "responses": [" "]}, GOOD)
    counts = Counter[str]()
    first, last = read_records(path, require="responses", empty_responses="drop", counts=counts)
    assert (first.responses, first.sources, first.finish) == (["b"], ["y"], ["length"])
    assert (first.scores, first.rewards) == ([0.0], {"f": [6.0]})
    assert last.responses == ["a", "b"]
    assert counts == {"empty response dropped": 2, "no response left": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wb") as file:
        file.write(b"\n")
    message = error_of(tmp_path / name)
    assert name in message and "no records" in message


def test_broken_files(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl.gz", [Record(query=f"q{i}" * 50) for i in range(200)])
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "broken or cut short" in error_of(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    assert "b.parquet: not a whole Parquet file" in error_of(tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text('[{"query": "a"},\n {"query" "b"}]')
    assert "c.json, line 2: not JSON" in error_of(tmp_path / "c.json")


def test_missing_file_and_unknown_suffix_are_told_before_reading(tmp_path: Path) -> None:
    (tmp_path / "scored.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"did you mean .*scored\.jsonl"):
        read_records(tmp_path / "score.jsonl")
    with pytest.raises(UserError, match=r"unknown suffix '.xml': known: .jsonl, .jsonl.gz"):
        read_records(tmp_path / "a.xml")
    with pytest.raises(UserError, match="is a folder"):
        (tmp_path / "d.jsonl").mkdir()
        read_records(tmp_path / "d.jsonl")


# --- writing safely ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_failure_leaves_the_earlier_file_whole_and_nothing_beside_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_records(path, [Record(query="earlier")])

    def failing() -> Iterator[Record]:
        yield Record(query="new")
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_records(path, failing(), overwrite=True)
    assert [record.query for record in read_records(path)] == ["earlier"]
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_existing_output_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [Record(query="earlier")])
    with pytest.raises(UserError, match="--overwrite"):
        write_records(path, [Record(query="new")])
    assert write_records(path, [Record(query="new")], overwrite=True) == 1
    with pytest.raises(UserError, match="unknown suffix"):
        write_records(tmp_path / "a.csv", [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, "\ud800"], ids=["nan", "inf", "set", "surrogate"])
def test_what_json_has_no_word_for_is_not_written(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=r"record 'r7': 'weight' cannot be written"):
        write_records(tmp_path / name, [Record(query="q", id="r7", extra={"weight": value})])
    assert not list(tmp_path.iterdir())


def test_more_responses_keep_scores_in_step() -> None:
    record = Record("q", ["a"], scores=[0.5], rewards={"r": [0.5]})
    other = Record("q", ["b", "c"], scores=[1.0, None], rewards={"s": [1.0, None]})
    joined = record.with_responses(other.responses, other.finish, ["human/0", "human/1"], other)
    assert (joined.responses, joined.sources[1:]) == (["a", "b", "c"], ["human/0", "human/1"])
    assert joined.scores == [0.5, 1.0, None]
    assert joined.rewards == {"r": [0.5, None, None], "s": [None, 1.0, None]}
    assert Record("q").with_responses(["x"], ["stop"], ["m/0"]).scores == []


def test_some_responses_kept_and_none() -> None:
    record = Record("q", ["a", "b", "c"], finish=["stop", "length", "stop"], scores=[1.0, None, 3.0], extra={"t": 1})
    record.rewards = {"r": [1.0, None, 3.0]}
    kept = record.keeping([2, 0])
    assert (kept.responses, kept.finish, kept.scores) == (["c", "a"], ["stop", "stop"], [3.0, 1.0])
    assert (kept.sources, kept.rewards) == (["provided/2", "provided/0"], {"r": [3.0, 1.0]})
    bare = record.without_responses()
    assert (bare.responses, bare.scores, bare.rewards, bare.id, bare.extra) == ([], [], {}, record.id, {"t": 1})
    assert record.responses == ["a", "b", "c"]


def test_columns_with_a_list_a_response_go_with_the_responses() -> None:
    drawn, other = [[1, 2], [3], [4, 5]], {"t": [1, 2, 3]}  # a column of the user's stays as it is
    record = Record(
        "q", ["a", "b", "a"], extra={"drawn_tokens": drawn, "old_token_logprobs": [[0.1], [0.2], [0.3]], **other}
    )
    assert record.without_responses().extra == other
    kept = record.keeping([2, 1]).extra
    assert kept == {"drawn_tokens": [[4, 5], [3]], "old_token_logprobs": [[0.3], [0.2]], **other}
    more = record.with_responses(["c"], ["stop"], ["m/0"]).extra
    assert more["drawn_tokens"] == [*drawn, None] and more["t"] == [1, 2, 3]
    merged, duplicates, _ = merge_duplicates(record)
    assert duplicates == 1 and merged.extra["drawn_tokens"] == [[1, 2], [3]] and merged.extra["t"] == [1, 2, 3]
