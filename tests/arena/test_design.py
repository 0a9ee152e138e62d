"""The design of Appendix D: 110 pairs a comparison, 30 common, 130 a rater, the rest spread evenly."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from rrhf.arena.design import Task, assign, design_tasks, spoil
from rrhf.arena.settings import LimitSettings, StudySettings
from rrhf.arena.systems import Systems, comparisons, read_systems
from rrhf.common.errors import UserError
from support.arena import write_system

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"


def systems(count: int, names: str = "abcd") -> Systems:
    queries = {f"q{i}": f"Query {i}?" for i in range(count)}
    return Systems(dict(queries), {name: {query: f"{name} {query} {WORDS}" for query in queries} for name in names})


def designed(
    given: Systems, asked: list[tuple[str, str]], raters: int, settings: StudySettings
) -> tuple[list[Task], list[list[Task]]]:
    tasks = design_tasks(given, asked, settings, random.Random(1))
    by_id = {task.id: task for task in tasks}
    covered: Counter[str] = Counter()
    seen = []
    for number in range(raters):
        mine = assign(tasks, f"rater-{number}", covered, settings)
        assert len(mine) == len(set(mine))
        covered.update(mine)
        seen.append([by_id[name] for name in mine])
    return tasks, seen


PAPER = [("a", "b"), ("a", "c"), ("a", "d")]


def test_the_papers_study() -> None:
    """Appendix D: 330 pairs, 30 of them common, 300 others; each of three raters sees 100 of them alone, and the 30."""
    tasks, seen = designed(systems(200), PAPER, 3, StudySettings(checks=0))
    assert Counter(task.systems for task in tasks) == dict.fromkeys(PAPER, 110)
    common = {task.id for task in tasks if task.common}
    assert len(common) == 30
    assert Counter(task.systems for task in tasks if task.common) == dict.fromkeys(PAPER, 10)
    own = [{task.id for task in mine} - common for mine in seen]
    assert [len(mine) for mine in seen] == [130] * 3 and [len(mine) for mine in own] == [100] * 3
    assert len(set.union(*own)) == 300  # nobody sees another's
    for mine in seen:  # each comparison a third
        assert (
            max(Counter(task.systems for task in mine).values()) - min(Counter(t.systems for t in mine).values()) <= 1
        )


@pytest.mark.parametrize(("count", "raters"), [(200, 5), (200, 7), (40, 4), (12, 3)])
def test_the_rest_is_spread_evenly(count: int, raters: int) -> None:
    tasks, seen = designed(systems(count), PAPER, raters, StudySettings(checks=0))
    there_is = 3 * min(count, 110)
    assert [len(mine) for mine in seen] == [min(130, there_is)] * raters
    covered = Counter(task.id for mine in seen for task in mine)
    rest = [covered[task.id] for task in tasks if not task.common]
    assert max(rest, default=0) - min(rest, default=0) <= 1
    assert all(covered[task.id] == raters for task in tasks if task.common)


def test_queries_are_not_repeated_before_they_must_be() -> None:
    tasks, _ = designed(systems(330), PAPER, 1, StudySettings(checks=0))
    assert len({task.query for task in tasks}) == 330
    tasks, _ = designed(systems(200), PAPER, 1, StudySettings(checks=0))
    assert set(Counter(task.query for task in tasks).values()) == {1, 2}


def test_the_seed_decides_the_study_and_not_what_it_is_called() -> None:
    given, settings = systems(50), StudySettings(per_comparison=20, seed=3)
    one = design_tasks(given, PAPER, settings, random.Random(1))
    two = design_tasks(given, PAPER, settings, random.Random(2))
    other = design_tasks(given, PAPER, StudySettings(per_comparison=20, seed=4), random.Random(1))

    def content(tasks: list[Task]) -> list[tuple]:
        return [(task.query, task.systems, task.common, task.spoilt_text) for task in tasks]

    assert content(one) == content(two) != content(other)
    assert not {task.id for task in one} & {task.id for task in two}


def test_attention_checks_come_on_top() -> None:
    given = systems(100)
    tasks, seen = designed(given, PAPER, 2, StudySettings(checks=4))
    checks = [task for task in tasks if task.spoilt is not None]
    assert len(checks) == 4 and not any(task.common for task in checks)
    for mine in seen:
        assert len(mine) == 134 and {task.id for task in checks} <= {task.id for task in mine}
        assert [task.id for task in mine if task.spoilt is not None] != [task.id for task in mine][-4:]
    for task in checks:
        whole = given.responses[task.systems[task.spoilt or 0]][task.query]
        assert task.spoilt_text != whole and sorted(task.spoilt_text.split()) == sorted(whole.split())


CHINESE = "今天天气很好，我们去公园玩。\n\n明天可能会下雨，记得带伞。"


DAYS = "\n".join(f"第{day}天天气很好，我们去公园玩得很开心。" for day in "一二三四五六七八九十百千万")


@pytest.mark.parametrize("text", ["Hello there", "Certainly not.", WORDS, CHINESE, DAYS, "a1b2c3" * 400])
def test_what_is_spoilt_has_lost_its_order(text: str) -> None:
    for seed in range(20):
        spoilt = spoil(text, random.Random(seed))
        assert spoilt is not None and sorted("".join(spoilt.split())) == sorted("".join(text.split()))
        for line in text.splitlines():
            assert not line or line not in spoilt


@pytest.mark.parametrize("text", ["yes", "no no no", "a b", "?", "4", "", "-" * 90 + "abcd", "x " * 90 + "a b c d"])
def test_what_is_too_short_is_not_spoilt(text: str) -> None:
    assert spoil(text, random.Random(0)) is None


def test_checks_that_nobody_could_pass_are_not_made(caplog: pytest.LogCaptureFixture) -> None:
    queries = {f"q{i}": f"{i} + 4?" for i in range(9)}
    texts = {name: {f"q{i}": str(i) if i else "The sum is four." for i in range(9)} for name in "ab"}
    tasks = design_tasks(Systems(queries, texts), [("a", "b")], StudySettings(common=2, checks=4), random.Random(0))
    assert [task.query for task in tasks if task.spoilt is not None] == ["q0"]
    assert "1 attention checks in place of 4" in caplog.text


def test_rankings_take_every_system_that_answered() -> None:
    given = systems(30)
    del given.responses["d"]["q3"]
    for name in "bcd":
        given.responses[name].pop("q4", None)
    tasks, seen = designed(given, [], 2, StudySettings(mode="ranking", common=5))
    assert {task.query: task.systems for task in tasks}["q3"] == ("a", "b", "c")
    assert "q4" not in {task.query for task in tasks}  # one response has no order
    assert len(tasks) == 29 and sum(task.common for task in tasks) == 5 and len(seen[1]) == 29


def test_settings_tell_all_their_faults_at_once() -> None:
    with pytest.raises(UserError) as fault:
        StudySettings(mode="pair", per_comparison=0, common=200, per_rater=130, checks=-1)
    for part in ("did you mean 'pairs'", "--per_comparison 0", "--common 200", "--checks -1"):
        assert part in str(fault.value)
    with pytest.raises(UserError, match="--strangers_per_minute 0"):
        LimitSettings(strangers_per_minute=0)


# --- systems ---------------------------------------------------------------------------------------------------------


def test_a_query_that_stands_twice_is_two_of_the_study(tmp_path: Path) -> None:
    twice = {"p0": "Same?", "p1": "Other?", "p5": "Same?"}
    write_system(tmp_path / "a.jsonl", {name: f"a to {name}" for name in twice}, twice)
    renamed = {"x0": "Same?", "x5": "Same?", "x1": "Other?"}
    write_system(tmp_path / "b.jsonl", {name: f"b to {name}" for name in renamed}, renamed)
    found = read_systems([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert found.responses["b"] == {"p0": "b to x0", "p5": "b to x5", "p1": "b to x1"}
    assert list(found.queries) == ["p0", "p1", "p5"]
    with pytest.raises(UserError, match="system 'a' has a response to it already: name the systems apart"):
        read_systems([str(tmp_path / "a.jsonl"), f"a={tmp_path / 'b.jsonl'}"])


def test_files_belong_together_by_id_or_by_query(tmp_path: Path) -> None:
    write_system(tmp_path / "a.jsonl", {"q1": "a1", "q2": "a2"})
    write_system(tmp_path / "b.jsonl", {"x": "b1", "q2": "b2", "y": "b3"}, {"x": "Query q1?"})
    found = read_systems([str(tmp_path / "a.jsonl"), f"new={tmp_path / 'b.jsonl'}"])
    assert found.responses == {"a": {"q1": "a1", "q2": "a2"}, "new": {"q1": "b1", "q2": "b2", "y": "b3"}}
    assert found.queries == {"q1": "Query q1?", "q2": "Query q2?", "y": "Query y?"}
    assert comparisons(found, []) == [("a", "new")] and comparisons(found, ["new:a"]) == [("new", "a")]
    with pytest.raises(UserError, match="--compare a:nev: write A:B; did you mean 'a:new'"):
        comparisons(found, ["a:nev"])
    with pytest.raises(UserError, match="twice"):
        comparisons(found, ["a:new", "new:a"])


def test_a_file_of_several_responses_is_as_many_systems(tmp_path: Path) -> None:
    file = tmp_path / "both.jsonl"
    file.write_text('{"id": "1", "query": "x", "responses": ["p", "q"], "sources": ["rho|old", "pi"]}\n')
    assert read_systems([str(file)]).responses == {"rho": {"1": "p"}, "old": {"1": "p"}, "pi": {"1": "q"}}
    with pytest.raises(UserError, match=r"'rho' has a response to it already: .*whatever NAME says.* --queries_only"):
        read_systems([str(file), f"another={file}"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": {"q": "1"}}, "a is not two systems"),
        ({"a": {"q": "1"}, "same/a": {"q": "2"}}, "with --data NAME=FILE"),
        ({"a": {"q": "1"}, "b": {"q": ("2", "Another?")}}, "another query"),
        ({"a": {"q\0": "1"}, "b": {"q\0": "2"}}, "half a surrogate"),
    ],
)
def test_what_cannot_be_compared_is_said(files: dict, words: str, tmp_path: Path) -> None:
    paths = []
    for name, answers in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        texts = {query: text if isinstance(text, str) else text[0] for query, text in answers.items()}
        queries = {query: text[1] for query, text in answers.items() if not isinstance(text, str)}
        paths.append(str(write_system(path, texts, queries)))
    with pytest.raises(UserError, match=words):
        read_systems(paths)
