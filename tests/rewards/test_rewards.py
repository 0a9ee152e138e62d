"""Scoring: reward functions with TRL's signature, what the data set provides, sums, streams and faults."""

from __future__ import annotations

import asyncio
import itertools
import linecache
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rrhf.common.errors import UserError
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards.scoring import load_reward, score, score_records
from rrhf.rewards.stage import RewardSettings, score_file

SOURCE = '''
import asyncio
import numpy as np
calls = []

def length(prompts, completions):
    """Characters."""
    calls.append(len(completions))
    return [len(completion) for completion in completions]

def everything(prompts, completions, **columns):
    calls.append((prompts, completions, columns))
    return [1.0] * len(completions)

def by_label(prompts, completions, label):
    return [float(l) for l in label]

def by_label_or_one(prompts, completions, label=None):
    return [1.0] * len(completions) if label is None else label

def skips_b(prompts, completions):
    return [None if "b" in completion else 2 for completion in completions]

async def slow(prompts, completions):
    await asyncio.sleep(0)
    return np.arange(len(completions), dtype=np.float32)

class Judge:
    def __call__(self, prompts, completions, **columns):
        return tuple(np.float32(0.5) for _ in completions)
    def method(self, prompts, completions):
        return [3 for _ in completions]

judge = Judge()
number = 3

def short(prompts, completions):
    return [0.0]

def nan(prompts, completions):
    return [0.0, float("nan"), 0.0]

def text(prompts, completions):
    return ["good" for _ in completions]

def one(prompts, completions):
    return 1.0

def vectors(prompts, completions):
    return [np.zeros(2) for _ in completions]

def broken(prompts, completions):
    return helper(completions)

def helper(completions):
    return 1 / 0
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module in the current folder, not yet imported, under the name ``my_rewards``."""
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "fails.py").write_text("raise RuntimeError('no key')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    load_reward("my_rewards:length")
    yield sys.modules["my_rewards"]
    for name in ("my_rewards", "needs_more", "fails"):
        sys.modules.pop(name, None)


def records() -> list[Record]:
    return [
        Record(query="q one", responses=["a", "bb"], id="one", extra={"label": 1, "note": "x"}),
        Record(query="q two", responses=["ccc"], id="two", extra={"label": 0}),
    ]


def rewards_of(name: str) -> list[list[float | None]]:
    return [record.rewards[name] for record in score_records(records(), [name])]


def test_scores_and_rewards_are_set_from_one_call_a_batch(module: ModuleType) -> None:
    scored = list(score(records(), ["my_rewards:length"]))
    assert [record.scores for record in scored] == [[1.0, 2.0], [3.0]]
    assert [record.rewards for record in scored] == [
        {"my_rewards:length": [1.0, 2.0]},
        {"my_rewards:length": [3.0]},
    ]
    assert module.calls == [3]


def test_columns_are_repeated_a_completion_and_prompts_are_text(module: ModuleType) -> None:
    list(score_records(records(), ["my_rewards:everything"]))
    prompts, completions, columns = module.calls[-1]
    assert prompts == ["q one", "q one", "q two"]
    assert completions == ["a", "bb", "ccc"]
    assert columns == {"label": [1, 1, 0], "note": ["x", "x", None]}
    assert rewards_of("my_rewards:by_label") == [[1.0, 1.0], [0.0]]


def test_chat_queries_are_passed_as_messages(module: ModuleType) -> None:
    query = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    list(score_records([Record(query=query, responses=["hi", "yo"])], ["my_rewards:everything"]))
    prompts, completions, columns = module.calls[-1]
    assert prompts == [query, query]
    assert completions == [[{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "yo"}]]
    assert columns == {}


def test_a_missing_column_is_named_unless_the_parameter_has_a_default(module: ModuleType) -> None:
    bare = [Record(query="q", responses=["a"], extra={"lable": 1})]
    with pytest.raises(UserError, match=r"column 'label'.*lable"):
        list(score_records(bare, ["my_rewards:by_label"]))
    (record,) = score_records(bare, ["my_rewards:by_label_or_one"])
    assert record.scores == [1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_rewards:slow", [[0.0, 1.0], [2.0]]),
        ("my_rewards:judge", [[0.5, 0.5], [0.5]]),
        ("my_rewards:judge.method", [[3.0, 3.0], [3.0]]),
        ("my_rewards:skips_b", [[2.0, None], [2.0]]),
    ],
)
def test_async_functions_objects_methods_and_none(
    module: ModuleType, name: str, expected: list[list[float | None]]
) -> None:
    values = rewards_of(name)
    assert values == expected
    assert all(type(value) in (float, type(None)) for row in values for value in row)


def test_async_functions_run_inside_a_running_loop(module: ModuleType) -> None:
    async def notebook() -> list[list[float | None]]:
        return rewards_of("my_rewards:slow")

    assert asyncio.run(notebook()) == [[0.0, 1.0], [2.0]]


def test_a_sum_of_rewards_is_weighted_and_none_where_one_is(module: ModuleType) -> None:
    names = ["my_rewards:length", "my_rewards:skips_b"]
    scored = list(score_records(records(), names, weights=[0.5, 2]))
    assert [record.scores for record in scored] == [[0.5 * 1 + 2 * 2, None], [0.5 * 3 + 2 * 2]]
    assert [record.rewards[names[0]] for record in scored] == [[1.0, 2.0], [3.0]]


def test_scoring_leaves_the_given_records_as_they_are(module: ModuleType) -> None:
    given, untouched = records(), records()
    given[0].rewards["other"] = untouched[0].rewards["other"] = [5.0, 6.0]
    scored = list(score_records(given, ["my_rewards:length", "my_rewards:skips_b"]))
    assert given == untouched
    assert list(scored[0].rewards) == ["other", "my_rewards:length", "my_rewards:skips_b"]
    # One and the same record twice in a batch is two records.
    assert [record.scores for record in score_records([given[0]] * 2, ["my_rewards:length"])] == [[1.0, 2.0]] * 2


def test_sums_that_are_equal_give_equal_scores(module: ModuleType) -> None:
    """One response has the rewards 0.1, 0.2, 0.3 and the other 0.3, 0.2, 0.1; added up they differ in the last bit."""
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    rewards: dict[str, list[float | None]] = {"a": [0.1, 0.3], "b": [0.2, 0.2], "c": [0.3, 0.1]}
    record = Record(query="q", responses=["x", "y"], rewards=rewards)
    (scored,) = score_records([record], [f"provided:{name}" for name in rewards])
    assert scored.scores[0] == scored.scores[1] == pytest.approx(0.6)


def test_scoring_streams_batch_by_batch(module: ModuleType) -> None:
    drawn: list[int] = []

    def endless() -> Iterator[Record]:
        for index in itertools.count():
            drawn.append(index)
            yield Record(query=f"q{index}", responses=["a"] * (index % 3))

    stream = score_records(endless(), ["my_rewards:length"], batch_size=4)
    first = [next(stream) for _ in range(6)]
    assert len(drawn) == 8
    assert module.calls == [0 + 1 + 2 + 0, 1 + 2 + 0 + 1]
    assert [record.scores for record in first] == [[], [1.0], [1.0, 1.0], [], [1.0], [1.0, 1.0]]
    assert "my_rewards:length" not in first[0].rewards


def test_missing_only_asks_for_what_is_not_there(module: ModuleType) -> None:
    given = records()
    given[0].rewards["my_rewards:length"] = [7.0, None]
    scored = list(score_records(given, ["my_rewards:length"], missing_only=True))
    assert [record.scores for record in scored] == [[7.0, 2.0], [3.0]]
    assert module.calls == [2]
    assert [record.scores for record in score_records(given, ["my_rewards:length"])] == [[1.0, 2.0], [3.0]]


def test_a_function_itself_is_a_reward() -> None:
    def vowels(prompts: list[str], completions: list[str]) -> list[float]:
        return [sum(letter in "aeiou" for letter in completion) for completion in completions]

    (record,) = score_records([Record(query="q", responses=["aeb", "x"])], [vowels])
    assert record.scores == [2.0, 0.0]
    (name,) = record.rewards
    assert name.endswith("vowels")


def test_provided_scores_are_kept_and_survive_a_second_scoring(module: ModuleType) -> None:
    record = Record(query="q", responses=["a", "bb"], scores=[0.25, None])
    names = ["provided", "my_rewards:length"]
    (record,) = score_records([record], names)
    assert record.rewards["provided"] == [0.25, None]
    assert record.scores == [1.25, None]
    (record,) = score_records([record], names)
    assert record.scores == [1.25, None]


def test_provided_rewards_by_name() -> None:
    record = Record(query="q", responses=["a"], rewards={"helpful": [0.5]})
    (scored,) = score_records([record], ["provided:helpful"])
    assert scored.scores == [0.5]
    with pytest.raises(UserError, match=r"'harmless'.*helpful"):
        list(score_records([record], ["provided:harmless"]))


def test_provided_without_scores_names_the_record() -> None:
    with pytest.raises(UserError, match=r"'two' has no scores.*--reward"):
        list(score_records([Record(query="q", responses=["a"], id="two")], ["provided"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("provide", r"did you mean 'provided'.*pkg\.module:function"),
        ("no_such_module_here:f", r"no module 'no_such_module_here'"),
        ("my_reward:length", r"did you mean my_rewards\?"),
        ("rrhf.reward:f", r"did you mean rrhf\.rewards\?"),
        ("my_rewards:lenght", r"no 'lenght'.*did you mean 'length'"),
        ("my_rewards:number", r"is int, not a function"),
        ("my_rewards:Judge", r"is a class"),
        ("needs_more:f", r"needs the module 'no_such_library'"),
        ("fails:f", r"importing fails failed: RuntimeError: no key"),
    ],
)
def test_an_unknown_reward_is_refused_before_anything_is_read(module: ModuleType, name: str, message: str) -> None:
    def unread() -> Iterator[Record]:
        raise AssertionError("read")
        yield

    with pytest.raises(UserError, match=message):
        score_records(unread(), [name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards:short", r"returned 1 scores for the 2 responses of record one:"),
        ("my_rewards:nan", r"'my_rewards:nan' gave nan for response 1 of record 'one'"),
        ("my_rewards:text", r"gave 'good' for response 0 of record 'one'"),
        ("my_rewards:vectors", r"for response 0 of record 'one'"),
        ("my_rewards:one", r"returned float for record one: it must return a list"),
    ],
)
def test_what_is_no_score_names_record_and_reward(module: ModuleType, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards_of(name)


def test_an_exception_in_the_function_is_told_with_its_place_and_chained(module: ModuleType) -> None:
    with pytest.raises(UserError, match=r"failed on record one: ZeroDivisionError.*in helper.*line") as caught:
        rewards_of("my_rewards:broken")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_of_many_records_the_one_at_fault_is_named() -> None:
    calls: list[int] = []

    def fails_on_37(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(len(completions))
        if "q37" in prompts:
            raise ValueError("what is this?")
        return [0.0] * len(completions)

    given = [Record(query=f"q{i}", responses=["a", "b"], id=f"r{i}") for i in range(64)]
    with pytest.raises(UserError, match=r"failed on record r37: ValueError: what is this\?"):
        list(score_records(given, [fails_on_37]))
    assert sum(calls) <= 3 * 128  # by halves


def test_records_that_fail_together_only_are_named_together() -> None:
    def at_most_one_record(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0] * min(len(completions), 2)

    given = [Record(query=f"q{i}", responses=["a", "b"], id=f"r{i}") for i in range(2)]
    with pytest.raises(UserError, match=r"returned 2 scores for the 4 responses of records r0, r1:"):
        list(score_records(given, [at_most_one_record]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": []}, "no reward"),
        ({"rewards": ["provided", "provided"]}, "named twice"),
        ({"rewards": ["provided"], "weights": [1, 2]}, "weights"),
        ({"rewards": ["provided"], "weights": [float("inf")]}, "weights"),
        ({"rewards": ["provided"], "batch_size": 0}, "batch_size 0"),
    ],
)
def test_unfit_settings_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_records([], **arguments)


def test_unfinished_scores_of_a_reward_that_was_edited_are_refused(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "scored.jsonl"
    settings = RewardSettings(reward=["provided", "my_rewards:length"])
    monkeypatch.setattr("rrhf.rewards.stage.SCORING_PART", 1)
    write_records(data, [replace(records()[0], scores=[0.0, 0.0]), records()[1]])
    with pytest.raises(UserError, match="'two' has no scores"):  # stopped after the first part
        score_file(data, output, settings)
    write_records(data, [replace(r, scores=[0.0] * len(r.responses)) for r in records()], overwrite=True)
    (tmp_path / "my_rewards.py").write_text(SOURCE.replace("len(completion) for", "2.0 * len(completion) for"))
    sys.modules.pop("my_rewards")  # another process
    linecache.checkcache()
    with pytest.raises(UserError, match=r"code of my_rewards:length was '\w+', is '\w+'.*--overwrite"):
        score_file(data, output, settings)
    score_file(data, output, settings, overwrite=True)
    assert [record.scores for record in read_records(output)] == [[2.0, 4.0], [6.0]]


def test_numpy_booleans_and_integers_are_numbers() -> None:
    def mixed(prompts: list[str], completions: list[str]) -> list[Any]:
        return [np.bool_(True), np.int64(3), True]

    (record,) = score_records([Record(query="q", responses=["a", "b", "c"])], [mixed])
    assert record.scores == [1.0, 3.0, 1.0]
