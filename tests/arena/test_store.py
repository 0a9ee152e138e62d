"""What is kept of a study, in a file and on a real PostgreSQL server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from rrhf.arena.access import OWNER
from rrhf.arena.database import TABLES, Database, name_of
from rrhf.arena.settings import StudySettings
from rrhf.arena.store import (
    Answer,
    Rater,
    Study,
    add_rater,
    answered,
    assigned,
    create_study,
    find_rater,
    is_owner,
    new_link,
    open_study,
    progress,
    rankings,
    revoke_link,
    said,
    save_answer,
    texts,
    votes,
)
from rrhf.arena.systems import Systems
from rrhf.common.errors import UserError
from support.postgres import NO_POSTGRES, postgres, postgres_programs

SETTINGS = StudySettings(per_comparison=6, common=2, per_rater=4, checks=1)
RATERS = ["anna", "ben"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if postgres_programs() is None:
        pytest.skip(NO_POSTGRES)
    with postgres() as url:
        yield url


@pytest.fixture(params=["file", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a study can be made."""
    if request.param == "file":
        yield str(tmp_path / "my study.db")
        return
    url = request.getfixturevalue("server")
    yield url
    database = Database(url)
    TABLES.drop_all(database.engine)
    database.close()


def systems(names: str = "ab") -> Systems:
    queries: Any = {f"q{i}": [{"role": "user", "content": f"Query {i}? ü𝄞"}] for i in range(8)}
    return Systems(queries, {name: {query: f"{name} says of {query} this" for query in queries} for name in names})


def create(place: str, settings: StudySettings = SETTINGS, names: str = "ab") -> dict[str, str]:
    compared = [("a", "b")] if settings.mode == "pairs" else []
    return create_study(place, systems(names), compared, RATERS, settings, "http://127.0.0.1:8000")


def rater_of(study: Study, token: str) -> Rater:
    rater = find_rater(study, token)
    assert rater is not None
    return rater


def test_a_vote_is_kept_as_it_was_shown(place: str) -> None:
    tokens = create(place)
    with open_study(place) as study:
        anna = rater_of(study, tokens["anna"])
        assert answered(study, anna) == (0, 5)
        for number, choice in enumerate(("left", "tie", "right", "skip"), 1):
            shown, said = assigned(study, anna, number)
            assert said is None
            assert save_answer(study, anna, shown.task, Answer(choice, "why\n✓"), 0)
    with open_study(place) as study:  # as another process finds it
        assert answered(study, anna) == (4, 5)
        told = votes(study)
        assert [vote.choice for vote in told] == ["left", "tie", "right", "skip"]
        for number, vote in enumerate(told, 1):
            shown, said = assigned(study, anna, number)
            assert said is not None and said.revision == 1
            assert (vote.left, vote.right) == shown.order and {vote.left, vote.right} == {"a", "b"}
            assert (vote.rater, vote.pair, vote.query, vote.why) == ("anna", shown.task.id, shown.task.query, "why\n✓")
            for system, text in zip(shown.order, shown.texts):
                whole = texts(study)[vote.query].responses[system]
                spoilt = vote.spoilt is not None and system == shown.order[("left", "right").index(vote.spoilt)]
                assert (text == whole) != spoilt and sorted("".join(text.split())) == sorted("".join(whole.split()))
        assert texts(study)[told[0].query].query == systems().queries[told[0].query]
        row = progress(study)[0]
        assert (row.rater, row.assigned, row.answered, row.skipped) == (anna, 5, 4, 1)
        assert progress(study)[1].last is None


def test_the_same_click_twice_counts_once_and_a_stale_page_changes_nothing(place: str) -> None:
    tokens = create(place)
    with open_study(place) as study:
        anna = rater_of(study, tokens["anna"])
        task = assigned(study, anna, 1)[0].task
        assert save_answer(study, anna, task, Answer("left"), 0)
        assert save_answer(study, anna, task, Answer("left"), 0)  # the same click
        assert not save_answer(study, anna, task, Answer("right"), 0)  # another tab, which knows of no answer
        assert [(vote.choice, assigned(study, anna, 1)[1].revision) for vote in votes(study)] == [("left", 1)]  # type: ignore[union-attr]
        assert save_answer(study, anna, task, Answer("right"), 1)  # who went back and saw it
        assert not save_answer(study, anna, task, Answer("tie"), 1)
        assert [vote.choice for vote in votes(study)] == ["right"]


def test_many_connections_at_once_keep_one_answer(place: str) -> None:
    tokens = create(place)
    with open_study(place) as study:
        anna = rater_of(study, tokens["anna"])
        task = assigned(study, anna, 1)[0].task
        start = threading.Barrier(8)
        kept: list[tuple[str, bool]] = []

        def send(choice: str) -> None:
            with open_study(place) as mine:
                start.wait()
                kept.append((choice, save_answer(mine, anna, task, Answer(choice), 0)))

        threads = [threading.Thread(target=send, args=("left" if number % 2 else "right",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (vote,) = votes(study)
        assert sorted(kept) == sorted(
            [(vote.choice, True)] * 4 + [("left" if vote.choice == "right" else "right", False)] * 4
        )


def test_any_text_is_kept(place: str) -> None:
    strange = "a\0b\ud800c\udfffd 😀\u2028\x1b"
    given = Systems({"q": [{"role": "user", "content": strange}]}, {"a": {"q": strange}, "b": {"q": "\\u0000"}})
    create_study(place, given, [("a", "b")], RATERS, StudySettings(title=strange), "http://127.0.0.1:8000")
    with open_study(place) as study:
        assert (study.texts["q"].query, study.texts["q"].responses) == (given.queries["q"], given.of("q"))
        assert study.settings.title == strange


def test_rankings_are_kept_by_system(place: str) -> None:
    tokens = create(place, StudySettings(mode="ranking", per_comparison=3, common=1), "abc")
    with open_study(place) as study:
        ben = rater_of(study, tokens["ben"])
        for number in (1, 2):
            shown, _ = assigned(study, ben, number)
            assert sorted(shown.order) == ["a", "b", "c"]
            ranks = {"a": 1, "b": 3, "c": 1}
            answer = Answer("rank", "the second one lies", ranks) if number == 1 else Answer("skip", "both are poor")
            assert save_answer(study, ben, shown.task, answer, 0)
        (one,) = rankings(study)
        assert (one.rater, one.query, one.ranks) == ("ben", assigned(study, ben, 1)[0].task.query, ranks)
        assert [(row["ranks"], row["why"]) for row in said(study)] == [
            (ranks, "the second one lies"), (None, "both are poor")
        ]  # fmt: skip
        assert votes(study) == [] and progress(study)[1].skipped == 1


def test_links_open_until_they_are_revoked_or_replaced(place: str) -> None:
    tokens = create(place)
    with open_study(place) as study:
        anna = rater_of(study, tokens["anna"])
        assert is_owner(study, tokens[OWNER]) and not is_owner(study, tokens["anna"])
        assert find_rater(study, tokens[OWNER]) is None
        name, _, secret = tokens["anna"].partition(".")
        for wrong in ("", ".", "1", "1.", f"2.{secret}", f"{name}.{secret[:-1]}", "²." + secret, f"99999999.{secret}"):
            assert find_rater(study, wrong) is None and not is_owner(study, wrong)
        assert not is_owner(study, f"1.{tokens[OWNER].partition('.')[2]}")
        revoke_link(study, anna.id)
        assert find_rater(study, tokens["anna"]) is None and not progress(study)[0].rater.active
        assert find_rater(study, f"{name}.") is None  # a hash of nothing is nobody's
        fresh = new_link(study, "anna")
        assert find_rater(study, fresh) == anna and find_rater(study, tokens["anna"]) is None
        owner = new_link(study, OWNER)
        assert is_owner(study, owner) and not is_owner(study, tokens[OWNER])
        with pytest.raises(UserError, match=r"no rater 'zoe' .* anna, ben"):
            new_link(study, "zoe")


def test_who_comes_later_gets_what_the_fewest_see(place: str) -> None:
    tokens = create(place)
    with open_study(place) as study:
        tokens["zoe"] = add_rater(study, "zoe")
        seen = {
            name: {assigned(study, rater_of(study, tokens[name]), n)[0].task.id for n in range(1, 6)}
            for name in tokens
            if name != OWNER
        }
        common = {task.id for task in study.tasks.values() if task.common or task.spoilt is not None}
        assert all(common <= mine for mine in seen.values()) and len(common) == 3
        alone = [mine - common for mine in seen.values()]
        assert set.union(alone[0], alone[1]) == set(study.tasks) - common and len(alone[2]) == 2
        with pytest.raises(UserError, match="already"):
            add_rater(study, "zoe")


def test_a_study_is_not_made_twice(place: str) -> None:
    tokens = create(place)
    with pytest.raises(UserError, match="exists already"):
        create(place)
    with open_study(place) as study:
        assert find_rater(study, tokens["anna"])


def test_what_a_removed_study_left_behind_is_not_written_into_a_new_one(tmp_path: Path) -> None:
    place, log = tmp_path / "study.db", tmp_path / "study.db-wal"
    create(str(place))
    with open_study(str(place)) as study:
        new_link(study, "anna")
        kept = log.read_bytes()
    log.write_bytes(kept)  # as a process that is killed leaves it
    with pytest.raises(UserError, match=r"exists already, .* or remove it, with .*study\.db-wal$"):
        create(str(place))
    place.unlink()
    with pytest.raises(UserError, match=r"study\.db-wal: left behind by a study .* or remove it$"):
        create(str(place))
    assert not place.exists() and log.read_bytes() == kept
    log.unlink()
    tokens = create(str(place))
    with open_study(str(place)) as study:
        assert find_rater(study, tokens["anna"])


def test_no_secret_is_kept(tmp_path: Path) -> None:
    tokens = create(str(tmp_path / "study.db"))
    kept = (tmp_path / "study.db").read_bytes()
    assert all(token.partition(".")[2].encode() not in kept for token in tokens.values())
    assert (tmp_path / "study.db").stat().st_mode & 0o077 == 0  # what is kept is nobody else's business either
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_a_file_is_written_through_to_the_disk_at_every_vote(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "x.db"))
    with database.writing() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    assert found == ["wal", 2]  # FULL: the log is synced before a commit returns
    database.close()


def test_what_stops_one_vote_takes_no_other_with_it(tmp_path: Path) -> None:
    """SQLite takes back the whole of a transaction, and not a statement alone, where it finds no room."""
    tokens = create(str(tmp_path / "study.db"))
    with open_study(str(tmp_path / "study.db")) as study:
        given = {name: assigned(study, rater_of(study, tokens[name]), 1)[0].task for name in RATERS}
        remarks = {"anna": "", "ben": "x" * 200_000}
        kept: dict[str, bool | str] = {}

        def full(connection: Any, record: Any) -> None:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages + 2}")

        sa.event.listen(study.database.engine, "connect", full)
        study.database.engine.dispose()

        def vote(name: str) -> None:
            answer = Answer("left", remarks[name])
            try:
                kept[name] = save_answer(study, rater_of(study, tokens[name]), given[name], answer, 0)
            except sa.exc.OperationalError as error:
                kept[name] = str(error.orig)

        with study.database._turn:  # both wait, and go to the disk together
            threads = [threading.Thread(target=vote, args=(name,)) for name in RATERS]
            for thread in threads:
                thread.start()
            while len(study.database._waiting) < 2:
                pass
        for thread in threads:
            thread.join()
        assert kept["anna"] is True and "full" in str(kept["ben"])
        assert [one.rater for one in votes(study)] == ["anna"]


def test_a_full_disk_and_a_damaged_study_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "study.db"

    def full(self: Database) -> None:
        raise sa.exc.OperationalError("BEGIN", {}, Exception("database or disk is full"))

    def half(temporary: str, *_: Any) -> None:  # SQLite does not always take its own files away there
        Path(f"{temporary}-wal").write_bytes(b"half")
        full(Database(temporary))

    with monkeypatch.context() as patch:
        patch.setattr("rrhf.arena.store._fill", half)
        with pytest.raises(
            UserError, match=r"study\.db: the study cannot be read or written \(database or disk is full"
        ):
            create(str(place))
        assert list(tmp_path.iterdir()) == []
        patch.undo()
        create(str(place))
        patch.setattr(Database, "writing", full)
        with pytest.raises(UserError, match="see that its disk has room"), open_study(str(place)) as study:
            add_rater(study, "dora")
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a damaged one is replaced by a copy"), open_study(str(place)) as study:
        votes(study)


def test_a_url_is_named_without_what_it_is_given() -> None:
    assert name_of("postgresql://u:p@h/d?password=geheim") == "postgresql://u:***@h/d"


def test_skipped_checks_are_not_failed_ones(tmp_path: Path) -> None:
    tokens = create(str(tmp_path / "study.db"))
    with open_study(str(tmp_path / "study.db")) as study:
        anna = rater_of(study, tokens["anna"])
        for number in range(1, 6):
            shown, _ = assigned(study, anna, number)
            assert save_answer(study, anna, shown.task, Answer("skip"), 0)
        assert (progress(study)[0].skipped, progress(study)[0].checks, progress(study)[0].passed) == (5, 0, 0)


def test_what_is_no_study_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    Database(str(tmp_path / "empty.db")).engine.connect().close()
    for name, words in (
        ("none.db", "there is no study"),
        ("text.db", "holds no study"),
        ("empty.db", "holds no study"),
    ):
        with pytest.raises(UserError, match=words), open_study(str(tmp_path / name)):
            pass
    create(str(tmp_path / "later.db"))
    database = Database(str(tmp_path / "later.db"))
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE study SET format = 99"))
    database.close()
    for place, words in (
        (str(tmp_path / "later.db"), "format 99"),
        ("mysql://x/y", "not known"),
        ("postgresql://rrhf:secret@127.0.0.1:1/x", r"rrhf:\*\*\*@127.0.0.1:1/x: cannot be reached"),
    ):
        with pytest.raises(UserError, match=words), open_study(place):
            pass
