from __future__ import annotations

import contextlib
import dataclasses
import datetime
import email.utils
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rrhf.cli.main import main
from rrhf.common.endpoint import BudgetReached
from rrhf.common.endpoint_settings import EndpointSettings
from rrhf.common.errors import UserError
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.build import source_seed
from rrhf.sampling.sources.parsing import parse_source
from rrhf.sampling.sources.server import Endpoint, request_seed
from support import misbehaving as bad
from support import tiny
from support.models import tiny_model
from support.ports import closed_port, free_port

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")

KEY = "sk-test-4f1c9a7be2d80c35"
RECORDS = [Record(query=f"question {i}", id=f"r{i}") for i in range(6)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


@pytest.fixture
def server() -> Iterator[bad.Misbehaving]:
    with bad.misbehaving() as running:
        yield running


@pytest.fixture
def make(server: bad.Misbehaving) -> Callable[..., Endpoint]:
    """An endpoint at the misbehaving server whose check is passed; its waits are noted in ``waits`` and not waited."""

    def maker(
        sampling: SamplingSettings | None = None, check: bool = True, num_responses: int | None = 1, **settings: Any
    ) -> Endpoint:
        waits: list[float] = []

        async def note(seconds: float) -> None:
            waits.append(seconds)

        given = {"url": server.url, "model": "m", "timeout": 30.0, **settings}
        sampling = dataclasses.replace(sampling or SamplingSettings(), num_responses=num_responses)
        endpoint = Endpoint(EndpointSettings(**given), sampling, sleep=note)
        endpoint.waits = waits  # type: ignore[attr-defined]
        if check:
            endpoint.check()
            server.posts.clear()
        return endpoint

    return maker


def collect(
    endpoint: Endpoint, records: list[Record]
) -> tuple[dict[int, tuple[list[str], list[str]]], Exception | None]:
    """What was yielded, and the error at the end if there was one."""
    got: dict[int, tuple[list[str], list[str]]] = {}
    try:
        for i, texts, finish in endpoint.respond(records):
            assert i not in got
            got[i] = texts, finish
    except UserError as error:
        return got, error
    return got, None


def expected(record: Record, numbers: range = range(1), seed: int = 0) -> list[str]:
    return [f"{record.query}, {request_seed(seed, record.id, number)}, 0" for number in numbers]


# --- what is asked


def test_asks_for_all_responses_of_a_record_in_one_request(make: Any, server: bad.Misbehaving) -> None:
    sampling = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=5, stop=["END"], seed=3)
    endpoint = make(sampling, num_responses=3)
    got, error = collect(endpoint, RECORDS)
    assert error is None and sorted(got) == list(range(6))
    for i, record in enumerate(RECORDS):
        seed = request_seed(3, record.id, 0)
        assert got[i] == ([f"{record.query}, {seed}, {n}" for n in range(3)], ["stop"] * 3)
    assert len(server.posts) == 6
    post = next(post for post in server.posts if post["messages"][0]["content"] == "question 2")
    assert post == {
        "model": "m",
        "messages": [{"role": "user", "content": "question 2"}],
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["END"],
        "n": 3,
        "seed": request_seed(3, "r2", 0),
    }


def test_messages_template_arguments_and_top_k_are_sent(server: bad.Misbehaving) -> None:
    text = TextSettings(system_prompt="Be brief.", chat_template_kwargs='{"enable_thinking": false}')
    sampling = SamplingSettings(policy="top-k", top_k=7, num_responses=1)
    query = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "d"}]
    endpoint = Endpoint(EndpointSettings(server.url, model="m", concurrency=1), sampling, text)
    got, error = collect(endpoint, [Record(query=query), Record(query=own)])
    assert error is None and len(got) == 2
    assert server.posts[-2]["messages"] == [{"role": "system", "content": "Be brief."}, *query]
    assert server.posts[-1]["messages"] == own
    assert server.posts[-1]["top_k"] == 7 and server.posts[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_greedy_is_temperature_0(make: Any, server: bad.Misbehaving) -> None:
    collect(make(SamplingSettings(policy="greedy", temperature=0.7), num_responses=None), RECORDS[:1])
    assert server.posts[0]["temperature"] == 0 and server.posts[0]["top_p"] == 1 and "n" not in server.posts[0]


def test_completions_take_plain_text_and_refuse_messages(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(kind="completions")
    got, error = collect(endpoint, RECORDS[:2])
    assert error is None and got[0][0] == expected(RECORDS[0])
    assert {post["prompt"] for post in server.posts} == {"question 0", "question 1"}
    messages = Record(query=[{"role": "user", "content": "a"}], id="chatty")
    got, error = collect(endpoint, [RECORDS[0], messages])
    assert got == {} and len(server.posts) == 2  # nothing is asked before all queries are known to suit
    assert "record chatty" in str(error) and "kind chat" in str(error)


def test_the_only_model_is_taken_and_several_are_listed(server: bad.Misbehaving) -> None:
    endpoint = Endpoint(EndpointSettings(server.url))
    endpoint.check()
    assert endpoint.client.model == "m" and server.posts[0]["model"] == "m"
    server.models = ["large", "small"]
    with pytest.raises(UserError, match=r"offers large, small: give the model's name"):
        Endpoint(EndpointSettings(server.url)).check()
    server.models = []
    with pytest.raises(UserError, match="lists no model: give the model's name"):
        Endpoint(EndpointSettings(server.url)).check()


def test_a_server_that_refuses_top_k_fails_the_check(server: bad.Misbehaving) -> None:
    server.default = bad.status(422, "Unexpected fields in the request: {'top_k'}")
    sampling = SamplingSettings(policy="top-k", top_k=5, num_responses=1)
    with pytest.raises(UserError, match=r"HTTP 422: Unexpected fields in the request: .'top_k'"):
        Endpoint(EndpointSettings(server.url, model="m"), sampling).check()


@pytest.mark.parametrize("at_most", [1, 2])
def test_a_server_that_gives_fewer_choices_is_asked_again(make: Any, server: bad.Misbehaving, at_most: int) -> None:
    server.most_choices = at_most
    got, error = collect(make(num_responses=3), RECORDS)
    assert error is None
    for i, record in enumerate(RECORDS):
        first, second, third = (request_seed(0, record.id, number) for number in range(3))
        seeds = {1: [(first, 0), (second, 0), (third, 0)], 2: [(first, 0), (first, 1), (third, 0)]}[at_most]
        assert got[i][0] == [f"{record.query}, {seed}, {number}" for seed, number in seeds]
    assert len(server.posts) == 6 * {1: 3, 2: 2}[at_most]
    assert all("n" not in post for post in server.posts) == (at_most == 1)


def test_a_server_that_refuses_n_is_asked_one_by_one(make: Any, server: bad.Misbehaving) -> None:
    def only_one(handler: bad.Handler, body: dict[str, Any]) -> None:
        (bad.status(400, "only one choice") if "n" in body else bad.well)(handler, body)

    server.default = only_one
    got, error = collect(make(num_responses=2), RECORDS[:1])
    assert error is None and got[0][0] == expected(RECORDS[0], range(2))


def test_finish_and_stop_strings(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(SamplingSettings(stop=["END", "\n\n"]), concurrency=1)
    server.plan = [
        bad.text("cut by the limit", "length"),
        bad.text("cut by a filter", "content_filter"),
        bad.text("nobody says", None),
        bad.text("left in: END and more", "length"),
        bad.text(" first\n\nthen END", "stop"),
        bad.text(None, "length"),  # all of it went into hidden reasoning
    ]
    got, error = collect(endpoint, RECORDS[:6])
    assert error is None and endpoint.waits == []
    assert [(texts[0], finish[0]) for texts, finish in (got[i] for i in range(6))] == [
        ("cut by the limit", "length"),
        ("cut by a filter", "length"),
        ("nobody says", "stop"),
        ("left in: ", "stop"),
        (" first", "stop"),
        ("", "length"),
    ]


# --- what goes wrong and passes


def test_waits_as_long_as_retry_after_says(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=1)
    server.plan = [bad.status(429, headers={"Retry-After": "7"}), bad.status(503, headers={"Retry-After": "2.5"})]
    got, error = collect(endpoint, RECORDS[:1])
    assert error is None and got[0][0] == expected(RECORDS[0])
    assert endpoint.waits == [7.0, 2.5]
    assert (len(server.posts), endpoint.client.retries) == (3, 2)
    assert server.posts[0] == server.posts[1] == server.posts[2]  # the same seed again


def test_retry_after_may_be_a_date(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=1)
    date = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1))
    server.plan = [bad.status(429, headers={"Retry-After": date})]
    got, error = collect(endpoint, RECORDS[:1])
    assert got == {} and "come back in 3" in str(error)  # 3,600 seconds or a few less: too long, said so


def test_others_wait_too_while_one_was_told_to(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=1)
    server.plan = [bad.status(429, headers={"Retry-After": "500"})]
    collect(endpoint, RECORDS[:2])
    assert endpoint.waits[0] == 500.0
    assert len(endpoint.waits) == 2 and 0 < endpoint.waits[1] <= 500.0  # the second record's first try


def test_backs_off_exponentially_the_same_each_time(make: Any, server: bad.Misbehaving) -> None:
    waits = []
    for _ in range(2):
        endpoint = make(concurrency=1)
        server.plan = [bad.status(500)] * 8
        got, error = collect(endpoint, RECORDS[:1])
        assert error is None and got[0][0] == expected(RECORDS[0])
        waits.append(endpoint.waits)
    assert waits[0] == waits[1] and len(set(waits[0])) == 8
    for wait, longest in zip(waits[0], [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert 0.75 * longest <= wait <= longest


BROKEN = {
    "500": bad.status(500),
    "502 with a page": lambda handler, body: handler.send_text("<html>bad gateway</html>", 502),
    "429": bad.status(429),
    "cut": bad.cut,
    "no JSON": bad.raw("<html>welcome</html>"),
    "lists in lists": bad.raw("[" * 100_000),
    "half JSON": bad.raw('{"choices": [{"te'),
    "nothing": bad.raw(""),
    "a list": bad.raw("[1]"),
    "no choices": bad.raw('{"choices": []}'),
    "an error in a 200": bad.raw('{"error": {"message": "overloaded"}}'),
    "null": bad.text(None),
    "a number": bad.text(3),
    "half a character": bad.text("\ud800"),
    "aborted": bad.text("half an ans", "abort"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_broken_answer_is_asked_for_again(make: Any, server: bad.Misbehaving, name: str, kind: str) -> None:
    endpoint = make(concurrency=2, kind=kind)
    server.plan = [BROKEN[name], BROKEN[name]]
    got, error = collect(endpoint, RECORDS[:3])
    assert error is None
    assert {i: texts for i, (texts, _) in got.items()} == {i: expected(RECORDS[i]) for i in range(3)}
    assert (len(server.posts), len(endpoint.waits)) == (5, 2)


@pytest.mark.parametrize("behaviour", [bad.hang, bad.stall])
def test_a_server_that_hangs_is_asked_again(make: Any, server: bad.Misbehaving, behaviour: Any) -> None:
    endpoint = make(concurrency=1)
    short = Endpoint(
        dataclasses.replace(endpoint.settings, timeout=0.5), endpoint.sampling, sleep=endpoint.client._sleep
    )
    server.plan = [bad.well, behaviour]  # the check, then the first record
    got, error = collect(short, RECORDS[:1])
    assert error is None and got[0][0] == expected(RECORDS[0])
    assert short.client.retries >= 1


# --- what goes wrong for good


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("500", "HTTP 500: no"),
        ("cut", "it broke"),
        ("no JSON", "no JSON: <html>welcome</html>"),
        ("no choices", "has no choices"),
        ("an error in a 200", "overloaded"),
        ("null", "no text but"),
    ],
)
def test_gives_up_and_says_where_and_what(make: Any, server: bad.Misbehaving, name: str, seen: str) -> None:
    endpoint = make(concurrency=1, max_retries=2)
    server.plan = [bad.well, bad.well]
    server.default = BROKEN[name]
    got, error = collect(endpoint, RECORDS)
    assert sorted(got) == [0, 1]  # what was done is not lost
    assert isinstance(error, UserError)
    message = str(error)
    assert server.url in message and "record r2" in message and seen in message and "(3 tries)" in message
    assert len(server.posts) == 5


def test_what_is_under_way_is_waited_for_and_kept(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=3)
    stopped, stop = threading.Event(), endpoint.client._stop
    endpoint.client._stop = lambda *arguments: (stop(*arguments), stopped.set())  # type: ignore[method-assign, func-returns-value]
    server.plan = [bad.status(400, "too long"), bad.after(stopped, bad.well), bad.after(stopped, bad.status(500))]
    got, error = collect(endpoint, RECORDS)
    assert "HTTP 400: too long" in str(error)
    assert len(got) == 1 and endpoint.waits == []  # one was on its way; the one that failed is not tried again
    assert len(server.posts) == 3  # and nothing new was asked


def test_a_hanging_server_is_given_up(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=4, timeout=1.0, max_retries=0)
    server.default = bad.hang
    got, error = collect(endpoint, RECORDS)
    assert got == {} and "no whole answer within 1 seconds: check" in str(error)


def test_an_empty_account_is_not_asked_again(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make()
    server.default = bad.status(429, "You exceeded your current quota", kind="insufficient_quota")
    _, error = collect(endpoint, RECORDS[:1])
    assert "exceeded your current quota" in str(error) and len(server.posts) == 1


def test_check_says_at_once_that_nobody_listens(make: Any) -> None:
    endpoint = make(url=f"http://127.0.0.1:{closed_port()}/v1", check=False)
    with pytest.raises(UserError, match="no connection") as caught:
        endpoint.check()
    assert endpoint.settings.url in str(caught.value) and "server is up" in str(caught.value)
    assert (endpoint.client.requests, endpoint.waits) == (1, [])
    got, error = collect(endpoint, RECORDS)  # nor is anything begun without a check
    assert got == {} and "no connection" in str(error) and endpoint.client.requests == 2


@pytest.mark.parametrize("code", [401, 403])
def test_check_names_the_variable_of_a_refused_key(
    make: Any, server: bad.Misbehaving, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.default = bad.echo_key(code)
    with pytest.raises(UserError, match=f"HTTP {code}: Incorrect API key provided: Bearer .the key.") as caught:
        make(check=False).check()
    assert "environment variable OPENAI_API_KEY" in str(caught.value) and "not set" not in str(caught.value)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}" and len(server.posts) == 1
    with pytest.raises(UserError, match="OTHER_KEY, which is not set"):
        make(check=False, api_key_env="OTHER_KEY").check()


def test_check_suggests_the_model_that_was_meant(make: Any, server: bad.Misbehaving) -> None:
    server.models = ["llama-3-8b", "qwen-2"]
    server.default = bad.status(404, "no such model")
    with pytest.raises(UserError, match=r"no such model: model llama-3-8: did you mean 'llama-3-8b'"):
        make(check=False, model="llama-3-8").check()


def test_check_refuses_a_page_that_is_no_api(make: Any, server: bad.Misbehaving) -> None:
    server.default = bad.raw("<html>hello</html>")
    endpoint = make(check=False)
    with pytest.raises(UserError, match=r"no JSON: <html>hello</html> \(3 tries\): check that it is the API's root"):
        endpoint.check()


def test_a_key_with_a_line_break_inside_is_refused_unseen(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a space") as caught:
        make(check=False).check()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "localhost:8000"}, "not an http address"),
        ({"url": "http://h/v1/chat/completions"}, "the API's root"),
        ({"url": f"http://user:{KEY}@h/v1"}, "keys come from the environment only"),
        ({"url": f"http://h/v1?api_key={KEY}"}, "keys come from the environment only"),
        ({"url": "http://h", "api_key_env": KEY}, "the name of an environment variable"),
        ({"url": "http://h", "kind": "chatt"}, "did you mean 'chat'"),
        ({"url": "http://h", "max_requests": 0}, "max_requests 0: must be at least 1"),
        ({"url": "http://h", "concurrency": 0, "timeout": 0.0}, "concurrency 0.*\n.*timeout 0"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        EndpointSettings(**settings)
    assert KEY not in str(caught.value)


def test_what_no_server_has_is_refused() -> None:
    here = EndpointSettings("http://h/v1")
    with pytest.raises(UserError, match="an endpoint has no --policy diverse-beam"):
        Endpoint(here, SamplingSettings(policy="diverse-beam"))
    with pytest.raises(UserError, match="--max_query_length needs a tokenizer"):
        Endpoint(here, text=TextSettings(max_query_length=5))
    with pytest.raises(UserError, match="need the kind chat"):
        Endpoint(EndpointSettings("http://h/v1", kind="completions"), text=TextSettings(system_prompt="s"))


# --- bounds


def test_as_many_requests_at_once_as_allowed_and_no_more(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=3, num_responses=2)
    server.default = bad.together(3)
    got, error = collect(endpoint, RECORDS)
    assert error is None and len(got) == 6
    assert server.peak == 3

    server.most_choices, server.default, server.peak = 1, bad.well, 0
    single = make(concurrency=4, num_responses=2)
    server.default = bad.together(4)
    got, error = collect(single, RECORDS)
    assert error is None and len(got) == 6 and server.peak == 4


def test_stops_before_the_budget_of_requests_is_exceeded(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=2, max_requests=5)  # one of them was the check's
    server.plan = [bad.well, bad.status(500)]
    got, error = collect(endpoint, RECORDS)
    assert isinstance(error, BudgetReached) and error.done == len(got) == 3
    assert len(server.posts) == 4 and endpoint.client.requests == 5
    assert "5 requests are spent, with 3 of 6 records done" in str(error)
    got, error = collect(endpoint, RECORDS)  # it holds for the next call too
    assert got == {} and isinstance(error, BudgetReached) and error.done == 0 and len(server.posts) == 4


def test_a_budget_that_is_enough_is_no_error(make: Any, server: bad.Misbehaving) -> None:
    got, error = collect(make(max_requests=7), RECORDS)
    assert error is None and len(got) == 6


@pytest.mark.parametrize("concurrency", [1, 4])
def test_stops_before_the_budget_of_tokens_is_exceeded(make: Any, server: bad.Misbehaving, concurrency: int) -> None:
    # An estimate is 50 tokens + 64 of overhead + 43 bytes of messages; the server then says 60. So after four
    # (and 10 for the check) 250 are spent, and 157 more could be too many.
    endpoint = make(SamplingSettings(max_new_tokens=50), concurrency=concurrency, max_tokens=400)
    server.default = bad.text("fine", usage=60)
    got, error = collect(endpoint, RECORDS)
    assert isinstance(error, BudgetReached) and error.done == len(got)
    spent = bad.USAGE + 60 * len(server.posts)
    assert endpoint.client.tokens == spent <= 400
    # Estimates hold requests back only while others are on their way: the end is the same at any concurrency.
    assert len(got) == 4 and "of the budget's 400 tokens are spent" in str(error)


def test_no_budget_for_the_check(make: Any, server: bad.Misbehaving) -> None:
    with pytest.raises(BudgetReached, match="nothing done"):
        make(check=False, max_tokens=5).check()
    assert server.posts == []


# --- the key


def test_the_key_is_sent_and_seen_nowhere(
    make: Any, server: bad.Misbehaving, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    said = []
    failures = [*BROKEN.values(), bad.echo_key(500), bad.echo_key(400), bad.echo_key(401), bad.echo_key(404)]
    echo = bad.raw(json.dumps({"detail": f"you sent {KEY}"}))
    for failure in [*failures, echo]:
        server.default = bad.well
        endpoint = make(concurrency=2, max_retries=1)
        server.default = failure
        _, error = collect(endpoint, RECORDS[:2])
        _, early = collect(make(check=False, max_retries=1), RECORDS[:2])  # a check that fails, where it does
        for caught in (error, early):
            assert caught is not None
            said += ["".join(traceback.format_exception(caught)), repr(caught)]
        said += [
            repr(endpoint),
            repr(vars(endpoint)),
            repr(vars(endpoint.client)),
            repr(dataclasses.asdict(endpoint.settings)),
        ]
    said += list(capfd.readouterr())
    said += [f"{record.name} {record.getMessage()} {record.__dict__}" for record in caplog.records]
    everything = "\n".join(said)
    assert all(header["authorization"] == f"Bearer {KEY}" for header in server.headers) and server.headers
    assert "[the key]" in everything and any(record.name.startswith("openai") for record in caplog.records)
    assert KEY not in everything


# --- leaving in the middle


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rrhf-")]


def test_a_caller_that_leaves_early_leaves_nothing_behind(make: Any, server: bad.Misbehaving) -> None:
    endpoint = make(concurrency=3)
    server.plan = [bad.well]
    server.default = bad.hang
    answers = endpoint.respond(RECORDS)
    i, texts, _ = next(answers)
    assert texts == expected(RECORDS[i])
    assert server.wait_for_posts(3) and our_threads() == ["rrhf-endpoint"]
    answers.close()
    assert our_threads() == [] and server.wait_until_idle()


def test_runs_where_an_event_loop_is_running(make: Any) -> None:
    import asyncio

    async def in_a_notebook() -> Any:
        return collect(make(), RECORDS[:2])

    got, error = asyncio.run(in_a_notebook())
    assert error is None and len(got) == 2


INTERRUPTED = """
import sys, threading
from rrhf.records.record import Record
from rrhf.common.endpoint_settings import EndpointSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.server import Endpoint
settings = EndpointSettings(sys.argv[1], model="m", concurrency=4)
endpoint = Endpoint(settings, SamplingSettings(num_responses=1))
try:
    for result in endpoint.respond([Record(query=f"q{i}") for i in range(8)]):
        print(result, flush=True)
except KeyboardInterrupt:
    print("threads:", [t.name for t in threading.enumerate() if t.name.startswith("rrhf-")], flush=True)
    sys.exit(130)
"""


def test_ctrl_c_ends_it_and_keeps_what_was_done(server: bad.Misbehaving) -> None:
    server.plan = [bad.well, bad.well]  # the check and a record
    server.default = bad.hang
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=tiny.heed_signals,
    )
    try:
        assert child.stdout is not None
        assert server.wait_for_posts(1 + 1 + 4)  # the check, the record, four that hang
        first = child.stdout.readline().strip()  # the four may have come before what was answered is handed on
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=240)
    finally:
        child.kill()
    assert child.returncode == 130, err
    (last,) = out.splitlines()
    assert re.fullmatch(r"\((\d), \['q\1, \d+, 0'\], \['stop'\]\)", first) and last == "threads: []"
    assert "never" not in err and "Traceback" not in err
    assert server.wait_until_idle()


def test_without_the_package_the_cure_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'rrhf\[endpoint\]'"):
        make(check=False).check()


# --- a real server: transformers serve, with a tiny random chat model


@dataclasses.dataclass(frozen=True)
class RealServer:
    url: str
    model: str

    def ask(self, path: str, **body: Any) -> Any:
        """A request by hand, to compare with."""
        request = urllib.request.Request(
            f"{self.url}/{path}",
            json.dumps({"model": self.model, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return json.loads(answer.read())["choices"][0]


def serve_command() -> list[str]:
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"transformers serve needs {package}: pip install 'transformers[serving]'")
    beside = Path(sys.executable).with_name("transformers")
    command = str(beside) if beside.exists() else shutil.which("transformers")
    return [command or pytest.skip("the command transformers is not installed"), "serve"]


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: Any) -> Iterator[RealServer]:
    command = serve_command()
    root = tmp_path_factory.mktemp("serve")
    (root / "hf" / "hub").mkdir(parents=True)
    folder = root / "model"
    model = tiny_model("llama", len(smollm2_tokenizer))
    model.generation_config.do_sample = True  # else the server is greedy, whatever the temperature
    model.generation_config.eos_token_id = smollm2_tokenizer.eos_token_id
    model.save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    port = free_port()
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (root / "log").open("w+")
    arguments = [str(folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", process, root / "log")
        yield RealServer(f"http://127.0.0.1:{port}/v1", str(folder))
    finally:
        process.terminate()
        process.wait(240)
        log.close()


def wait_until_ready(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + 600
    pause = threading.Event()
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60):
            return
        pause.wait(0.1)
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-2000:]}")


QUERIES = [
    Record(query=[{"role": "user", "content": "Name a colour."}], id="a"),
    Record(query=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}], id="b"),
    Record(query="Plain text.", id="c"),
]


def test_chat_at_a_real_server(real_server: RealServer) -> None:
    sampling = SamplingSettings(max_new_tokens=6, num_responses=2, temperature=0.9, top_p=0.95, seed=5)
    settings = EndpointSettings(real_server.url, model=real_server.model, concurrency=1)
    endpoint = Endpoint(settings, sampling)
    got, error = collect(endpoint, QUERIES)
    assert error is None and sorted(got) == [0, 1, 2]
    assert endpoint.client.requests == 1 + 3 * 2  # it gives one choice, whatever n says
    assert endpoint.client.tokens > 3 * 2 * 6
    for i, record in enumerate(QUERIES):
        messages = [{"role": "user", "content": record.query}] if isinstance(record.query, str) else record.query
        for number in range(2):
            seed = request_seed(5, record.id, number)
            by_hand = real_server.ask(
                "chat/completions", messages=messages, max_tokens=6, temperature=0.9, top_p=0.95, seed=seed
            )
            assert got[i][0][number] == by_hand["message"]["content"]
            assert got[i][1][number] == by_hand["finish_reason"]
    assert len({text for texts, _ in got.values() for text in texts}) == 6
    assert collect(Endpoint(settings, sampling), QUERIES) == (got, None)


def test_completions_at_a_real_server(real_server: RealServer) -> None:
    sampling = SamplingSettings(max_new_tokens=8, num_responses=2)
    settings = EndpointSettings(real_server.url, kind="completions", model=real_server.model, concurrency=1)
    records = [Record(query="Once upon a time", id="x"), Record(query="The film was", id="y")]
    got, error = collect(Endpoint(settings, sampling), records)
    assert error is None
    for i, record in enumerate(records):
        body = {"prompt": record.query, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0}
        by_hand = [
            real_server.ask("completions", **body, seed=request_seed(0, record.id, number))["text"]
            for number in range(2)
        ]
        assert got[i] == (by_hand, ["length", "length"])
    # A stop string ends a response, and this server leaves it in: here it is cut off.
    letter = next(character for character in got[0][0][0][1:] if character.isalpha())
    stopped, _ = collect(Endpoint(settings, dataclasses.replace(sampling, stop=[letter])), records[:1])
    text = got[0][0][0]
    assert (stopped[0][0][0], stopped[0][1][0]) == (text[: text.index(letter)], "stop")


def test_many_at_once_at_a_real_server(real_server: RealServer) -> None:
    settings = EndpointSettings(real_server.url, model=real_server.model)
    got, error = collect(Endpoint(settings, SamplingSettings(max_new_tokens=4, num_responses=2)), RECORDS)
    assert error is None and sorted(got) == list(range(6)) and all(len(texts) == 2 for texts, _ in got.values())


def test_what_a_server_lists_and_refuses_is_said(server: bad.Misbehaving) -> None:
    server.models = []
    with pytest.raises(UserError, match="lists no model: give the model's name"):
        Endpoint(EndpointSettings(server.url)).check()
    server.default = bad.status(422, "Unexpected fields in the request: {'top_k'}")
    with pytest.raises(UserError, match=r"HTTP 422: Unexpected fields in the request: .'top_k'"):
        Endpoint(EndpointSettings(server.url, model="m"), SamplingSettings(policy="top-k", top_k=5)).check()


def test_what_a_real_server_refuses(real_server: RealServer) -> None:
    """Only what its documentation and HTTP promise: it has the one model, lists models, and has no other paths."""
    with pytest.raises(UserError, match=f"^{re.escape(real_server.url)}: .*other"):
        Endpoint(EndpointSettings(real_server.url, model="other")).check()
    with pytest.raises(UserError, match=r"HTTP 404.*ends in /v1"):
        Endpoint(EndpointSettings(f"{real_server.url}/nowhere", model=real_server.model)).check()
    unnamed = Endpoint(EndpointSettings(real_server.url))
    with urllib.request.urlopen(f"{real_server.url}/models", timeout=60) as answer:
        listed = [entry["id"] for entry in json.load(answer)["data"]]
    if len(listed) == 1:
        unnamed.check()
        assert unnamed.client.model == listed[0]
    else:
        with pytest.raises(UserError, match="give the model's name"):
            unnamed.check()


def test_a_mixture_with_a_real_server_in_one_command(
    real_server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two policies of a local model, the server's answer and people's, each with its tag, in one file."""
    human = [
        Record(QUERIES[0].query, ["Red.", "Red.", "."], sources=["ann/0", "ben/0", "ben/1"], id="a"),
        Record("Plain text.", ["Indeed."], id="elsewhere"),
    ]
    for name, records in (("queries", QUERIES), ("human", human)):
        write_records(tmp_path / f"{name}.jsonl", records)
    output = tmp_path / "responses.jsonl"
    sources = [f"{real_server.model}@diverse-beam:4", f"{real_server.model}@top-p:2"]
    sources += [f"{real_server.url}#{real_server.model}@chat:1", str(tmp_path / "human.jsonl")]
    named = [part for source in sources for part in ("--source", source)]
    sizes = ["--max_new_tokens", "6", "--seed", "5", "--device", "cpu", "--dtype", "float32", "--concurrency", "1"]
    assert main(["sample", "--data", str(tmp_path / "queries.jsonl"), "--output", str(output), *named, *sizes]) == 0
    found = list(read_records(output))
    served_tag = parse_source(sources[2]).tag
    assert [record.id for record in found] == ["a", "b", "c"]
    for record in found:
        by_tag = {
            tag: text
            for text, joined in zip(record.responses, record.sources, strict=True)
            for tag in joined.split("|")
        }
        messages = [{"role": "user", "content": record.query}] if isinstance(record.query, str) else record.query
        by_hand = real_server.ask(
            "chat/completions", messages=messages, max_tokens=6, temperature=1.0, top_p=1.0,
            seed=request_seed(source_seed(5, served_tag, 1), record.id, 0),
        )  # fmt: skip
        (served,) = (text for tag, text in by_tag.items() if tag.endswith("@chat/0"))
        assert served == by_hand["message"]["content"]
        drawn = {f"model@diverse-beam/{n}" for n in range(4)} | {f"model@top-p/{n}" for n in range(2)}
        assert drawn <= set(by_tag)
    assert found[0].sources[-2:] == ["ann/0|ben/0", "ben/1"] and found[0].responses[-2:] == ["Red.", "."]
    assert found[2].sources[-1] == "human/0"
    said = capsys.readouterr().err
    assert "equal responses merged" in said and "2 queries joined with responses of" in said
    assert not any(KEY in text for text in (said, output.read_text()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["human.jsonl", "queries.jsonl", "responses.jsonl"]
