"""A study as it is kept: made once, opened by the pages, by results and by exports.

``votes``, ``rankings`` and ``texts`` are what results and exports read.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import sqlalchemy as sa

from rrhf.arena.access import OWNER, fits, new_token, split_token
from rrhf.arena.database import (
    ANSWER,
    ASSIGNMENT,
    QUERY,
    RATER,
    RESPONSE,
    STUDY,
    TABLES,
    TASK,
    Database,
    exists,
    is_blank,
    leftovers,
    name_of,
    told,
)
from rrhf.arena.design import Task, assign, design_tasks
from rrhf.arena.raters import check_counts
from rrhf.arena.settings import StudySettings
from rrhf.arena.systems import Systems
from rrhf.arena.votes import Choice, Ranking, Vote
from rrhf.common.errors import UserError
from rrhf.common.files import replacing
from rrhf.records.record import Query

FORMAT = 1  # of the tables
# How SQLite and PostgreSQL say that what stands there is none of ours.
NO_STUDY = re.compile('no such table|no such column|not a database|relation "study" does not exist')
SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True)
class Texts:
    """A query and the responses to it, by system."""

    query: Query
    responses: dict[str, str]


@dataclass(frozen=True)
class Rater:
    """``active``: whether the personal link still opens the pages."""

    id: int
    name: str
    active: bool


@dataclass(frozen=True)
class Assigned:
    """A task as one rater sees it. ``order``: the systems from the left to the right."""

    place: int
    task: Task
    order: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a rater said of a task; ``ranks`` of a ranking: system → place."""

    choice: str
    why: str = ""
    ranks: dict[str, int] | None = None
    revision: int = 0

    def says_as(self, other: Answer) -> bool:
        return replace(self, revision=0) == replace(other, revision=0)


@dataclass(frozen=True)
class Progress:
    """How far a rater is. ``checks``: attention checks, skipped ones left out; ``passed``: the whole response won."""

    rater: Rater
    assigned: int
    answered: int
    skipped: int
    checks: int
    passed: int
    last: float | None


@dataclass(frozen=True)
class Study:
    """An open study; what does not change while it runs is in memory."""

    place: str
    database: Database
    settings: StudySettings
    systems: list[str]
    url: str
    key: str
    tasks: dict[str, Task]
    texts: dict[str, Texts]

    def close(self) -> None:
        self.database.close()


# --- made, opened ------------------------------------------------------------------------------------------------


def create_study(
    place: str,
    systems: Systems,
    comparisons: Sequence[tuple[str, str]],
    raters: Sequence[str],
    settings: StudySettings,
    url: str,
) -> dict[str, str]:
    """Write a study whole or not at all; return the personal tokens by name, the owner's under ``OWNER``.

    Args:
        place: a file to be made, or the URL of a PostgreSQL database without a study in it.
        url: the address at which raters reach the pages.

    Raises:
        UserError: there is a study already, or what one that was removed left behind; or the systems have no query in
            common.
    """
    left = leftovers(place)
    beside = f", with {' and '.join(left)}" if left else ""
    if exists(place):
        raise UserError(
            f"{name_of(place)} exists already, and may hold votes: choose another name, or remove it{beside}"
        )
    if left:  # SQLite would write what stands there into the new study
        raise UserError(
            f"{' and '.join(left)}: left behind by a study that is gone, and may hold its last votes: choose another "
            f"name, or remove {'it' if len(left) == 1 else 'them'}"
        )
    tasks = design_tasks(systems, comparisons, settings, secrets.SystemRandom())
    if "://" in place:
        with told(place):
            return _fill(place, systems, tasks, raters, settings, url)
    with told(place), replacing(place) as temporary:
        temporary.touch(0o600)
        try:
            tokens = _fill(str(temporary), systems, tasks, raters, settings, url)
        finally:
            for file in leftovers(str(temporary)):
                Path(file).unlink(missing_ok=True)
    return tokens


def _fill(
    place: str, systems: Systems, tasks: list[Task], raters: Sequence[str], settings: StudySettings, url: str
) -> dict[str, str]:
    token, kept = new_token(OWNER)
    tokens = {OWNER: token}
    queries = {task.query for task in tasks}
    head = {
        "id": 1, "format": FORMAT, "settings": asdict(settings), "systems": list(systems.responses), "url": url,
        "key": secrets.token_hex(32), "owner": kept, "made": time.time(),
    }  # fmt: skip
    texts = [
        {"query": query, "system": system, "text": text}
        for query in systems.queries
        if query in queries
        for system, text in systems.of(query).items()
    ]
    database = Database(place)
    try:
        with database.writing() as connection:
            TABLES.create_all(connection)
            connection.execute(STUDY.insert(), head)
            kept_queries = [{"id": name, "query": query} for name, query in systems.queries.items() if name in queries]
            connection.execute(QUERY.insert(), kept_queries)
            connection.execute(RESPONSE.insert(), texts)
            rows = [{**asdict(task), "systems": list(task.systems)} for task in tasks]
            connection.execute(TASK.insert(), [{**row, "number": number} for number, row in enumerate(rows)])
            for name in raters:
                tokens[name] = _add(connection, tasks, name, settings)
    finally:
        database.close()
    return tokens


def _add(connection: sa.Connection, tasks: Sequence[Task], name: str, settings: StudySettings) -> str:
    counted = sa.select(ASSIGNMENT.c.task, sa.func.count()).group_by(ASSIGNMENT.c.task)
    covered = {task: int(count) for task, count in connection.execute(counted)}
    number = connection.execute(sa.select(sa.func.coalesce(sa.func.max(RATER.c.id), 0))).scalar_one() + 1
    token, kept = new_token(str(number))
    connection.execute(RATER.insert(), {"id": number, "name": name, "secret": kept})
    sizes = {task.id: len(task.systems) for task in tasks}
    # Who knows the seed must not know the sides: they are not drawn from it.
    sides = secrets.SystemRandom()
    rows = [
        {"rater": number, "place": place, "task": task, "shown": sides.sample(range(sizes[task]), sizes[task])}
        for place, task in enumerate(assign(tasks, name, covered, settings), 1)
    ]
    connection.execute(ASSIGNMENT.insert(), rows)
    return token


@contextmanager
def open_study(place: str) -> Iterator[Study]:
    """Open a study that ``create_study`` made.

    Raises:
        UserError: there is none, or a later version made it.
    """
    if not exists(place):
        raise UserError(f"{name_of(place)}: there is no study: make one with `rrhf arena create`")
    if is_blank(place):  # SQLite would make a database of it
        raise UserError(f"{name_of(place)}: holds no study: make one with `rrhf arena create`")
    database = Database(place)
    try:
        with told(place):
            yield from _opened(place, database)
    finally:
        database.close()


def _opened(place: str, database: Database) -> Iterator[Study]:
    try:
        with database.reading() as connection:
            head = connection.execute(sa.select(STUDY)).mappings().one()
    except (sa.exc.DatabaseError, sa.exc.NoResultFound) as error:
        if isinstance(error, sa.exc.DBAPIError) and not NO_STUDY.search(str(error.orig)):
            raise
        raise UserError(f"{name_of(place)}: holds no study: make one with `rrhf arena create`") from error
    if head["format"] != FORMAT:
        raise UserError(f"{name_of(place)}: made by another version of rrhf (format {head['format']})")
    with database.reading() as connection:
        tasks = _tasks(connection)
        texts = {row.id: Texts(row.query, {}) for row in connection.execute(sa.select(QUERY))}
        for row in connection.execute(sa.select(RESPONSE)):
            texts[row.query].responses[row.system] = row.text
    settings = StudySettings(**head["settings"])
    yield Study(place, database, settings, head["systems"], head["url"], head["key"], tasks, texts)


def _tasks(connection: sa.Connection) -> dict[str, Task]:
    rows = connection.execute(sa.select(TASK).order_by(TASK.c.number))
    return {
        row.id: Task(row.id, row.query, tuple(row.systems), row.common, row.spoilt, row.spoilt_text) for row in rows
    }


# --- who may enter -----------------------------------------------------------------------------------------------


def find_rater(study: Study, token: str) -> Rater | None:
    """The rater whose personal token this is."""
    number, secret = split_token(token)
    with study.database.reading() as connection:
        wanted = int(number) if number.isascii() and number.isdecimal() and len(number) < 9 else 0
        row = connection.execute(sa.select(RATER).where(RATER.c.id == wanted)).one_or_none()
    return Rater(row.id, row.name, True) if fits(secret, row.secret if row else None) and row else None


def is_owner(study: Study, token: str) -> bool:
    """Whether this is the owner's token."""
    name, secret = split_token(token)
    with study.database.reading() as connection:
        kept = connection.execute(sa.select(STUDY.c.owner)).scalar_one()
    return fits(secret, kept) and name == OWNER


def new_link(study: Study, name: str) -> str:
    """A new token for a rater or the ``OWNER``; the one before opens nothing any more.

    Raises:
        UserError: there is no such rater.
    """
    with study.database.writing() as connection:
        if name == OWNER:
            token, kept = new_token(OWNER)
            connection.execute(STUDY.update().values(owner=kept))
            return token
        number = connection.execute(sa.select(RATER.c.id).where(RATER.c.name == name)).scalar()
        if number is None:
            names = ", ".join(connection.execute(sa.select(RATER.c.name).order_by(RATER.c.id)).scalars())
            raise UserError(f"no rater {name!r} in this study (it has {names}): --add makes a new one")
        token, kept = new_token(str(number))
        connection.execute(RATER.update().where(RATER.c.id == number).values(secret=kept))
    return token


def revoke_link(study: Study, rater: int) -> None:
    """The rater's link opens nothing any more; the votes stay."""
    with study.database.writing() as connection:
        connection.execute(RATER.update().where(RATER.c.id == rater).values(secret=None))


def add_rater(study: Study, name: str) -> str:
    """A new rater gets what the fewest see; return the token.

    Raises:
        UserError: the name is taken.
    """
    check_names([name])
    with study.database.writing() as connection:
        if connection.execute(sa.select(RATER.c.id).where(RATER.c.name == name)).scalar() is not None:
            raise UserError(f"there is a rater {name!r} already: choose another name")
        return _add(connection, list(study.tasks.values()), name, study.settings)


def check_names(names: Sequence[str]) -> None:
    """Raises UserError: a name is empty, taken twice, the owner's, or cannot be printed in a line."""
    for place, name in enumerate(names):
        if not name.strip() or name == OWNER or name in names[:place] or not name.isprintable():
            raise UserError(
                f"--raters: {name!r} is empty, stands there twice, is the owner's or holds what cannot be printed: "
                "choose another name"
            )


# --- what raters see and say --------------------------------------------------------------------------------------


def answered(study: Study, rater: Rater) -> tuple[int, int]:
    """How many tasks the rater has answered, and has at all."""
    done = sa.select(sa.func.count()).where(ANSWER.c.rater == rater.id).scalar_subquery()
    all_of_them = sa.select(sa.func.count()).where(ASSIGNMENT.c.rater == rater.id).scalar_subquery()
    with study.database.reading() as connection:
        row = connection.execute(sa.select(done, all_of_them)).one()
    return int(row[0]), int(row[1])


def assigned(study: Study, rater: Rater, place: int) -> tuple[Assigned, Answer | None]:
    """The rater's task at ``place``, which must exist, and the answer to it if there is one."""
    both = ASSIGNMENT.outerjoin(
        ANSWER, sa.and_(ANSWER.c.rater == ASSIGNMENT.c.rater, ANSWER.c.task == ASSIGNMENT.c.task)
    )
    columns = [
        ASSIGNMENT.c.task,
        ASSIGNMENT.c.shown,
        *(ANSWER.c[name] for name in ("choice", "why", "ranks", "revision")),
    ]
    wanted = sa.select(*columns).select_from(both)
    wanted = wanted.where(ASSIGNMENT.c.rater == rater.id, ASSIGNMENT.c.place == place)
    with study.database.reading() as connection:
        row = connection.execute(wanted).one()
    task = study.tasks[row.task]
    said = None if row.choice is None else Answer(row.choice, row.why, row.ranks, row.revision)
    texts = study.texts[task.query].responses
    shown = [task.spoilt_text if index == task.spoilt else texts[task.systems[index]] for index in row.shown]
    return Assigned(place, task, tuple(task.systems[index] for index in row.shown), tuple(shown)), said


def save_answer(study: Study, rater: Rater, task: Task, answer: Answer, seen: int) -> bool:
    """Keep an answer; when this returns it survives a crash of the process and of the machine.

    The same answer sent again changes nothing. A page that does not know the answer that is kept by now, from another
    tab or device, changes nothing either.

    Args:
        seen: the revision of the answer that the page showed, 0 for none.

    Returns:
        Whether what is kept now is this answer.
    """
    values = {
        "choice": answer.choice, "ranks": answer.ranks, "why": answer.why, "at": time.time(), "revision": seen + 1,
    }  # fmt: skip
    mine = sa.and_(ANSWER.c.rater == rater.id, ANSWER.c.task == task.id)

    def work(connection: sa.Connection) -> bool:
        row = connection.execute(sa.select(ANSWER).where(mine)).one_or_none()
        if row is not None and answer.says_as(Answer(row.choice, row.why, row.ranks)):
            return True
        if seen == 0 and row is None:
            connection.execute(ANSWER.insert(), {"rater": rater.id, "task": task.id, **values})
            return True
        changed = connection.execute(ANSWER.update().where(mine, ANSWER.c.revision == seen).values(**values))
        return changed.rowcount == 1

    try:
        return study.database.write(work)
    except sa.exc.IntegrityError:  # another connection to PostgreSQL was first; what it kept can be the same
        with study.database.reading() as connection:
            row = connection.execute(sa.select(ANSWER).where(mine)).one()
        return answer.says_as(Answer(row.choice, row.why, row.ranks))


# --- what is read of it -------------------------------------------------------------------------------------------


def _answers(study: Study) -> list[Any]:
    wanted = (
        sa.select(ANSWER, RATER.c.name, ASSIGNMENT.c.shown)
        .join(RATER, RATER.c.id == ANSWER.c.rater)
        .join(ASSIGNMENT, sa.and_(ASSIGNMENT.c.rater == ANSWER.c.rater, ASSIGNMENT.c.task == ANSWER.c.task))
        .order_by(ANSWER.c.rater, ASSIGNMENT.c.place)
    )
    with study.database.reading() as connection:
        return list(connection.execute(wanted))


def votes(study: Study) -> list[Vote]:
    """Every rater's last word on every pair, by rater and in the order shown; those of attention checks too."""
    found = []
    for row in _answers(study) if study.settings.mode == "pairs" else []:
        task = study.tasks[row.task]
        left, right = (task.systems[index] for index in row.shown)
        spoilt = None if task.spoilt is None else SIDES[row.shown.index(task.spoilt)]
        choice = cast(Choice, row.choice)
        found.append(Vote(row.name, task.id, task.query, left, right, choice, row.why, row.at, task.common, spoilt))
    return found


def rankings(study: Study) -> list[Ranking]:
    """Every rater's last order of every query's responses, skipped ones left out."""
    rows = _answers(study) if study.settings.mode == "ranking" else []
    return [Ranking(row.name, study.tasks[row.task].query, row.ranks, row.at, row.why) for row in rows if row.ranks]


def said(study: Study) -> list[dict[str, Any]]:
    """Every vote or ranking as it was given, with its remark; of a ranking that was skipped ``ranks`` is None."""
    if study.settings.mode == "pairs":
        return [asdict(vote) for vote in votes(study)]
    return [
        {"rater": row.name, "query": study.tasks[row.task].query, "ranks": row.ranks, "at": row.at, "why": row.why}
        for row in _answers(study)
    ]


def texts(study: Study) -> dict[str, Texts]:
    """Query id → the query and the responses to it."""
    return study.texts


def progress(study: Study) -> list[Progress]:
    """How far each rater is."""
    answers: dict[str, list[Any]] = {}
    for row in _answers(study):
        answers.setdefault(row.name, []).append(row)
    counted = sa.select(ASSIGNMENT.c.rater, sa.func.count()).group_by(ASSIGNMENT.c.rater)
    with study.database.reading() as connection:
        sizes = {rater: int(count) for rater, count in connection.execute(counted)}
        raters = list(connection.execute(sa.select(RATER).order_by(RATER.c.id)))
    votes_of_all = votes(study)
    found = []
    for row in raters:
        mine = answers.get(row.name, [])
        checks = check_counts([vote for vote in votes_of_all if vote.rater == row.name])
        found.append(
            Progress(
                Rater(row.id, row.name, row.secret is not None), sizes.get(row.id, 0), len(mine),
                sum(answer.choice == "skip" for answer in mine), checks["n"], checks["passed"],
                max((answer.at for answer in mine), default=None),
            )
        )  # fmt: skip
    return found
