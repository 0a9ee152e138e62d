"""A study in a real browser, served by the command as a process of its own. Never skipped: no chromium is a failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from rrhf.arena.store import Study, open_study, rankings, votes
from support.arena import Server, create, plain_systems, serving, write_system
from support.attacks import ATTACKS
from support.browser import chromium

DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Give a function that opens an address as a new person, with cookies of their own."""
    contexts = []

    def open_page(url: str, size: dict[str, int] = DESK, **settings: Any) -> Any:
        contexts.append(browser.new_context(viewport=size, **settings))
        page = contexts[-1].new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def heading(page: Any) -> str:
    return str(page.locator("h1").inner_text())


def press(page: Any, key: str) -> None:
    """Press a key that answers, and wait for the page that comes of it."""
    with page.expect_navigation():
        page.keyboard.press(key)


def place(page: Any) -> int:
    return int(re.findall(r"(\d+) of", heading(page))[0])


def better(page: Any) -> str:
    """The side of the response of system ``good``: a whole one, as no check of attention is."""
    left, right = (page.locator("article .text").nth(index).inner_text() for index in (0, 1))
    if left.startswith("Response of") and right.startswith("Response of"):
        return "left" if "of good" in left else "right"
    return "left" if left.startswith("Response of") else "right"


def told(study: Study) -> list[tuple[str, str]]:
    """Rater and the system that won, checks left out."""
    rows = [(vote, {"left": vote.left, "right": vote.right}) for vote in votes(study) if vote.spoilt is None]
    return [(vote.rater, sides.get(vote.choice, vote.choice)) for vote, sides in rows]


def test_a_study_by_three_raters(tmp_path: Path, capsys: pytest.CaptureFixture[str], visit: Callable[..., Any]) -> None:
    """By keys, by mouse with remarks, by the tab key on a phone; killed between votes, and gone on with elsewhere."""
    place_of_study = str(tmp_path / "study.db")
    design = ["--per_comparison", "7", "--common", "1", "--per_rater", "3", "--checks", "1"]
    flags = plain_systems(tmp_path, ["good", "bad"], 9)
    links = create([place_of_study, *flags, *design, "--raters", "anna", "ben", "cleo"], capsys)
    with serving(place_of_study) as server:
        by_keys(server, visit(server.url + links["anna"]))
        by_mouse(server, visit(server.url + links["ben"]), lambda: visit(server.url + links["ben"], PHONE))
        by_tab(visit(server.url + links["cleo"], PHONE))
        owner = visit(server.url + links["owner"])
        rows = owner.locator("tbody").first.locator("tr").all_inner_texts()
        assert ["4 of 4" in row and "1 of 1" in row for row in rows] == [True] * 3
        results = owner.locator("tbody").nth(1).inner_text()
        assert re.match(r"good against bad\t9\t9 \(100\.0%\)", results), results
    with open_study(place_of_study) as study:
        assert sorted(told(study)) == [(name, "good") for name in ("anna", "ben", "cleo") for _ in range(3)]
        assert [vote.why for vote in votes(study) if vote.rater == "ben"].count("Because <b>it</b> is — ✓") == 1
        pairs = {vote.pair for vote in votes(study) if vote.spoilt is None}
        assert len(pairs) == 7 and sum(vote.common for vote in votes(study)) == 3


KEY = {"left": "1", "tie": "2", "right": "3"}


def by_keys(server: Server, page: Any) -> None:
    """The keys; a server that is killed after each answer has the vote, and the page goes on where it was."""
    assert heading(page) == "Pair 1 of 4"
    page.keyboard.press("x")
    page.keyboard.press("Control+1")
    for number in range(1, 5):
        assert place(page) == number
        press(page, KEY[better(page)])
        if number in (1, 3):
            server.kill()
            server.start_again()
            page.reload()
            assert f"{number} of 4 done" in page.inner_text("header")
    assert heading(page) == "Thank you"


def click(page: Any, name: str) -> None:
    """Click a button, by the page's clock later than a double click's second click comes."""
    page.evaluate("performance.now = () => 1000")
    follow(page, "button", name)


def follow(page: Any, role: str, name: str) -> None:
    """Activate what leads to another page, and wait for it."""
    with page.expect_navigation():
        page.get_by_role(role, name=name).click()


SIDES = {"left": "Left", "right": "Right"}


def by_mouse(server: Server, page: Any, elsewhere: Callable[[], Any]) -> None:
    """Clicks and a remark, back one and changed, two tabs, a double click, reload, another device."""
    page.get_by_text("Say why").click()
    page.get_by_label("Why?").fill("x")
    page.get_by_label("Why?").press_sequentially("s123")  # letters of a text, no answer
    click(page, "Left")
    follow(page, "link", "Back")
    assert place(page) == 1 and page.get_by_label("Why?").input_value() == "xs123"
    assert page.get_by_role("button", name="Left").get_attribute("aria-pressed") == "true"
    page.get_by_label("Why?").fill("Because <b>it</b> is — ✓")
    tab = page.context.new_page()
    tab.goto(server.url + "/rate/1")
    click(page, SIDES[better(page)])
    assert place(page) == 2
    click(tab, "Skip")  # the tab showed the answer before the change
    assert place(tab) == 1 and "in another tab" in tab.get_by_role("alert").inner_text()
    follow(tab, "link", "Go on")
    with tab.expect_navigation():
        name = SIDES[better(tab)].lower()
        tab.evaluate(f"for (let n = 0; n < 2; n++) document.querySelector('button.{name}').click()")
    assert place(tab) == 3
    click(page, "Tie")  # the second pair, answered in the tab: nothing changes
    assert place(page) == 2 and page.get_by_role("alert").count() == 1
    tab.reload()
    assert place(tab) == 3
    tab.evaluate("performance.now = () => 100")  # where a double click's second click would be
    tab.get_by_role("button", name="Tie").click()
    assert place(tab) == 3 and "2 of 4 done" in tab.inner_text("header")
    phone = elsewhere()
    for number in (3, 4):
        assert place(phone) == number
        click(phone, SIDES[better(phone)])
    assert heading(phone) == "Thank you" and "4 of 4" in phone.inner_text("header")


def by_tab(page: Any) -> None:
    """The tab key and the enter key alone, on a phone whose keys were turned off; nothing is wider than it."""
    while heading(page) != "Thank you":
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        name = {"left": "Left", "right": "Right"}[better(page)]
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent").startswith(name):
                break
        press(page, "Enter")


# --- texts that attack -----------------------------------------------------------------------------------------------


def test_no_text_acts_in_the_browser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], visit: Callable[..., Any]
) -> None:
    """Every attack as both responses, as a query and as a turn of a dialogue: no dialog, no request, no fault."""
    study = str(tmp_path / "study.db")
    queries = {
        name: text if number % 2 else [{"role": "user", "content": text}]
        for number, (name, text) in enumerate(ATTACKS.items())
    }
    flags = []
    for system in ("a", "b"):
        flags += ["--data", str(write_system(tmp_path / f"{system}.jsonl", ATTACKS, queries))]
    design = ["--checks", "0", "--title", ATTACKS["script"], "--question", ATTACKS["svg with a script"]]
    links = create([study, *flags, *design, "--instructions", ATTACKS["style"], "--raters", ATTACKS["body"]], capsys)
    with serving(study, "--requests_per_minute", "10000") as server:
        page = visit("about:blank")
        faults: list[str] = []
        page.context.on(
            "request", lambda request: None if request.url.startswith(server.url) else faults.append(request.url)
        )
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("popup", lambda popup: faults.append("popup"))
        page.goto(server.url + links[ATTACKS["body"]])
        for number in range(1, len(ATTACKS) + 1):
            assert heading(page) == f"Pair {number} of {len(ATTACKS)}" and "Pair" in page.title()
            assert page.evaluate(UNTOUCHED) == [], page.locator("article").first.inner_text()[:80]
            press(page, "3")
        assert heading(page) == "Thank you"
        owner = visit(server.url + links["owner"])
        assert ATTACKS["body"] in owner.locator("tbody th").first.inner_text()
        assert faults == []


# What is wrong with a page: elements that no text may have, a button that is covered or out of sight, a page too wide.
UNTOUCHED = """() => {
  const faults = [...document.querySelectorAll(".text :is(a, img, script, svg, style, iframe, form, input, h1, h2)")]
    .map((element) => element.tagName);
  for (const button of document.querySelectorAll(".choices button")) {
    const box = button.getBoundingClientRect();
    const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    if (top !== button || box.bottom > innerHeight) faults.push(button.className);
  }
  if (document.documentElement.scrollWidth > innerWidth) faults.push("width");
  if (document.querySelectorAll("h2").length !== 3) faults.push("h2");
  return faults;
}"""


# --- everybody can use it --------------------------------------------------------------------------------------------


def axe_faults(page: Any) -> list[str]:
    found = Axe().run(page).response
    assert len(found["passes"]) > 10
    return [f"{page.url}: {fault['id']}: {fault['nodes'][0]['html']}" for fault in found["violations"]]


@pytest.mark.parametrize(("scheme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light desk", "dark phone"])
def test_axe_finds_no_violation(
    scheme: str, size: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str], visit: Callable[..., Any]
) -> None:
    """axe-core's rules for WCAG and for good practice, on every page there is, with Markdown and with attacks."""
    text = (
        "# A\n\n### B\n\n|a|b|\n|-|-|\n|1|2|\n\n|c|d|\n|-|-|\n\n```\nx\n```\n> q\n\n[l](http://x.org) ![i](y)\n\n1. z"
    )
    names = {"q0": text, "q1": ATTACKS["turned around"], "q2": ATTACKS["one long word"]}
    queries = {"q0": "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: *How*?\n\nAssistant:", "q1": text}
    flags: list[str] = []
    for system in ("a", "b", "c"):
        flags += ["--data", str(write_system(tmp_path / f"{system}.jsonl", names, queries))]
    pairs, ranking = str(tmp_path / "pairs.db"), str(tmp_path / "ranking.db")
    more = ["--instructions", text, "--raters", "anna", "--checks", "0", "--per_comparison", "1"]
    links = create([pairs, *flags, *more, "--compare", "a:b", "--compare", "a:c", "--compare", "b:c"], capsys)
    ordered = create([ranking, *flags, *more, "--mode", "ranking"], capsys)
    with serving(pairs) as server, serving(ranking) as second:
        page = visit(server.url + links["anna"], size, color_scheme=scheme)
        faults = axe_faults(page)  # a fresh pair, instructions open
        stale = page.context.new_page()
        stale.goto(server.url + "/rate/1")
        press(page, "1")
        press(stale, "2")
        faults += axe_faults(stale)  # a warning, a choice made
        press(page, "s")
        faults += axe_faults(page)
        page.goto(server.url + "/rate/1")
        page.get_by_text("Say why").click()
        faults += axe_faults(page)
        page.goto(server.url + "/rate")
        press(page, "2")
        faults += axe_faults(page)  # thanks
        faults += axe_faults(visit(server.url + "/rate", size, color_scheme=scheme))  # no link
        owner = visit(server.url + links["owner"], size, color_scheme=scheme)
        follow(owner, "button", "New link for anna")
        faults += axe_faults(owner)
        faults += axe_faults(visit(second.url + ordered["anna"], size, color_scheme=scheme))
    assert faults == []


# --- rankings, and keys that are off ---------------------------------------------------------------------------------


def test_a_ranking_by_keyboard(tmp_path: Path, capsys: pytest.CaptureFixture[str], visit: Callable[..., Any]) -> None:
    study = str(tmp_path / "study.db")
    flags = plain_systems(tmp_path, ["good", "fair", "bad"], 2)
    links = create([study, *flags, "--mode", "ranking", "--raters", "anna"], capsys)
    with serving(study) as server:
        page = visit(server.url + links["anna"])
        assert heading(page) == "Query 1 of 2"
        page.keyboard.press("1")  # no answer here
        order = [re.findall("of (good|fair|bad)", text)[0] for text in page.locator("article .text").all_inner_texts()]
        for index, name in enumerate(order):
            first = page.locator("article").nth(index).get_by_role("radio").first
            first.focus()
            page.keyboard.press("Space")
            for _ in range({"good": 0, "fair": 1, "bad": 1}[name]):
                page.keyboard.press("ArrowDown")
        page.get_by_role("button", name="Keep this order").focus()
        press(page, "Enter")
        page.get_by_role("button", name="Keep this order").click()  # the browser asks for the places first
        assert heading(page) == "Query 2 of 2" and "1 of 2 done" in page.inner_text("header")
        click(page, "Skip")
        page.goto(server.url + "/rate/1")
        chosen = [
            page.locator("article").nth(index).locator("input:checked").get_attribute("value") for index in range(3)
        ]
        assert chosen == [{"good": "1", "fair": "2", "bad": "2"}[name] for name in order]
    with open_study(study) as opened:
        assert [said.ranks for said in rankings(opened)] == [{"good": 1, "fair": 2, "bad": 2}]


def test_the_keys_can_be_turned_off_and_no_script_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], visit: Callable[..., Any]
) -> None:
    study = str(tmp_path / "study.db")
    links = create([study, *plain_systems(tmp_path, ["good", "bad"], 2), "--raters", "2", "--checks", "0"], capsys)
    with serving(study) as server:
        page = visit(server.url + links["rater-1"])
        follow(page, "button", "Turn the keys off")
        page.keyboard.press("1")
        follow(page, "button", "Turn the keys on")
        assert place(page) == 1
        press(page, "1")
        assert place(page) == 2
        plain = visit(server.url + links["rater-2"], java_script_enabled=False)
        follow(plain, "button", "Tie")
        assert place(plain) == 2
