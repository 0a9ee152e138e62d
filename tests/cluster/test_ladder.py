"""What failed is made again in ever smaller pieces, and what came of it is kept: the logic alone, without a cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest

from rrhf.cluster import pool
from rrhf.cluster.connection import Share
from rrhf.cluster.hand import outcome_in, outcome_of, records_of, unit_of, unit_table, written
from rrhf.cluster.ladder import Ladder, Outcome, Unit
from rrhf.cluster.settings import ClusterSettings
from rrhf.common.errors import FailedError, UserError
from rrhf.records.record import Record
from rrhf.rewards.away import rewards_away
from rrhf.rewards.combination import combination_of
from rrhf.rewards.kind import RewardContext

NAME = "m:length"
AWAY = rewards_away([NAME], RewardContext(), combination_of([NAME]))


def record(number: int) -> Record:
    return Record(query=f"q{number}", responses=["a" * (j + 1) for j in range(3)], id=f"r{number}")


PARTS = {0: [record(0), record(1)], 1: [record(2), record(3)], 2: []}


def read(numbers: object) -> Iterator[tuple[int, list[Record]]]:
    yield from ((n, PARTS[n]) for n in PARTS if n in list(numbers))  # type: ignore[call-overload]


def length(fails: Callable[[Record, int], bool] = lambda record, index: False):
    """A reward of a response's length as what a process opens."""

    def answer(block: list[Record], counts: Counter[str]) -> Iterator[tuple[int, Record]]:
        for place, one in enumerate(block):
            if any(fails(one, len(response)) for response in one.responses):
                raise FailedError(f"failed on {one.id}")
            yield place, AWAY.unite(one, [_scored(piece) for piece in AWAY.apart(one)])

    return answer


def _scored(piece: Record) -> Record:
    return Record(query=piece.query, responses=piece.responses, id=piece.id, rewards={NAME: [len(piece.responses[0])]})


def climb(ladder: Ladder, answer, dies: Callable[[list[Record]], bool] = lambda block: False):
    """Do what a cluster would, until all is done; the parts, and the units that were sent."""
    made, sent = {}, []
    while units := ladder.next_pass():
        for unit in units:
            sent.append(unit)
            block = ladder.records(unit) if unit.rung else dict(read([unit.number]))[unit.number]
            if not dies(block):
                for number, records, counts in ladder.took(unit, outcome_of(answer, block)):
                    made[number] = records, counts
        for number, records, counts in ladder.missed(units):
            made[number] = records, counts
    return made, sent


def scores(made) -> list[list[float | None]]:
    return [one.scores for number in sorted(made) for one in made[number][0]]


WHOLE = [[1, 2, 3]] * 4


def test_what_did_not_fail_is_done_once() -> None:
    made, sent = climb(Ladder("score", AWAY, list(PARTS), read, 0), length())
    assert scores(made) == WHOLE and sent == [Unit(0), Unit(1), Unit(2)] and made[2][0] == []


def test_a_worker_that_died_is_forgiven() -> None:
    deaths = iter([True, False, False])  # the first call of all
    made, sent = climb(Ladder("score", AWAY, [0, 1], read, 0), length(), lambda block: next(deaths, False))
    assert scores(made) == WHOLE and sent == [Unit(0), Unit(1), Unit(0)]


def test_a_response_that_fails_is_null_and_its_siblings_are_kept() -> None:
    fails = length(lambda one, size: one.id == "r2" and size == 2)
    made, sent = climb(Ladder("score", AWAY, [0, 1], read, 1), fails)
    assert scores(made) == [[1, 2, 3], [1, 2, 3], [1, None, 3], [1, 2, 3]]
    assert made[1][1] == {"failed again and again and left out (score)": 1}
    assert Unit(1, 1) not in sent  # the part's other record was kept
    assert sent.count(Unit(1, 0, 1)) == 2 and sent.count(Unit(1, 0, 0)) == 1


def test_what_kills_its_worker_is_null() -> None:
    def dies(block: list[Record]) -> bool:
        return any(one.id == "r1" and "aaa" in one.responses for one in block)

    made, sent = climb(Ladder("score", AWAY, [0, 1], read, 1), length(), dies)
    assert scores(made) == [[1, 2, 3], [1, 2, None], [1, 2, 3], [1, 2, 3]]
    assert [sent.count(unit) for unit in (Unit(0), Unit(0, 0), Unit(0, 1), Unit(0, 1, 2))] == [2, 1, 2, 2]


def test_what_kills_its_worker_alone_in_its_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes of pass after pass, each of which ends by itself: the ladder goes down to the response at fault."""
    parts = {0: [record(0)], 1: [record(1)]}
    sent: list[Unit] = []

    class Pass:
        error = None

        def __init__(self, units: list[Unit], ladder: Ladder, mine: object) -> None:
            self.units, self.ladder = units, ladder

        def __iter__(self) -> Iterator[tuple[Unit, Outcome]]:
            for unit in self.units:
                sent.append(unit)
                block = self.ladder.records(unit) if unit.rung else parts[unit.number]
                if not any("aaa" in one.responses and one.id == "r1" for one in block):
                    yield unit, outcome_of(length(), block)

    monkeypatch.setattr(pool, "_Pass", Pass)
    monkeypatch.setattr(pool, "connected", lambda settings: nullcontext())
    monkeypatch.setattr(pool, "share", lambda settings, device: Share(1, 1, 0))
    made = pool.RayPool(ClusterSettings(cluster="local")).make(
        "score", AWAY, [0, 1], lambda numbers: ((number, parts[number]) for number in numbers)
    )
    done = {number: (records, counts) for number, records, counts in made}
    assert scores(done) == [[1, 2, 3], [1, 2, None]] and len(sent) > 5


def test_too_many_are_refused_with_their_id() -> None:
    fails = length(lambda one, size: one.id == "r3")
    with pytest.raises(UserError, match=r"record 'r3', response 2 failed again .* failed on r3.*--cluster_failures 2"):
        climb(Ladder("score", AWAY, [0, 1], read, 2), fails)


def test_one_failure_keeps_what_was_done_and_tries_the_others_alone() -> None:
    calls: list[list[str]] = []
    plain = length(lambda one, size: one.id == "r1")

    def answer(block: list[Record], counts: Counter[str]) -> Iterator[tuple[int, Record]]:
        calls.append([one.id for one in block])
        yield from plain(block, counts)

    outcome = outcome_of(answer, [record(number) for number in range(3)])
    assert sorted(outcome.made) == [0, 2] and outcome.failed == {1: "failed on r1"}
    assert calls == [["r0", "r1", "r2"], ["r1"], ["r2"]]


def test_what_trying_again_cannot_mend_is_refused() -> None:
    def answer(block: list[Record], counts: Counter[str]) -> Iterator[tuple[int, Record]]:
        raise UserError("no such column")

    with pytest.raises(UserError, match="no such column"):
        outcome_of(answer, [record(0)])
    (row,) = unit_table(Unit(1), []).to_pylist()
    with pytest.raises(UserError, match="no such column"):
        outcome_in({**row, "answer": json.dumps({"refused": "no such column"})})


def test_records_travel_unchanged() -> None:
    odd = Record(query=[{"role": "user", "content": "a\u2028b\n\x85\ud7ff🙂"}], responses=["\r\n", "é"], id="x",
                 scores=[None, 0.1 + 0.2], rewards={"r": [1e-300, None]},
                 extra={"n": {"deep": [1, "\x00"]}})  # fmt: skip
    (row,) = unit_table(Unit(3, 1, 0), [odd, record(0)]).to_pylist()
    assert unit_of(row) == (3, 1, 0) and records_of(row) == [odd, record(0)]
    outcome = Outcome({0: odd}, {1: "why"}, Counter(cut=2))
    assert outcome_in({**row, "answer": written(outcome)}) == outcome
