"""Several sources in one file: parsing, order, tags, joins, journals, and faults before any long work."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.cli.main import main
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.sampling.sampler import sample
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.build import build_sources, source_digest
from rrhf.sampling.sources.local import LocalModel
from rrhf.sampling.sources.paid import PaidSource
from rrhf.sampling.sources.parsing import SourceSpec, parse_source
from rrhf.sampling.sources.source import Shared
from rrhf.sampling.stage import sample_file
from support import misbehaving as bad
from support import tiny
from support.ports import closed_port

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    place = tmp_path / "queries.jsonl"
    write_records(place, [Record(f"The river number {i}", id=f"q{i}") for i in range(5)])
    return place


def flags(queries: Path, output: Path, *specs: str) -> list[str]:
    named = [part for spec in specs for part in ("--source", spec)]
    sizes = ["--max_new_tokens", "6", "--device", "cpu", "--dtype", "float32", "--seed", "3"]
    return ["sample", "--data", str(queries), "--output", str(output), *named, *sizes]


def sampling(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"policy": "top-p", "num_responses": 2, "max_new_tokens": 6, "seed": 3, **changes})


# --- what is written ---------------------------------------------------------------------------------------------


def test_parsing(tmp_path: Path) -> None:
    (tmp_path / "human.jsonl").write_text("{}\n")
    assert parse_source("org/model@diverse-beam:4") == SourceSpec(
        "local", "org/model", "diverse-beam", 4, "model@diverse-beam"
    )
    assert parse_source("http://localhost:8000/v1@chat:2").kind == "endpoint"
    assert parse_source("vllm:org/model@top-p:1") == SourceSpec("vllm", "org/model", "top-p", 1, "model@top-p")
    assert parse_source("package:p/m.gguf@greedy:1").tag == "m@greedy"
    assert parse_source("org/model@mine.policies:make:3") == SourceSpec(
        "local", "org/model", "mine.policies:make", 3, "model@mine.policies:make"
    )
    assert parse_source(str(tmp_path / "human.jsonl")) == SourceSpec(
        "file", str(tmp_path / "human.jsonl"), "file", 0, "human"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing.jsonl", "no such file"),
        ("model@top-p", "how many responses"),
        ("model@top-p:0", "how many responses"),
        ("model@topp:2", "did you mean 'top-p'"),
        ("http://localhost/v1@top-p:2", "known: chat, completions"),
    ],
)
def test_what_cannot_be_parsed(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source(text)


# --- several sources ---------------------------------------------------------------------------------------------


def test_a_mixture_answers_every_query_and_tags_every_response(model: Path, queries: Path, tmp_path: Path) -> None:
    """Two policies of a model and a file of people's responses, joined by the query."""
    human = tmp_path / "people.jsonl"
    same_id = {"id": "q1", "query": "The river number 1", "responses": ["With its id."]}
    by_query = {"id": "elsewhere", "query": "The river number 3", "responses": ["By query."], "sources": ["human/a"]}
    human.write_text("".join(json.dumps(row) + "\n" for row in (same_id, by_query)))
    output = tmp_path / "mixed.jsonl"
    assert main(flags(queries, output, f"{model}@diverse-beam:2", f"{model}@top-p:3", str(human))) == 0
    records = list(read_records(output))
    assert [record.id for record in records] == [f"q{i}" for i in range(5)]
    for record in records:
        tags = [tag for joined in record.sources for tag in joined.split("|")]
        wanted = [f"model@diverse-beam/{i}" for i in range(2)] + [f"model@top-p/{i}" for i in range(3)]
        wanted += {"q1": ["people/0"], "q3": ["human/a"]}.get(record.id, [])
        kept = [tag for tag in wanted if tag in tags]
        assert sorted(tags) == sorted(kept)  # none twice, none made up; empty responses alone may be missing
        assert len(set(record.responses)) == len(record.responses)
    assert "With its id." in records[1].responses
    assert "By query." in records[3].responses
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixed.jsonl", "people.jsonl", "queries.jsonl"]


def joined(
    folder: Path, data: list[Record], rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> list[Record]:
    """What a file of ``rows``, "people", gives the records of ``data``; the summary is in ``caplog``."""
    write_records(folder / "data.jsonl", data)
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, people = folder / "joined.jsonl", str(folder / "people.jsonl")
    model = ModelSettings("", "cpu")
    with caplog.at_level(logging.INFO, "rrhf"):
        sample_file(folder / "data.jsonl", output, model, sampling(), TextSettings(), sources=[people])
    return list(read_records(output))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)
    return caplog


def test_all_rows_of_a_query_join_it(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """With scores and ids or without; a merged tag is renamed in all its parts, and no two responses share one."""
    rows = [
        {
            "query": "one",
            "responses": ["a", "b"],
            "scores": [1, 0],
            "sources": ["provided/0|provided/2|ann/0", "ben/0"],
        },
        {"query": "two", "responses": ["elsewhere"]},
        {"query": "one", "responses": ["c", "d"]},
        {"query": "one", "responses": ["e"], "id": "q"},
    ]
    (record,) = joined(tmp_path, [Record("one", id="q")], rows, said)
    assert record.responses == ["a", "b", "c", "d", "e"]
    assert record.sources == ["people/0|people/2|ann/0", "ben/0", "people/3", "people/4", "people/5"]
    assert record.scores == [1, 0, None, None, None]


def test_an_id_alone_joins_nothing(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """Another file has given the same ids to other queries; keys of a message may stand in another order."""
    chat = [{"role": "user", "content": "three"}]
    data = [Record("one", id="0"), Record("two", id="1"), Record(chat, id="2")]
    rows = [
        {"id": 0, "query": "two", "responses": ["To two."]},
        {"id": 1, "query": "nothing", "responses": ["To nothing."]},
        {"id": 7, "query": [dict(reversed(chat[0].items()))], "responses": ["To three."]},
    ]
    found = joined(tmp_path, data, rows, said)
    assert {record.id: record.responses for record in found} == {"1": ["To two."], "2": ["To three."]}
    assert "2 queries joined with responses of" in said.text
    assert f"1 queries without a response in {tmp_path / 'people.jsonl'}" in said.text


def test_a_file_that_answers_no_query_is_refused_before_any_work(
    model: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    human, output = tmp_path / "people.jsonl", tmp_path / "out.jsonl"
    human.write_text(json.dumps({"id": "q1", "query": "Another.", "responses": ["Yes."]}))
    for specs in ([str(human)], [f"{model}@top-p:2", str(human)]):
        message = refused(flags(queries, output, *specs), capsys, monkeypatch)
        assert f"{human}: no query of {queries} has a response in it: " in message
        assert not output.exists()


def test_an_index_that_does_not_fit_the_temporary_folder(
    queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    human, connect = tmp_path / "people.jsonl", sqlite3.connect
    rows = [{"query": f"The river number {i}", "responses": ["x" * 9000]} for i in range(9)]
    human.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def small(place: Path) -> sqlite3.Connection:
        store = connect(place)
        store.execute("PRAGMA max_page_count = 4")
        return store

    monkeypatch.setattr(sqlite3, "connect", small)
    message = refused(flags(queries, tmp_path / "out.jsonl", str(human)), capsys, monkeypatch)
    assert f"{tempfile.gettempdir()}: cannot hold the index of {human} (database or disk is full)" in message
    assert "TMPDIR" in message and "Traceback" not in message


def drawn(output: Path, tag: str) -> list[list[str]]:
    """The responses that carry the tag, in order, a list a record; empty ones are not in the file."""
    texts = []
    for record in read_records(output):
        by_tag = {t: r for r, s in zip(record.responses, record.sources, strict=True) for t in s.split("|")}
        texts.append([text for t, text in by_tag.items() if t.rpartition("/")[0] == tag])
    return texts


def test_each_source_of_a_mixture_gives_what_it_gives_alone(model: Path, queries: Path, tmp_path: Path) -> None:
    """Neither other sources nor one more like it, added behind it, change what a source draws."""
    mixtures = {
        "alone": [f"{model}@top-p:2"],
        "both": [f"{model}@beam:2", f"{model}@top-p:2"],
        "twice": [f"{model}@top-p:2", f"{model}@beam:2", f"{model}@top-p:2"],
    }
    for name, specs in mixtures.items():
        assert main(flags(queries, tmp_path / f"{name}.jsonl", *specs)) == 0
    alone = drawn(tmp_path / "alone.jsonl", "model@top-p")
    assert sum(map(len, alone)) >= 8
    assert drawn(tmp_path / "both.jsonl", "model@top-p") == alone
    assert drawn(tmp_path / "twice.jsonl", "model@top-p-1") == alone


def test_two_equal_sources_draw_from_streams_of_their_own(model: Path, queries: Path, tmp_path: Path) -> None:
    output = tmp_path / "twice.jsonl"
    assert main(flags(queries, output, f"{model}@top-p:2", f"{model}@top-p:2", f"{model}@top-k:2")) == 0
    first, second, third = (drawn(output, f"model@{name}") for name in ("top-p-1", "top-p-2", "top-k"))
    for i in range(5):
        assert not set(first[i]) & set(second[i])
    # Nor do policies that could choose the same tokens by the same numbers begin alike.
    assert [texts[0][:1] for texts in first] != [texts[0][:1] for texts in third]


def test_the_seeds_of_two_equal_endpoints_differ(queries: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with bad.misbehaving() as server:
        output = tmp_path / "twice.jsonl"
        assert main(flags(queries, output, f"{server.url}#m@chat:1", f"{server.url}#m@chat:1")) == 0
        asked = [(post["messages"][0]["content"], post["seed"]) for post in server.posts]
    assert len(asked) == 2 * (1 + 5) and len(set(asked)) == len(asked)  # the checks' too
    assert all(len(record.responses) == 2 for record in read_records(output))


def test_a_run_without_sources_draws_by_its_seed_and_the_records_alone(model: Path, queries: Path) -> None:
    """The streams that finished runs were drawn from: no source's tag stands in them."""
    from rrhf.models.cache import PolicyCache
    from rrhf.sampling.sources.build import build_sources
    from rrhf.sampling.sources.source import Shared

    settings = sampling()
    named = ModelSettings(str(model), "cpu", "float32")
    shared = Shared(named, settings, TextSettings(), EndpointLimits(), PolicyCache(), queries.with_suffix(".parts"))
    (source,) = build_sources([], shared)
    by_source = dict(source.answer(list(read_records(queries)), Counter()))
    network, tokenizer = load_policy(named)
    for i, record in enumerate(sample(read_records(queries), network, tokenizer, settings)):
        assert by_source[i] == record


def test_a_finished_source_is_not_asked_again(
    model: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second source, the first one's pass stands; the end is that of an undisturbed run."""
    specs = (f"{model}@beam:2", f"{model}@top-p:2")
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert main(flags(queries, undisturbed, *specs)) == 0
    output = tmp_path / "out.jsonl"
    asked: list[str] = []
    answer = LocalModel.answer

    def stop_in_the_second(self: Any, records: list[Record], counts: Any) -> Any:
        asked.append(self.tag)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, records, counts)

    monkeypatch.setattr(LocalModel, "answer", stop_in_the_second)
    assert main(flags(queries, output, *specs)) == 130
    assert not output.exists()
    assert main(flags(queries, output, *specs)) == 0
    assert asked == ["model@beam", "model@top-p", "model@top-p"]
    assert output.read_bytes() == undisturbed.read_bytes()


def test_parts_of_other_weights_in_the_same_folder_are_refused(
    queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, trained further into the same folder, run again: what the earlier weights said is not taken up."""
    model = tiny.write_model(tmp_path / "policy")
    arguments = [*flags(queries, tmp_path / "out.jsonl", f"{model}@beam:2", f"{model}@top-p:2")]
    answer = LocalModel.answer

    def stop_in_the_second(self: Any, records: list[Record], counts: Any) -> Any:
        if "top-p" in self.tag:
            raise KeyboardInterrupt
        return answer(self, records, counts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "answer", stop_in_the_second)
        assert main(arguments) == 130
    network, _ = load_policy(ModelSettings(str(model), "cpu", "float32"))
    with torch.no_grad():
        network.get_input_embeddings().weight[0, 0] += 1.0
    network.save_pretrained(model)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "other settings (policy@beam weights was " in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_parts_of_a_policy_whose_code_changed_are_refused(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "policy")
    tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(9))
    code, own = (
        "from rrhf.sampling.policies import Draws\n\ndef make(*how):\n    return Draws(*how)\n",
        tmp_path / "own.py",
    )
    own.write_text(code, encoding="utf-8")
    command = ("sample", "--model", "policy", "--data", "queries.jsonl", "--policy", "own:make", "--output",
               "out.jsonl", "--device", "cpu", "--max_new_tokens", "4", "--batch_size", "1")  # fmt: skip
    killed = tiny.warm(*command, cwd=tmp_path, faults=[tiny.die("rrhf.sampling.sampler:Sampler.extend", 2)])
    assert killed.code == -signal.SIGKILL, killed.err[-2000:]
    own.write_text(code.replace("(*how):", "(*how):  # others"), encoding="utf-8")
    refused = tiny.warm(*command, cwd=tmp_path)
    assert refused.code == 2 and "other settings (policy_code was " in refused.err


class _Server:
    """Answers records one by one and fails at the ``fails_at``-th; counts what it was asked."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at, self.asked = fails_at, 0
        self.model = "m"

    def respond(self, records: list[Record]) -> Any:
        for i, record in enumerate(records):
            self.asked += 1
            if self.asked == self.fails_at:
                raise UserError("the server is gone")
            yield i, [f"answer to {record.id}"], ["stop"]

    def check(self) -> None: ...

    def check_query(self, record: Record) -> None: ...

    def close(self) -> None: ...


def test_what_a_server_answered_is_kept_when_it_fails(tmp_path: Path) -> None:
    """Answers that were paid for are in the journal at once, a torn last line aside, and only for the same queries."""
    records = [Record(f"q {i}", id=str(i)) for i in range(6)]
    folder, counts = tmp_path / "parts", Counter[str]()
    first = PaidSource(_Server(4), "server", {}, folder)
    with pytest.raises(UserError, match="gone"):
        dict(first.answer(records, counts))
    (journal,) = folder.iterdir()
    with journal.open("a") as file:
        file.write('{"id": "3", "query": "q')  # without an end
    second = _Server(5 - 3)
    with pytest.raises(UserError, match="gone"):
        dict(PaidSource(second, "server", {}, folder).answer(records, counts))
    third = _Server(None)
    answers = dict(PaidSource(third, "server", {}, folder).answer(records, counts))
    assert third.asked == 2
    assert [answers[i].responses for i in range(6)] == [[f"answer to {i}"] for i in range(6)]
    assert answers[0].sources == ["server/0"]
    for changed, tag in ((records, "other"), ([Record(f"Q {i}", id=str(i)) for i in range(6)], "server")):
        fourth = _Server(None)
        answers = dict(PaidSource(fourth, tag, {}, folder).answer(changed, counts))
        assert fourth.asked == 6 and answers[3].query == changed[3].query


def test_answers_of_another_model_at_the_same_address_are_not_taken_up(tmp_path: Path) -> None:
    """Its name was not given: it is what the server said it has."""
    records = [Record(f"q {i}", id=str(i)) for i in range(6)]
    first, second = _Server(4), _Server(None)
    second.model = "another"
    with pytest.raises(UserError, match="gone"):
        dict(PaidSource(first, "server", {}, tmp_path).answer(records, Counter()))
    paid = PaidSource(second, "server", {"url": "u"}, tmp_path)
    assert paid.settings == {"url": "u", "name": "another"}
    dict(paid.answer(records, Counter()))
    assert second.asked == 6


def test_greedy_stays_greedy_at_a_server_and_engines_refuse_policies_they_lack(tmp_path: Path) -> None:
    shared = Shared(
        ModelSettings("m"), sampling(policy="greedy", num_responses=1), TextSettings(), EndpointLimits(),
        PolicyCache(), tmp_path,
    )  # fmt: skip
    (server,) = build_sources(["http://localhost:1/v1@chat:1"], shared)
    assert server.responder.sampling.policy == "greedy"
    for engine in ("vllm", "openvino"):
        with pytest.raises(UserError, match="policies of its own alone"):
            build_sources([f"{engine}:m@my_policies:best:2"], shared)


def test_every_source_but_a_server_has_a_digest(model: Path, tmp_path: Path) -> None:
    (tmp_path / "human.jsonl").write_text("{}")
    kinds = [f"{model}@top-p:1", f"vllm:{model}@top-p:1", f"openvino:{model}@top-p:1"]
    assert len({source_digest(parse_source(kind)) for kind in kinds}) == 1  # of one folder
    assert source_digest(parse_source(str(tmp_path / "human.jsonl"))) != source_digest(parse_source(kinds[0]))
    assert source_digest(parse_source("http://localhost:1/v1@chat:1")) is None


# --- faults before any long work ---------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a command that must stop before a model is loaded."""

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rrhf.models.cache.load_policy_or_adapter", loaded)
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_an_endpoint_that_is_down_stops_a_mixture_at_once(
    model: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    url = f"http://127.0.0.1:{closed_port()}/v1"
    output = tmp_path / "out.jsonl"
    message = refused(flags(queries, output, f"{model}@top-p:2", f"{url}#m@chat:1"), capsys, monkeypatch)
    assert url in message
    assert "Traceback" not in message
    assert not output.exists()


def test_messages_for_a_model_without_a_template_stop_a_mixture_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny.write_model(tmp_path / "plain", chat=False)
    data = tmp_path / "chat.jsonl"
    write_records(data, [Record([{"role": "user", "content": "hello"}])])
    specs = (f"{plain}@top-p:2", f"{plain}@greedy:1")
    assert "no chat template" in refused(flags(data, tmp_path / "out.jsonl", *specs), capsys, monkeypatch)


def test_a_context_that_is_too_long_stops_a_mixture_at_once(
    model: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(queries, tmp_path / "out.jsonl", f"{model}@top-p:2", f"{model}@greedy:1")
    arguments[arguments.index("--max_new_tokens") + 1] = "1000000"
    assert "context" in refused(arguments, capsys, monkeypatch)


def test_no_model_and_no_source(queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--data", str(queries), "--output", str(tmp_path / "o.jsonl")]) == 2
    assert "--model or --source is missing" in capsys.readouterr().err


def test_a_model_beside_sources_is_refused(queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags(queries, tmp_path / "o.jsonl", str(queries)), "--model", "m"]) == 2
    assert "write it as a --source too, MODEL@POLICY:N" in capsys.readouterr().err


def test_queries_left_without_a_response_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal responses are merged, empty ones dropped; a query with none left goes, and all of it is said."""
    answers = {"a": ["same", "same", "other"], "b": ["", "  "]}

    def answer(self: Any, records: list[Record], counts: Any) -> Any:
        for i, record in enumerate(records):
            texts = answers[record.id]
            yield i, record.with_responses(texts, ["stop"] * len(texts), [f"m/{n}" for n in range(len(texts))])

    monkeypatch.setattr(LocalModel, "answer", answer)
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)
    with caplog.at_level(logging.INFO, "rrhf"):
        data = [Record("one", id="a"), Record("two", id="b")]
        sample_file(data, output, ModelSettings("m", "cpu"), sampling(), TextSettings())
    (kept,) = read_records(output)
    assert (kept.responses, kept.sources) == (["same", "other"], ["m/0|m/1", "m/2"])
    assert "1 equal responses merged" in caplog.text
    assert "2 empty responses dropped" in caplog.text
    assert "1 queries left without a response" in caplog.text


def test_an_output_without_a_record_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no file is left that a second command would take for finished work."""

    def answer(self: Any, records: list[Record], counts: Any) -> Any:
        for i, record in enumerate(records):
            yield i, record.with_responses([" "], ["stop"], ["m/0"])

    monkeypatch.setattr(LocalModel, "answer", answer)
    output, data = tmp_path / "out.jsonl", [Record("one"), Record("two")]
    for _ in range(2):
        with pytest.raises(UserError, match=r"no query has a response.*2 empty responses dropped; 2 queries left"):
            sample_file(data, output, ModelSettings("m", "cpu"), sampling(), TextSettings())
        assert not list(tmp_path.iterdir())
