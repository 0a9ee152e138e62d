"""The endpoint's client by itself, as a judge uses it: one chat request a record. How it fares with servers that
misbehave is tested through sampling, in ``tests/sampling/sources/test_server.py``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.endpoint import BudgetReached, EndpointClient, Question
from rrhf.common.endpoint_settings import EndpointLimits, EndpointSettings, share_of_process
from rrhf.common.errors import UserError
from rrhf.common.journal import Journal
from support import misbehaving as bad

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server() -> Iterator[bad.Misbehaving]:
    with bad.misbehaving() as running:
        yield running


def judgement(text: str, first: int, number: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Grade it."}, {"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": 8, "seed": 0, "stop": ["."], "response_format": {"type": "text"}}


def test_one_request_a_record_with_a_body_of_the_callers(server: bad.Misbehaving) -> None:
    client = EndpointClient(EndpointSettings(server.url, model="m", concurrency=2))
    server.default = bad.text("7 of 10. Because it is good", "length")
    questions = [Question(f"r{i}", partial(judgement, f"text {i}")) for i in range(5)]
    answers = dict(client.ask(questions))
    assert sorted(answers) == list(range(5))
    assert all(choices == [("7 of 10", "stop")] for choices in answers.values())  # cut at the body's own stop
    sent = sorted(server.posts, key=lambda post: post["messages"][1]["content"])
    assert sent == [{"model": "m", **judgement(f"text {i}", 0, 1)} for i in range(5)]
    assert (client.requests, client.tokens) == (5, 5 * bad.USAGE)


def test_the_model_is_learned_and_the_record_named(server: bad.Misbehaving) -> None:
    client = EndpointClient(EndpointSettings(server.url, max_requests=4))
    client.check(partial(judgement, "Hi"))
    assert client.model == "m" and client.checked
    server.default = bad.status(400, "no such format")
    with pytest.raises(UserError, match="record x7: HTTP 400: no such format"):
        list(client.ask([Question("x7", partial(judgement, "text"))]))
    server.default = bad.well
    with pytest.raises(BudgetReached, match="4 requests are spent, with 1 of 2 records done") as reached:
        list(client.ask([Question(f"r{i}", partial(judgement, "text")) for i in range(2)]))
    assert reached.value.done == 1


def test_limits_are_checked_and_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"concurrency 0: .*\n.*max_tokens 0: "):
        EndpointLimits(concurrency=0, max_tokens=0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(share_of_process(EndpointLimits(concurrency=7, max_requests=11)))
    assert [share.max_requests for share in shares] == [3, 4, 4]  # all of it, no more
    assert {(share.concurrency, share.max_tokens) for share in shares} == {(2, None)}


def test_the_client_loads_nothing_that_knows_of_ranking() -> None:
    code = "import sys, rrhf.common.endpoint, rrhf.common.journal; print([m for m in sys.modules if 'rrhf.' in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = set(loaded.strip("[]\n").replace("'", "").split(", "))
    assert "rrhf.common.endpoint" in modules
    assert {module for module in modules if not module.startswith("rrhf.common")} == set()


def test_a_journal_gives_back_what_was_added_but_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "parts", "what it depends on")
    assert list(journal.read()) == [] and not (tmp_path / "parts").exists()
    journal.add({"id": "a", "text": "é"})
    with journal.path.open("a") as file:
        file.write('{"id": "b", "te')
    journal.add('{"id": "c"}')
    again = Journal(tmp_path / "parts", "what it depends on")
    assert list(again.read()) == [{"id": "a", "text": "é"}, {"id": "c"}]
    assert list(Journal(tmp_path / "parts", "something else").read()) == []
