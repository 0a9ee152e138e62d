"""The reward ``judge:FILE`` at a real server on loopback: what is asked, read, asked again, kept and counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rrhf.common.endpoint import BudgetReached
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.records.record import Record
from rrhf.rewards.judges.judge import answer_schema, shuffled
from rrhf.rewards.judges.reward import JudgeScorer, estimate_judge, judge_digest
from rrhf.rewards.judges.template import JudgeTemplate
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import reward_digest, score_records
from support import misbehaving as bad
from support.judge_replies import ASPECTS
from support.ports import closed_port

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")

RECORDS = [
    Record(query=f"question {i}", responses=[f"answer {j} quality {(i + j) % 5 + 1}" for j in range(3)], id=f"r{i}")
    for i in range(4)
]
SUMS = [[4.0 * ((i + j) % 5 + 1) for j in range(3)] for i in range(4)]


@pytest.fixture
def server() -> Iterator[bad.Misbehaving]:
    with bad.misbehaving() as running:
        running.default = judges
        yield running


@pytest.fixture
def file(tmp_path: Path, server: bad.Misbehaving) -> Callable[..., str]:
    def write(**values: Any) -> str:
        path = tmp_path / "judge.yaml"
        path.write_text(yaml.safe_dump({"url": server.url, "model": "m", **values}), encoding="utf-8")
        return str(path)

    return write


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def shown(body: dict[str, Any]) -> list[str]:
    """The responses of a request, in the order in which the judge sees them."""
    return re.findall(r"Response \d+:\n<<begin .*>>\n(.*)\n<<end", prompt_of(body))


def judges(handler: bad.Handler, body: dict[str, Any]) -> None:
    """Score each response, on each aspect, by the number that it ends in."""
    scores = [(re.findall(r"\d", text) or ["1"])[-1] for text in shown(body)]
    if "response_format" in body:
        names = body["response_format"]["json_schema"]["schema"]["required"]
        assert len(names) == len(scores) or body["max_tokens"] == 1
        reply = json.dumps({name: dict.fromkeys(ASPECTS, int(score)) for name, score in zip(names, scores)})
    else:
        reply = "\n".join(
            f"Response {place}: " + ", ".join(f"{name}: {score}" for name in ASPECTS)
            for place, score in enumerate(scores, 1)
        )
    handler.send_json(bad.answer(body, [reply]))


def refuses_schemas(handler: bad.Handler, body: dict[str, Any]) -> None:
    if "response_format" in body:
        handler.send_json({"error": {"message": "response_format is not supported"}}, 400)
    else:
        judges(handler, body)


def scored(name: str, records: list[Record] = RECORDS, **context: Any) -> list[list[float | None]]:
    return [record.scores for record in score_records(records, [f"judge:{name}"], context=RewardContext(**context))]


def work(server: bad.Misbehaving) -> list[dict[str, Any]]:
    """The requests that were no checks."""
    return [post for post in server.posts if post["max_tokens"] > 1]


def test_sums_of_aspects_by_one_call_a_record(server: bad.Misbehaving, file: Callable[..., str]) -> None:
    assert scored(file()) == SUMS
    assert len(work(server)) == len(RECORDS)
    schema = work(server)[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["Response 1", "Response 2", "Response 3"]
    assert schema["properties"]["Response 1"]["properties"]["Safety"] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_servers_without_schemas_are_asked_in_words(
    server: bad.Misbehaving, file: Callable[..., str], kind: str
) -> None:
    server.default = refuses_schemas
    assert scored(file(kind=kind)) == SUMS
    assert not any("response_format" in post for post in work(server)) and len(work(server)) == len(RECORDS)


def test_the_order_is_shuffled_by_seed_and_id_and_scores_find_back(
    server: bad.Misbehaving, file: Callable[..., str]
) -> None:
    orders = {}
    for seed in (0, 1):
        server.posts.clear()
        assert scored(file(), seed=seed) == SUMS
        orders[seed] = {prompt_of(post).split("question ")[1][0]: shown(post) for post in work(server)}
    assert orders[0] != orders[1]
    assert len({tuple(re.sub("quality .", "", text) for text in order) for order in orders[0].values()}) > 1
    assert shuffled(0, "x", 5) == shuffled(0, "x", 5) and sorted(shuffled(0, "x", 5)) == list(range(5))
    server.posts.clear()
    assert scored(file(order="given"), seed=2) == SUMS
    assert {tuple(shown(post)) for post in work(server)} == {tuple(record.responses) for record in RECORDS}


def test_nothing_is_paid_for_twice(server: bad.Misbehaving, file: Callable[..., str]) -> None:
    name = file()
    assert scored(name, RECORDS[:2]) == SUMS[:2]
    server.posts.clear()
    assert scored(name) == SUMS  # the first two stand in the journal
    assert len(work(server)) == 2
    server.posts.clear()
    server.gets = 0
    assert scored(name) == SUMS
    assert server.posts == [] and server.gets == 0  # not even a check
    assert len(list(Path(f"{name}.replies").glob("*.jsonl"))) == 1
    assert scored(file(max_tokens=77)) == SUMS  # another question
    assert len(work(server)) == len(RECORDS)


def test_refused_replies_are_asked_for_again_with_other_seeds(
    server: bad.Misbehaving, file: Callable[..., str]
) -> None:
    bad_reply = bad.text("I would rather not say.")
    server.plan = [judges, judges, bad_reply, bad.text("Response 1: 5", finish="length"), judges]
    assert scored(file(tries=3, temperature=0.1), RECORDS[:1]) == SUMS[:1]
    asked = work(server)
    assert len(asked) == 3 and len({post["seed"] for post in asked}) == 3
    assert [post["temperature"] for post in asked] == [0.1, 0.7, 0.7]


def test_what_cannot_be_read_is_null_and_counted(
    server: bad.Misbehaving, file: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    def sulks(handler: bad.Handler, body: dict[str, Any]) -> None:
        if "question 2" in prompt_of(body):
            bad.text("Response 1: Relevance: 5, Correctness: 5, Coherence: 5, Safety: 5")(handler, body)
        else:
            judges(handler, body)

    server.default = sulks
    name = file(tries=2)
    caplog.set_level("INFO")
    assert scored(name) == [*SUMS[:2], [None] * 3, SUMS[3]]
    assert "3 of 4 calls scored (5 replies asked for, 2 refused: 2 response 2 is missing)" in caplog.text
    server.posts.clear()
    assert scored(name)[2] == [None] * 3  # refused replies were paid for, too
    assert server.posts == []


def test_a_stopped_run_keeps_what_it_has(server: bad.Misbehaving, file: Callable[..., str]) -> None:
    name = file()
    with pytest.raises(BudgetReached):
        scored(name, remote=EndpointLimits(concurrency=1, max_requests=4))  # two checks and two records
    server.posts.clear()
    assert scored(name) == SUMS
    assert len(work(server)) == 2
    server.plan = [judges, bad.status(404, "gone")]
    with pytest.raises(UserError, match="record new: HTTP 404: gone"):
        scored(name, [*RECORDS, Record(query="q", responses=["a 1", "b 2"], id="new")])


@pytest.mark.parametrize("alone", [False, True])
def test_one_of_several_processes_has_its_share(
    alone: bool, server: bad.Misbehaving, file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    limits = EndpointLimits(concurrency=1, max_requests=8)
    if alone:
        assert scored(file(), remote=limits, alone=True) == SUMS
    else:
        with pytest.raises(BudgetReached, match="the budget's 4 requests are spent"):
            scored(file(), remote=limits)


def test_a_record_that_the_server_will_not_take_has_no_score(
    server: bad.Misbehaving, file: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    def filters(handler: bad.Handler, body: dict[str, Any]) -> None:
        if "question 2" in prompt_of(body):
            handler.send_json({"error": {"message": "the prompt is 9,000 tokens long"}}, 400)
        else:
            judges(handler, body)

    server.default = filters
    caplog.set_level("INFO")
    name = file()
    assert scored(name) == [*SUMS[:2], [None] * 3, SUMS[3]]
    assert "record r2: HTTP 400: the prompt is 9,000 tokens long: shorten or take out the record" in caplog.text
    assert "3 of 4 calls scored (3 replies asked for, 1 refused: 1 refused by the server: HTTP 400)" in caplog.text
    assert sum("question 2" in prompt_of(post) for post in work(server)) == 1
    server.posts.clear()
    assert scored(name) == [*SUMS[:2], [None] * 3, SUMS[3]]
    assert server.posts == []  # another command does not ask again
    assert "1 requests are not made again that the server refused before" in caplog.text
    assert estimate_judge(name, RECORDS, RewardContext())["cached"] == 4
    (journal,) = Path(f"{name}.replies").iterdir()
    assert journal.read_text().count("the prompt is 9,000 tokens long") == 1
    server.default = judges  # one that takes longer prompts
    assert scored(file(tries=3)) == [*SUMS[:2], [None] * 3, SUMS[3]] and server.posts == []  # fewer tries ask no more
    assert scored(file(tries=5)) == SUMS
    assert len(work(server)) == 1


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            bad.text("Response 1: Rel", finish="length"),
            "cut by the limit of its tokens: raise max_tokens, which is 512",
        ),
        (bad.text("No."), "no response is named: look at the replies: the model does not do what the prompt asks"),
        (bad.status(400, "too long"), "refused by the server: HTTP 400: shorten the records"),
    ],
)
def test_a_judge_without_hope_is_not_asked_on(
    server: bad.Misbehaving, file: Callable[..., str], reply: bad.Behaviour, words: str
) -> None:
    many = [replace(RECORDS[0], id=f"m{i}", query=f"number {i}") for i in range(200)]
    server.default = lambda handler, body: (judges if body["max_tokens"] == 1 else reply)(handler, body)
    with pytest.raises(UserError, match=f"none of the first 64 calls could be scored: {words}"):
        scored(file(), many)
    assert len(work(server)) == 64


def test_what_a_server_takes_is_not_learned_from_its_failures(
    server: bad.Misbehaving, file: Callable[..., str]
) -> None:
    name = file()
    with pytest.raises(BudgetReached):
        scored(name, remote=EndpointLimits(max_requests=1))  # between the check and the question about schemas
    server.plan = [judges, bad.status(503), bad.status(503)]
    with pytest.raises(UserError, match="HTTP 503"):
        scored(name, remote=EndpointLimits(max_retries=0))
    server.plan = [judges, bad.status(503)]  # and a moment later it is there again
    with pytest.raises(UserError, match=r"HTTP 503: .*`json: never` in the judge's file asks without"):
        scored(name, remote=EndpointLimits(max_retries=0))
    server.posts.clear()
    assert scored(name) == SUMS
    assert all("response_format" in post for post in work(server))


def test_a_judge_that_is_down(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(f"url: http://127.0.0.1:{closed_port()}/v1\nmodel: m\n", encoding="utf-8")
    with pytest.raises(UserError, match="check that it is the API's root, often ending in /v1, that the server is up"):
        scored(str(path), remote=EndpointLimits(max_retries=0))


def test_a_server_that_is_not_told_its_model(server: bad.Misbehaving, file: Callable[..., str]) -> None:
    name = file(model=None)
    assert scored(name) == SUMS
    assert work(server)[0]["model"] == "m"
    server.posts.clear()
    assert scored(name) == SUMS
    assert work(server) == []
    server.models = ["another"]
    assert scored(name) == SUMS
    assert len(work(server)) == len(RECORDS)  # another model's replies are others


def test_files_are_checked_before_any_work(tmp_path: Path, file: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="no such file"):
        score_records([], [f"judge:{tmp_path / 'none.yaml'}"])
    with pytest.raises(UserError, match=r"place \{responses\}"):
        score_records([], [f"judge:{file(prompt='Rate {query}', aspects=['A'], range=[1, 2])}"])


def test_the_digest_changes_with_what_is_asked(file: Callable[..., str]) -> None:
    context = RewardContext()
    before = judge_digest(file(), context)
    assert before == reward_digest(f"judge:{file()}", context)
    assert before != judge_digest(file(), RewardContext(seed=1))
    assert before != judge_digest(file(aspects=["Charm"]), context)


def test_the_estimate_asks_nothing(server: bad.Misbehaving, file: Callable[..., str]) -> None:
    name = file(price=[1.0, 2.0], max_tokens=50)
    before = estimate_judge(name, RECORDS, RewardContext())
    assert server.posts == [] and server.gets == 0
    assert (before["calls"], before["cached"], before["reply_tokens"]) == (4, 0, 200)
    prompts = before["prompt_tokens"]
    assert prompts is not None and 4 * 250 < prompts < 4 * 700
    assert before["cost"] == pytest.approx((prompts * 1.0 + 200 * 2.0) / 1e6)
    assert before["most"] == pytest.approx(4 * (prompts * 1.0 + 200 * 2.0) / 1e6)
    scored(name, RECORDS[:3])
    after = estimate_judge(name, RECORDS, RewardContext())
    assert (after["cached"], after["reply_tokens"]) == (3, 50)
    assert after["cost"] is not None and after["most"] == pytest.approx(4 * after["cost"])


def test_the_estimate_knows_of_replies_that_are_asked_for_again(
    server: bad.Misbehaving, file: Callable[..., str]
) -> None:
    name = file(price=[1.0, 2.0], tries=3)
    server.plan = [judges, judges, bad.text("No.")]
    with pytest.raises(BudgetReached):  # two checks, one reply that cannot be read
        scored(name, RECORDS[:1], remote=EndpointLimits(max_requests=3))
    found = estimate_judge(name, RECORDS[:1], RewardContext())
    assert found["cached"] == 0 and found["cost"] and found["most"] == pytest.approx(2 * found["cost"])
    server.default = bad.text("No.")
    assert scored(name, RECORDS[:1]) == [[None] * 3]
    spent = estimate_judge(name, RECORDS[:1], RewardContext())  # nothing more would be asked
    assert (spent["cached"], spent["cost"], spent["most"]) == (1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "schema"),
    [
        ({"range": (0, 1)}, {"type": "number", "minimum": 0, "maximum": 1}),
        ({"range": (0, 1), "integers": True}, {"type": "integer", "enum": [0, 1]}),
        ({"range": (1, 5)}, {"type": "integer", "enum": [1, 2, 3, 4, 5]}),
        ({"range": (0, 100)}, {"type": "number", "minimum": 0, "maximum": 100}),
        ({"range": (0, 100), "integers": True}, {"type": "integer", "minimum": 0, "maximum": 100}),
    ],
)
def test_a_schema_does_not_take_fractions_from_a_narrow_range(settings: dict[str, Any], schema: dict[str, Any]) -> None:
    template = JudgeTemplate(url="http://x/v1", prompt="{query} {responses}", aspects=("Q",), **settings)
    whole = answer_schema(template, 1)["json_schema"]["schema"]
    assert whole["properties"]["Response 1"]["properties"]["Q"] == schema


def test_two_records_that_are_equal_but_for_their_ids(file: Callable[..., str], server: bad.Misbehaving) -> None:
    scorer = JudgeScorer(file(), RewardContext())
    twins = [Record(query="q", responses=["a 1", "b 3"], id=name) for name in "xy"]
    assert scorer([(twins[0], 0), (twins[1], 1), (twins[0], 1), (twins[1], 0)]) == [4.0, 12.0, 12.0, 4.0]
    assert len(work(server)) == 2
