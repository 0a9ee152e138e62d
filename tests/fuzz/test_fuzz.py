"""Bad input for every reader, parser and configuration: it is read as it stands, or refused by a ``UserError``.

A few hundred cases in ``make test``, always the same ones; 100,000 new ones by ``make test-fuzz`` (RRHF_FUZZ=7000 for a
property, times its share), which prints what reproduces a failure. A case that takes longer than ``HANGS`` is a
failure too.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrhf.cli.main import COMMANDS, main
from rrhf.common.endpoint import _retry_after
from rrhf.common.errors import UserError
from rrhf.common.journal import Journal
from rrhf.common.yaml_text import load_yaml
from rrhf.models.tokenization import TextSettings
from rrhf.recipes.config import override, parse_config, read_config
from rrhf.records.export import EXPORTS, exported
from rrhf.records.files import WRITERS, read_records, write_records, write_rows
from rrhf.records.formats import FILE_READERS, FORMATS, file_rows, load_dataset_records
from rrhf.records.parts import in_parts
from rrhf.records.record import Record, record_from_row, record_line
from rrhf.report.load import load_run
from rrhf.report.page import render
from rrhf.rewards.judges.parse import Scale, parse_reply
from rrhf.rewards.judges.template import read_template
from rrhf.rewards.people import read_judgements
from rrhf.sampling.sources.parsing import parse_source, shown_source
from rrhf.training.folder import CHECKSUMS, last_checkpoint, seal
from support.judge_replies import read_or_refused

CASES = int(os.environ.get("RRHF_FUZZ", "0"))
HANGS = 30  # seconds of computing


def cases(share: float = 1.0) -> Callable[[Any], Any]:
    """Settings of a test that gets its ``share`` of the cases asked for: the dear ones get fewer."""
    number = max(int(CASES * share), 1) if CASES else max(int(120 * share), 8)
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=not CASES,
        database=None,
        print_blob=True,
        suppress_health_check=checks,
    )


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Whatever hangs is interrupted, with the place where it does."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"hangs: {HANGS} seconds of computing and no end")

    signal.signal(signal.SIGVTALRM, late)
    yield
    watch(0)


def watch(seconds: int = HANGS) -> None:
    """Begin to count the seconds that this process computes, whatever else the machine does."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def refused_or(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, None where it raises a ``UserError`` that says something."""
    watch()
    try:
        return work()
    except UserError as error:
        assert str(error).strip()
        return None
    finally:
        watch(0)


# --- what comes in ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = TEXT.filter(lambda text: bool(text.strip()))
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | WORDS, "content": WORDS}),
    min_size=1,
    max_size=3,
)


@st.composite
def valid_records(draw: st.DrawFn) -> Record:
    k = draw(st.integers(0, 3))

    def each(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=k, max_size=k))

    score = st.none() | NUMBER
    return Record(
        draw(WORDS | MESSAGES),
        each(WORDS),
        each(WORDS),
        each(st.sampled_from(["stop", "length"])),
        each(score) if draw(st.booleans()) else [],
        draw(st.dictionaries(WORDS, st.lists(score, min_size=k, max_size=k), max_size=2)) if k else {},
        "",
        draw(st.dictionaries(st.sampled_from(["a", "topic", "é", "x y"]), _plain_json(), max_size=3)),
    )


def _plain_json() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | NUMBER | TEXT
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
    )


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut out, put twice or put in."""
    for _ in range(draw.randint(1, 4)):
        begin = draw.randrange(len(content) + 1)
        end = min(len(content), begin + draw.choice([0, 1, 2, 8, 64]))
        new = draw.choice(
            [
                b"",
                bytes([draw.randrange(256)]),
                b'"',
                b"{",
                b"]",
                b"\x00",
                b"\n",
                b"\xff",
                b"NaN",
                b"1e999",
                b"9" * 5000,
                b"[" * 3000,
                b"\\ud800",
                "\u2028".encode(),
                b"\xef\xbb\xbf",
                b",",
                content[begin:end] * 2,
                b"null",
                b"-",
            ]
        )
        content = content[:begin] + new + content[end:]
    return content


# --- records ---------------------------------------------------------------------------------------------------------


@cases(0.5)
@given(st.lists(valid_records(), min_size=1, max_size=5), st.sampled_from(sorted(WRITERS)))
def test_records_survive_every_file(records: list[Record], suffix: str) -> None:
    for number, record in enumerate(records):
        record.id = f"r{number}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"data{suffix}")
        write_records(path, records)
        assert list(map(_facts, read_records(path))) == list(map(_facts, records))


def _facts(record: Record) -> Any:
    row = json.loads(record_line(record))
    # Parquet has every reward in every row; NaN-like differences are none here, and −0.0 is 0.0.
    return {name: value for name, value in row.items() if value not in ({}, [])}


SEEDS: dict[str, bytes] = {}


def seed_file(suffix: str) -> bytes:
    """The bytes of a valid file."""
    if suffix not in SEEDS:
        records = [Record(f"query {i}", ["a", "b"], scores=[0.5, None], extra={"n": i}) for i in range(3)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"data{suffix}")
            if suffix in WRITERS:
                write_records(path, records)
            elif suffix == ".csv":
                path.write_text('query,responses,n\n"query 0",a,1\n"query, 1",b,2\n')
            elif suffix == ".txt":
                path.write_text("query 0\nquery 1\n")
            else:
                content = json.dumps([json.loads(record_line(record)) for record in records]).encode()
                path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
            SEEDS[suffix] = path.read_bytes()
    return SEEDS[suffix]


@cases(1.0)
@given(st.sampled_from(sorted(FILE_READERS)), st.integers(0, 2**32), st.booleans())
def test_damaged_files_are_read_or_refused(suffix: str, seed: int, within: bool) -> None:
    """``within``: of a .gz the packed content is damaged, so that it is read at all."""
    draw, content = random.Random(seed), seed_file(suffix)
    if within and suffix.endswith(".gz"):
        content = gzip.compress(mutated(gzip.decompress(content), draw))
    else:
        content = mutated(content, draw)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"data{suffix}")
        path.write_bytes(content)
        refused_or(lambda: list(file_rows(path)))
        records = refused_or(lambda: list(load_dataset_records(path)))
        for record in records or ():
            refused_or(lambda: record_line(record))  # noqa: B023 - called at once
        if suffix in WRITERS and (read := refused_or(lambda: list(read_records(path)))):
            other = Path(folder, "again.jsonl")
            if refused_or(lambda: write_records(other, read)):
                assert list(map(_facts, read_records(other))) == list(map(_facts, read))


@cases(1.0)
@given(
    JSON
    | st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("id", "query", "responses", "sources", "finish", "scores", "rewards", "extra"), JSON),
    )
)
def test_rows_of_any_shape(row: Any) -> None:
    record = refused_or(lambda: record_from_row(row, "here"))
    if record is not None and (line := refused_or(lambda: record_line(record))):
        again = record_from_row(json.loads(line), "here")
        assert _facts(again) == _facts(record)


COLUMNS = sorted(
    {
        "query",
        "responses",
        "scores",
        "chosen",
        "rejected",
        "prompt",
        "response",
        "instruction",
        "completions",
        "outputs",
        "output",
        "input",
        "conversations",
        "user_input",
        "responses_and_scores",
        "completion_a",
        "completion_b",
        "turns",
        "subset",
        "completion",
        "text",
        "label",
        "review",
        "helpfulness",
        "messages",
        "question",
        "rows",
        "generator",
        "chosen_score",
        "rejected_score",
        "system",
        "history",
        "score_chosen",
        "score_rejected",
        "from",
        "value",
    }
)
VALUES = JSON | MESSAGES | st.text(max_size=30).map(lambda text: f"\n\nHuman: {text}\n\nAssistant: {text}")


@cases(1.0)
@given(
    st.sampled_from([None, *sorted(FORMATS)]),
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6), min_size=1, max_size=3),
)
def test_foreign_rows_of_any_shape(format: str | None, rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for record in refused_or(lambda: list(load_dataset_records(path, format))) or ():
            assert record.query
            refused_or(lambda: record_line(record))  # noqa: B023 - called at once


# --- what judges and people say --------------------------------------------------------------------------------------

REPLY_PIECES = [
    "Response",
    "1",
    "2",
    "3",
    ":",
    "\n",
    "accuracy",
    "coherence",
    "|",
    "---",
    "5",
    "4.5",
    "/5",
    "{",
    "}",
    '"',
    "[",
    "]",
    ",",
    "total",
    "10",
    "**",
    "-",
    "NaN",
    "1e9",
    "<think>",
    "</think>",
    "```json",
    "```",
    "\u0665",
    "½",
    " ",
    "\t",
    "10%",
]


DATE_PIECES = [
    *"0123456789:,+- ",
    "Mon",
    "Jan",
    "GMT",
    "2026",
    "9999",
    "00:00:00",
    "12" * 30,
    "-2359",
    "²",
    "1e999",
    "nan",
]


@cases(3.0)
@given(st.lists(st.sampled_from(REPLY_PIECES) | st.text(max_size=5), max_size=60).map("".join), st.integers(1, 3))
def test_replies_of_judges(reply: str, number: int) -> None:
    watch()
    read_or_refused(reply, number)


@pytest.mark.parametrize("piece", ["[", "{", '{"a":', "| ", "-", "1 ", "**", "<think>", "Response 1: ", " \n"])
def test_long_replies_do_not_hang(piece: str) -> None:
    watch()
    parse_reply(piece * (29_000 // len(piece)), Scale(("accuracy",), 1, 5, integers=False), 2)
    parse_reply(piece * 200_000, Scale(("accuracy",), 1, 5, integers=False), 2)


@pytest.mark.parametrize("value", ["Jan " + "12" * 30 + " 01 23:59 01", "01 Jan +999923:59 9999319999 01", "1e999"])
def test_waits_that_no_clock_knows(value: str) -> None:
    assert _retry_after({"retry-after": value}) in (None, math.inf)


@cases(1.0)
@given(st.lists(st.sampled_from(DATE_PIECES) | st.text(max_size=3), max_size=12).map("".join))
def test_waits_that_servers_ask_for(value: str) -> None:
    watch()
    seconds = _retry_after({"retry-after": value})
    assert seconds is None or seconds >= 0


@cases(0.7)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "id": st.sampled_from(["a", "b", ""]) | TEXT,
                "rater": TEXT,
                "response": st.sampled_from(["0", "1", "1.0", "²"]) | TEXT,
                "rank": st.sampled_from(["1", "2", "1.5", "nan", "-1", "1e400"]) | TEXT,
                "rating": TEXT,
                "choice": TEXT,
            },
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_peoples_tables(rows: list[dict[str, str]], seed: int, damage: bool) -> None:
    import csv

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "people.csv")
        text = io.StringIO()
        writer = csv.DictWriter(text, ["id", "rater", "response", "rank", "rating", "choice"], restval="")
        writer.writeheader()
        with contextlib.suppress(csv.Error):
            writer.writerows(rows)
        content = text.getvalue().encode()
        path.write_bytes(mutated(content, random.Random(seed)) if damage else content)
        judgements = refused_or(lambda: read_judgements(path))
        if judgements is not None:
            said = [
                vote.value
                for raters in judgements.votes.values()
                for votes in raters.values()
                for vote in votes.values()
            ]
            assert said and all(math.isfinite(value) for value in said)
            for name in ("a", "b"):
                refused_or(lambda: judgements.of(Record("q", ["x", "y"], id=name)))  # noqa: B023 - called at once


# --- settings --------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "data",
        "model",
        "sample",
        "score",
        "train",
        "evaluate",
        "seed",
        "extends",
        "device",
        "policy",
        "reward",
        "source",
        "learning_rate",
        "num_responses",
        "limit",
        "top_p",
        "iterations",
        "max_steps",
        "bf16",
        "output_dir",
        "kl_beta",
    ]
)


@cases(0.4)
@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=4), max_size=6))
def test_configurations_of_any_shape(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        config = refused_or(lambda: read_config(str(path)))
        if config is not None:
            refused_or(lambda: parse_config(config, Path(folder)))


YAML_PIECES = [
    "a",
    ":",
    " ",
    "\n",
    "- ",
    "&x ",
    "*x",
    "!!int ",
    "!!timestamp ",
    "!!python/object:os.system ",
    "{",
    "}",
    "[",
    "]",
    "2001-99-99",
    "0b_",
    "1e5",
    "'",
    '"',
    "|",
    ">",
    "? ",
    "<<: ",
    "~",
    "%",
    "\t",
    "---\n",
]


@cases(2.0)
@given(st.lists(st.sampled_from(YAML_PIECES) | st.text(max_size=3), max_size=30).map("".join))
def test_texts_as_yaml(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused_or(lambda: read_config(str(path)))
        refused_or(lambda: read_template(path))
        refused_or(lambda: override({}, [text]))


@cases(0.5)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "url",
                "prompt",
                "aspects",
                "range",
                "kind",
                "model",
                "system",
                "integers",
                "order",
                "max_tokens",
                "temperature",
                "tries",
                "json",
                "price",
                "cache",
                "x",
            ]
        ),
        JSON,
    )
)
def test_judges_files_of_any_shape(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "judge.yaml")
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        refused_or(lambda: read_template(path))


def test_yaml_that_would_lose_or_multiply_values() -> None:
    for text in ("a: 1\na: 2", "x: {a: 1, a: 1}", "a: &x [1]\nb: [" + "*x, " * 50 + "]", "[" * 5000, "!!timestamp x"):
        with pytest.raises(ValueError):
            load_yaml(text)
    assert load_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}")["more"] == {"x": 1, "y": 2}


@cases(1.0)
@given(st.text(max_size=60) | JSON.map(json.dumps))
def test_arguments_of_chat_templates(text: str) -> None:
    found = refused_or(lambda: TextSettings(chat_template_kwargs=text))
    if found is not None:
        assert isinstance(found.template_options(), dict)


@cases(1.0)
@given(
    st.lists(
        st.sampled_from(
            [
                "http://",
                "host",
                "@",
                "chat",
                "top-p",
                ":",
                "4",
                "²",
                "#",
                "vllm:",
                "/",
                "..",
                "\x00",
                "x" * 300,
                "completions",
                "pkg.mod:f",
                "?key=1",
            ]
        )
        | st.text(max_size=4),
        max_size=9,
    ).map("".join)
)
def test_sources_as_they_are_written(text: str) -> None:
    shown_source(text)
    found = refused_or(lambda: parse_source(text))
    assert found is None or found.kind == "file" or found.count >= 1


FLAGS = [
    "--model",
    "--data",
    "--output",
    "--policy",
    "--top_p",
    "--num_responses",
    "--seed",
    "--reward",
    "--max_steps",
    "--kl_beta",
    "--format",
    "--nothing",
    "-x",
    "--help",
    "--limit",
    "--json",
    "--top-k=3",
    "--",
]


@cases(0.15)
@given(
    st.sampled_from(sorted({*COMMANDS} - {"demo", "publish"})),
    st.lists(st.sampled_from(FLAGS) | st.text(max_size=6), max_size=7),
)
def test_flags_of_any_kind(command: str, arguments: list[str]) -> None:
    """Every command ends with 0 (help) or 2; no file that is named is there, so none begins to work."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        out, err = io.StringIO(), io.StringIO()
        watch()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([command, *arguments])
            except SystemExit as ended:
                code = int(ended.code or 0)
        assert code in (0, 2), (code, err.getvalue())
        assert code == 0 or err.getvalue().strip()


# --- what stopped work leaves ----------------------------------------------------------------------------------------


def _work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
    for record in block:
        record.responses, record.sources, record.finish = [str(record.query)[::-1]], ["x/0"], ["stop"]
        yield record


@cases(0.3)
@given(st.integers(0, 2**32))
def test_damaged_parts_and_manifests(seed: int) -> None:
    """Whatever bytes a disk has changed in the folder of parts, the output is right, or the settings are refused."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.jsonl")

        def run(stop: bool = False) -> int:
            def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
                if stop and block[0].query == "query 4":
                    raise KeyboardInterrupt
                return _work(block, done)

            return in_parts(
                lambda: (Record(f"query {i}") for i in range(6)), output, {"w": work}, {"s": 1}, part_size=2
            )

        with contextlib.suppress(KeyboardInterrupt):
            run(stop=True)
        parts = sorted(path for path in Path(f"{output}.parts").iterdir() if path.stat().st_size)
        path = draw.choice(parts)
        path.write_bytes(mutated(path.read_bytes(), draw))
        if refused_or(run) is None:
            assert path.name == "settings.json"
            assert not output.exists()
        else:
            assert [row.responses for row in read_records(output)] == [[f"{i} yreuq"] for i in range(6)]


@cases(0.5)
@given(st.integers(0, 2**32))
def test_damaged_journals(seed: int) -> None:
    """What is left of a journal is read; what comes after a torn line too."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), "settings")
        for number in range(4):
            journal.add({"key": number, "text": "x\u2028y\ry"})
        journal.path.write_bytes(mutated(journal.path.read_bytes(), random.Random(seed)))
        journal.add({"key": "last"})
        found = list(journal.read())
        assert all(isinstance(entry, dict) for entry in found) and found[-1] == {"key": "last"}


def test_no_changed_byte_of_a_journal_changes_an_answer(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "settings")
    kept = [{"key": number, "text": "5 x\u2028y\ty"} for number in range(3)]
    for entry in kept:
        journal.add(entry)
    whole = journal.path.read_bytes()
    for place in range(len(whole)):
        journal.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = list(journal.read())
        assert len(found) in (1, 2) and all(entry in kept for entry in found)
    journal.path.write_text('{"key": 9}\n{"key": 8', encoding="utf-8")  # as it was written before, and torn
    assert list(journal.read()) == [{"key": 9}]


@cases(0.3)
@given(st.integers(0, 2**32))
def test_damaged_checkpoints(seed: int) -> None:
    """A checkpoint with a changed byte is never gone on from; the one before it is."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):
            checkpoint = Path(folder, f"checkpoint-{step}")
            checkpoint.mkdir()
            for name in ("model.safetensors", "optimizer.pt"):
                (checkpoint / name).write_bytes(draw.randbytes(200))
            (checkpoint / "trainer_state.json").write_text('{"global_step": 1, "log_history": [1, 2, 3]}')
            seal(checkpoint)
        path = draw.choice(sorted(checkpoint.iterdir()))
        before = path.read_bytes()
        path.write_bytes(after := mutated(before, draw))
        taken = last_checkpoint(Path(folder), check=True)
        if path.name == CHECKSUMS:  # its form may have changed alone
            return
        assert taken == str(Path(folder, "checkpoint-1" if after != before else "checkpoint-2"))


RUN: dict[str, Any] = {
    "config.yaml": {"model": "m", "seed": 1, "data": {"source": "d.jsonl"}, "score": {"reward": ["a:b"]}},
    "evaluation.json": {
        "rho": {"reward_mean": 0.1, "reward_std": 0.1, "perplexity": 9.0, "length_mean": 3.0, "n": 2},
        "pi": {"reward_mean": 0.2, "reward_std": 0.1, "perplexity": 8.0, "length_mean": 3.0, "n": 2},
        "reward_gain": {"mean": 0.1, "low": 0.0, "high": 0.2}, "seed": 1, "generations": "generations.jsonl",
        "rewards": {"a:b": {"rho": {"mean": 0.1, "std": 0.1}, "pi": {"mean": 0.2, "std": 0.1},
                            "gain": {"mean": 0.1, "low": 0.0, "high": 0.2}}},
    },
    "generations.jsonl": {"query": "q", "rho": "a", "pi": "b", "rho_rewards": {"a:b": 0.1}, "pi_rewards": {"a:b": 0.2}},
    "timings.json": {"sample": 1.0, "train": 2.0},
    "made-of.json": {"train": {"scored.jsonl": "0" * 64}},
    "environment.json": {"environments": [{"stages": ["train"], "processor": "p"}]},
    "scored.jsonl": {"query": "q", "responses": ["a", "b"], "scores": [0.1, 0.2], "rewards": {"a:b": [0.1, 0.2]}},
    "model/training.json": {"settings": {"model": "m"}, "seconds": 1.0},
    "model/trainer_state.json": {"log_history": [{"step": 1, "loss": 0.5}]},
}  # fmt: skip


def replaced(value: Any, draw: random.Random, new: Any) -> Any:
    """The value with a part of it, at any depth, replaced by ``new``."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        return {**value, key: replaced(value[key], draw, new)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        return [replaced(value[0], draw, new), *value[1:]]
    return new


@cases(0.4)
@given(st.sampled_from(sorted(RUN)), JSON, st.integers(0, 2**32), st.booleans())
def test_run_folders_of_others(name: str, value: Any, seed: int, damage: bool) -> None:
    """A run folder that somebody sent, with another value in it or damaged bytes."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model").mkdir()
        for file, content in RUN.items():
            Path(folder, file).write_text(json.dumps(content) + "\n", encoding="utf-8")
        path = Path(folder, name)
        path.write_text(json.dumps(replaced(RUN[name], draw, value)) + "\n", encoding="utf-8")
        if damage:
            path.write_bytes(mutated(path.read_bytes(), draw))
        run = refused_or(lambda: load_run(folder))
        if run is not None and seed % 16 == 0:  # drawing it takes long
            page = refused_or(lambda: render([run]))
            assert page is None or page.startswith("<!")


def test_names_longer_than_the_file_system_has(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "evaluation.json").write_text(json.dumps({**RUN["evaluation.json"], "generations": "x" * 300}))
    with pytest.raises(UserError, match="name too long"):
        load_run(tmp_path)


@pytest.mark.parametrize("begun", [{"setting": {"s": 1}, "replaces": None}, {"settings": 1, "replaces": 2}, [], {}])
def test_settings_of_parts_with_a_changed_key(tmp_path: Path, begun: Any) -> None:
    folder = tmp_path / "out.jsonl.parts"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match="damaged"):
        in_parts(lambda: iter([Record("q")]), tmp_path / "out.jsonl", {"w": _work}, {"s": 1}, part_size=2)


def test_a_run_folder_without_faults_is_shown(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file, content in RUN.items():
        Path(tmp_path, file).write_text(json.dumps(content) + "\n", encoding="utf-8")
    run = load_run(tmp_path)
    assert run.rewards and run.history and run.samples and run.generations and run.timings and run.fingerprints


# --- everything that text can hold -----------------------------------------------------------------------------------

ODDITIES = [
    *(chr(code) for code in range(0x20)),
    "\x7f",
    *(chr(code) for code in range(0x80, 0xA1)),
    "\u00ad",
    "\u0301",
    "e\u0301",
    "\u00e9",
    "\u200b",
    "\u200c",
    "\u200d",
    "\u200e",
    "\u200f",
    "\u2028",
    "\u2029",
    "\u202a",
    "\u202e",
    "\u2060",
    "\u2066",
    "\u2069",
    "\u3000",
    "\ufeff",
    "\ufffe",
    "\uffff",
    "\ufffd",
    "\ufdd0",
    "\ue000",
    "\U000e0001",
    "\U0001f469\u200d\U0001f4bb",
    "\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd",
    "\U0010ffff",
    "\U0001d11e",
    "\u0130",
    "ß",
    "ſ",
    "ﬁ",
    "\u1e9e",
    "漢字",
    "אבג",
    "العربية",
    "हिन्दी",
    "ไทย",
    "\r\n",
    "\n\r",
    "\\ud800",
    "\\",
    '"',
    "'",
    ",",
    ";",
    "\t",
    "=1+1",
    "<script>",
    "&amp;",
    "{{x}}",
    "%s",
    "${x}",
    "NaN",
    "null",
    "true",
    "\u0660",
    "½",
    "a" * 70_000,
    " lead",
    "trail ",
    "\u00a0",
]


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_every_oddity_survives(suffix: str, tmp_path: Path) -> None:
    records = [
        Record(
            query,
            [f"a{odd}", f"{odd}b", f"{odd}{odd}."],
            [f"s{odd}", "t", "u"],
            scores=[1.0, 0.5, None],
            rewards={f"r{odd}": [0.1, None, 2.0]},
            id=f"{number}-{kind}-{odd}",
            extra={"x": odd, "y": [odd], "z": {odd: odd}},
        )
        for number, odd in enumerate(ODDITIES)
        for kind, query in enumerate([f"q {odd} q", [{"role": f"user{odd}", "content": f"c{odd}"}]])
    ]
    path = tmp_path / f"odd{suffix}"
    write_records(path, records)
    assert [_facts(record) for record in read_records(path)] == [_facts(record) for record in records]


@pytest.mark.parametrize("to", sorted(EXPORTS))
def test_every_oddity_survives_the_exports(to: str, tmp_path: Path) -> None:
    """Out as another trainer's rows, and in again as ours."""
    records = [Record(f"q {odd} q", [f"a{odd}a", f"b{odd}b"], scores=[1.0, 0.5]) for odd in ODDITIES]
    write_rows(tmp_path / "rows.jsonl", exported(iter(records), to))
    read = [_as_json([r.query, r.responses]) for r in load_dataset_records(tmp_path / "rows.jsonl")]
    assert len(read) == len(records)
    for text, record in zip(read, records, strict=True):
        assert _as_json(record.responses[0]) in text and _as_json(record.query) in text


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_all_real_dialogues_survive(suffix: str, test_data: Path, tmp_path: Path) -> None:
    """Every record of the harmless dialogues, through every file, and through every file after it."""
    records = list(load_dataset_records(test_data / "hh_harmless.jsonl.gz"))
    assert len(records) > 1500
    facts = [_facts(record) for record in records]
    path = tmp_path / f"hh{suffix}"
    write_records(path, records)
    assert [_facts(record) for record in read_records(path)] == facts
    for other in sorted(WRITERS):
        write_records(tmp_path / f"again{other}", read_records(path))
        assert [_facts(record) for record in read_records(tmp_path / f"again{other}")] == facts
