"""The pages as a client of HTTP sees them: who is let in, what a form must bring, what no page tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from rrhf.arena.access import OWNER
from rrhf.arena.app import application, listen
from rrhf.arena.settings import LimitSettings, StudySettings
from rrhf.arena.store import Study, create_study, open_study, votes
from rrhf.arena.systems import Systems
from rrhf.cli.main import main
from rrhf.common.errors import UserError
from support.arena import create, plain_systems

URL = "http://127.0.0.1:8000"
COUNT = 40


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Study, dict[str, str]]]:
    """A study of two systems whose texts differ in nothing but a word, and the personal tokens."""
    queries: Any = {f"rec-{i}": f"Query {i}?" for i in range(COUNT)}
    texts = {name: {query: f"word{name} of {query} " + "x " * 12 for query in queries} for name in ("alpha", "beta")}
    place = str(tmp_path / "study.db")
    settings = StudySettings(common=4, checks=3, instructions="Read *both*.")
    tokens = create_study(place, Systems(queries, texts), [("alpha", "beta")], ["anna", "ben"], settings, URL)
    with open_study(place) as study:
        yield study, tokens


def client(study: Study, **limits: int) -> TestClient:
    return TestClient(application(study, LimitSettings(**limits)), base_url=URL, follow_redirects=False)


def field(page: str, name: str) -> str:
    (value,) = set(re.findall(rf'name="{name}" value="([^"]*)"', page))
    return str(value)


def skeleton(page: str) -> str:
    """A page without its texts, its numbers and the random names in it."""
    page = re.sub(r'(<div class="text" dir="auto">).*?</div>', r"\1", page, flags=re.DOTALL)
    return re.sub(r"\d+", "N", re.sub(r'value="[0-9a-f]{16,}"', "", page))


def form(page: str, **changes: str) -> dict[str, str]:
    return {**{name: field(page, name) for name in ("mark", "task", "seen")}, "choice": "left", "why": "", **changes}


def enter(visitor: TestClient, tokens: dict[str, str], name: str) -> str:
    kind = "o" if name == OWNER else "r"
    answer = visitor.get(f"/{kind}/{tokens[name]}")
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    page = visitor.get(answer.headers["location"])
    assert page.status_code == 200 and tokens[name] not in page.text
    return str(page.text)


def test_only_a_personal_link_opens_a_page(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    visitor = client(study)
    for path in (
        "/",
        "/rate",
        "/rate/1",
        "/owner",
        "/r/1.wrong",
        "/o/owner.wrong",
        f"/r/{tokens[OWNER]}",
        f"/o/{tokens['anna']}",
    ):
        answer = visitor.get(path)
        assert answer.status_code == 403 and "personal link" in answer.text, path
    assert visitor.post("/rate/1", data={"choice": "left"}).status_code == 403
    for path in ("/docs", "/static/", "/static/../web.py", "/static/%2e%2e/owner.html.j2", "/rate/1/x", "/r/"):
        assert visitor.get(path).status_code == 404, path
    enter(visitor, tokens, "anna")
    assert visitor.get("/owner").status_code == 403  # a rater's link is no owner's
    assert visitor.post("/owner/links", data={"rater": "2", "action": "revoke"}).status_code == 403


def test_every_answer_has_the_strict_headers(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    visitor = client(study)
    enter(visitor, tokens, "anna")
    for path in ("/rate", "/nowhere", "/owner", "/static/arena.css", f"/r/{tokens['ben']}"):
        headers = visitor.get(path).headers
        assert headers["content-security-policy"] == (
            "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'"
        )
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert headers["cache-control"] == ("private, max-age=300" if "static" in path else "no-store")
    assert visitor.get("/rate", headers={"host": "attack.invalid"}).status_code == 400  # DNS rebinding


def test_a_form_counts_only_from_the_visitors_own_page(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    anna, ben = client(study), client(study)
    page, other = enter(anna, tokens, "anna"), enter(ben, tokens, "ben")
    good = form(page)
    for data, headers, status in (
        (good | {"mark": ""}, {}, 403),
        (good | {"mark": field(other, "mark")}, {}, 403),
        ({name: value for name, value in good.items() if name != "mark"}, {}, 403),
        (good, {"origin": "http://attack.invalid"}, 403),
        (good, {"origin": "null"}, 403),
        (good | {"task": "0" * 16}, {}, 400),
        (good | {"seen": "-1"}, {}, 400),
        (good | {"choice": "best"}, {}, 422),
        (good | {"why": "x" * 2001}, {}, 422),
        (good | {"why": "x" * 70_000}, {}, 413),
        ({f"n{number}": "x" for number in range(2000)}, {}, 400),
    ):
        assert anna.post("/rate/1", data=data, headers=headers).status_code == status, (data, headers)
    assert anna.post("/rate/3", data=good).headers["location"] == "/rate"  # what is not yet due
    assert votes(study) == []
    assert anna.post("/rate/1", data=good, headers={"origin": "http://[bad"}).status_code == 403
    assert anna.post("/rate/1", data=good, headers={"origin": URL}).status_code == 303
    assert [vote.choice for vote in votes(study)] == ["left"]


def test_a_proxy_that_asks_for_itself_may_bring_the_votes(tmp_path: Path) -> None:
    """As nginx does unless it is told to pass the host on."""
    place, address = str(tmp_path / "study.db"), "https://rate.example.org"
    queries: Any = {"q": "Query?"}
    given = Systems(queries, {"a": {"q": "word a " * 9}, "b": {"q": "word b " * 9}})
    tokens = create_study(place, given, [("a", "b")], ["anna"], StudySettings(checks=0), address)
    with open_study(place) as study:
        anna = TestClient(application(study, LimitSettings()), base_url="https://127.0.0.1", follow_redirects=False)
        page = enter(anna, tokens, "anna")
        assert anna.post("/rate/1", data=form(page), headers={"origin": "https://else.org"}).status_code == 403
        assert anna.post("/rate/1", data=form(page), headers={"origin": address}).status_code == 303
        assert len(votes(study)) == 1


def test_an_address_of_ipv6_is_a_host(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    away = replace(study, url="http://[2001:db8::1]:8000")
    visitor = TestClient(application(away, LimitSettings()), base_url=away.url, follow_redirects=False)
    assert visitor.get(f"/r/{tokens['anna']}").status_code == 303


def test_a_fault_is_told_with_the_strict_headers_and_a_study_without_room_says_so(
    made: tuple[Study, dict[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study, tokens = made
    pages = application(study, LimitSettings())
    visitor = TestClient(pages, base_url=URL, follow_redirects=False, raise_server_exceptions=False)
    page = enter(visitor, tokens, "anna")

    def full(*_: Any) -> None:
        raise sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))

    monkeypatch.setattr("rrhf.arena.rating.save_answer", full)
    answer = visitor.post("/rate/1", data=form(page))
    assert answer.status_code == 503 and "was not stored" in answer.text
    assert "database or disk is full: see that its disk has room" in caplog.text
    monkeypatch.setattr("rrhf.arena.rating.save_answer", lambda *_: 1 / 0)
    answer = visitor.post("/rate/1", data=form(page))
    assert answer.status_code == 500 and "A fault of ours" in answer.text
    assert answer.headers["x-frame-options"] == "DENY" and answer.headers["cache-control"] == "no-store"


def test_a_second_click_and_a_second_tab(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    anna = client(study)
    page = enter(anna, tokens, "anna")
    assert anna.post("/rate/1", data=form(page)).status_code == 303
    assert anna.post("/rate/1", data=form(page)).status_code == 303
    stale = anna.post("/rate/1", data=form(page, choice="right", why="other"))
    assert (
        stale.status_code == 409
        and "in another tab" in stale.text
        and 'value="left" class="left" aria-pressed="true"' in stale.text
    )
    assert [(vote.choice, vote.why) for vote in votes(study)] == [("left", "")]
    assert anna.post("/rate/1", data=form(stale.text, choice="right")).status_code == 303
    assert [vote.choice for vote in votes(study)] == ["right"]


def test_a_revoked_link_ends_at_once_and_a_new_one_opens(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    anna, owner = client(study), client(study)
    page = enter(anna, tokens, "anna")
    mine = enter(owner, tokens, OWNER)
    data = {"mark": field(mine, "mark"), "rater": "1"}
    assert owner.post("/owner/links", data={**data, "action": "revoke", "mark": "x"}).status_code == 403
    assert owner.post("/owner/links", data={**data, "action": "burn"}).status_code == 400
    assert owner.post("/owner/links", data={**data, "action": "revoke"}).status_code == 303
    assert anna.get("/rate").status_code == 403 and anna.post("/rate/1", data=form(page)).status_code == 403
    fresh = owner.post("/owner/links", data={**data, "action": "renew"}).text
    (path,) = re.findall(rf"{URL}(/r/[\w.-]+)", fresh)
    assert client(study).get(f"/r/{tokens['anna']}").status_code == 403
    assert client(study).get(path).status_code == 303


def test_no_page_tells_which_system_wrote_what(made: tuple[Study, dict[str, str]]) -> None:
    """Every page of a rater, its texts and its numbers taken out, is the same page; the sides fall by chance."""
    study, tokens = made
    sides: list[str] = []
    skeletons: set[str] = set()
    for name in ("anna", "ben"):
        visitor = client(study)
        page = enter(visitor, tokens, name)
        first = field(page, "task")
        while "Thank you" not in page:
            assert not re.search("alpha|beta|rec-", skeleton(page))
            sides += re.findall(r"word(alpha|beta)", page)[:1]
            if field(page, "task") != first:  # which has no way back, and its instructions open
                skeletons.add(skeleton(page))
            answer = visitor.post(
                f"/rate/{re.findall('action=./rate/([0-9]+)', page)[0]}", data=form(page, choice="tie")
            )
            page = visitor.get(answer.headers["location"]).text
    assert len(sides) == 2 * (COUNT + 3) and len(skeletons) == 1
    assert 10 < sides.count("alpha") < 2 * COUNT - 4  # 43 of 86 by chance: 7 standard deviations
    order = [vote.pair for vote in votes(study)]
    assert order != sorted(order) and len(set(order)) == COUNT + 3


def test_limits_hold_for_a_link_and_for_strangers(made: tuple[Study, dict[str, str]]) -> None:
    study, tokens = made
    visitor = client(study, requests_per_minute=5, strangers_per_minute=3)
    assert [visitor.get("/r/1.guess").status_code for _ in range(5)] == [403, 403, 403, 429, 429]
    enter(visitor, tokens, "anna")  # who has a link comes in from that address all the same
    assert [visitor.get("/rate").status_code for _ in range(4)] == [200, 200, 200, 429]
    other = client(study, requests_per_minute=5)
    enter(other, tokens, "ben")


def test_studies_on_one_host_do_not_share_their_cookies(made: tuple[Study, dict[str, str]], tmp_path: Path) -> None:
    study, tokens = made
    queries: Any = {"q": "x"}
    both = Systems(queries, {"a": {"q": "1"}, "b": {"q": "2"}})
    others = create_study(str(tmp_path / "2.db"), both, [("a", "b")], ["zoe"], StudySettings(checks=0), URL)
    with open_study(str(tmp_path / "2.db")) as second:
        one, two = client(study), client(second)
        two.cookies = one.cookies
        enter(one, tokens, "anna")
        enter(two, others, "zoe")
        assert "of 43" in one.get("/rate").text and "of 1" in two.get("/rate").text


def test_serve_stays_on_this_machine_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(tmp_path / "s.db")
    create([study, *plain_systems(tmp_path, "ab", 3), "--raters", "2"], capsys)
    assert main(["arena", "serve", study, "--host", "0.0.0.0"]) == 2
    assert "give --url" in capsys.readouterr().err
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen there"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "ftp://x"], "--url ftp://x"),
        (["--url", "http://x/path"], "no path"),
        (["--raters", "anna", "anna"], "'anna'"),
        (["--raters", "owner", "x"], "the owner's"),
        (["--raters", "0"], "--raters 0"),
        (["--raters", "an\tna", "x"], "cannot be printed"),
        (["--common", "9", "--per-rater", "3"], "--per_rater is 3"),
        (["--compare", "a:c"], "--compare a:c"),
        (["--mode", "list"], "--mode 'list'"),
    ],
)
def test_what_create_refuses(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "s.db"
    assert main(["arena", "create", str(study), *plain_systems(tmp_path, "ab", 3), *flags]) == 2
    assert words in capsys.readouterr().err and not study.exists()


def test_links_makes_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = str(tmp_path / "s.db")
    old = create([study, *plain_systems(tmp_path, "ab", 3), "--raters", "anna"], capsys)
    assert main(["arena", "links", study, "anna", "owner", "--add", "zoe"]) == 0
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ["anna", "owner", "zoe"]
    with open_study(study) as opened:
        visitor = client(opened)
        assert visitor.get(old["anna"]).status_code == 403
        for url in rows.values():
            assert visitor.get(url.removeprefix(URL)).status_code == 303
    assert main(["arena", "links", study, "nobody"]) == 2 and main(["arena", "show"]) == 2
    assert "unknown arena command 'show'" in capsys.readouterr().err
