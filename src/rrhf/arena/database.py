"""The tables of a study, in a file (SQLite) or on a server (PostgreSQL)."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from rrhf.common.errors import UserError

T = TypeVar("T")

TABLES = sa.MetaData()
TEXT = (
    sa.JSON
)  # of models: in ASCII, so that half surrogates and U+0000 are kept where a database has no text with them

STUDY = sa.Table(
    "study", TABLES,
    sa.Column("id", sa.Integer, primary_key=True),  # 1
    sa.Column("format", sa.Integer, nullable=False),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("systems", sa.JSON, nullable=False),  # in the order of --data
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),  # of the forms' marks
    sa.Column("owner", sa.Text, nullable=False),  # hash of the owner's secret
    sa.Column("made", sa.Float, nullable=False),
)  # fmt: skip
QUERY = sa.Table(
    "query", TABLES,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("query", sa.JSON, nullable=False),
)  # fmt: skip
RESPONSE = sa.Table(
    "response", TABLES,
    sa.Column("query", sa.ForeignKey("query.id"), primary_key=True),
    sa.Column("system", sa.Text, primary_key=True),
    sa.Column("text", TEXT, nullable=False),
)  # fmt: skip
TASK = sa.Table(
    "task", TABLES,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False, unique=True),  # the place in the design
    sa.Column("query", sa.ForeignKey("query.id"), nullable=False),
    sa.Column("systems", sa.JSON, nullable=False),
    sa.Column("common", sa.Boolean, nullable=False),
    sa.Column("spoilt", sa.Integer),
    sa.Column("spoilt_text", TEXT, nullable=False),
)  # fmt: skip
RATER = sa.Table(
    "rater", TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("secret", sa.Text),  # its hash; none after the link was revoked
)  # fmt: skip
ASSIGNMENT = sa.Table(
    "assignment", TABLES,
    sa.Column("rater", sa.ForeignKey("rater.id"), primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True),  # 1, 2, …
    sa.Column("task", sa.ForeignKey("task.id"), nullable=False),
    sa.Column("shown", sa.JSON, nullable=False),  # indices of the task's systems, from the left to the right
    sa.UniqueConstraint("rater", "task"),
)  # fmt: skip
ANSWER = sa.Table(
    "answer", TABLES,
    sa.Column("rater", sa.ForeignKey("rater.id"), primary_key=True),
    sa.Column("task", sa.ForeignKey("task.id"), primary_key=True),  # one answer a rater and task, however often sent
    sa.Column("choice", sa.Text, nullable=False),
    sa.Column("ranks", sa.JSON),  # of a ranking: system → place
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),  # 1, one more for every change
)  # fmt: skip


@dataclass
class _Work:
    work: Callable[[sa.Connection], Any]
    result: Any = None
    fault: BaseException | None = None
    done: bool = False


class Database:
    """A connection pool: ``reading()``, and ``writing()`` and ``write()``, which have kept all once they are left."""

    def __init__(self, place: str) -> None:
        self._sqlite = "://" not in place
        self._turn, self._queue = threading.Lock(), threading.Lock()
        self._waiting: list[_Work] = []
        if self._sqlite:
            url = sa.URL.create("sqlite", database=place)
            # The turns of this process's writers are the lock's; the time is for those of another process.
            self.engine = sa.create_engine(url, connect_args={"timeout": 30}, pool_size=20, max_overflow=100)
            sa.event.listen(self.engine, "connect", _set_up_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = sa.create_engine(_server(place), pool_size=20, max_overflow=100, pool_pre_ping=True)
        self._reader = self.engine.execution_options(reading=True)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction; SQLite lets one write at a time."""
        with self._turn, self.engine.begin() as connection:
            yield connection

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` returns, once all that it wrote is on the disk.

        To SQLite the works that came while the disk was busy go in one transaction, which waits for it once: 50 raters
        do not stand in a queue of 50 waits. A work that fails takes nothing else with it. PostgreSQL does so itself.
        """
        if not self._sqlite:
            with self.engine.begin() as connection:
                return work(connection)
        mine = _Work(work)
        with self._queue:
            self._waiting.append(mine)
        with self._turn:
            if not mine.done:  # else who had the turn before has done it too
                with self._queue:
                    works, self._waiting = self._waiting, []
                self._do(works)
        if mine.fault is not None:
            raise mine.fault
        return mine.result

    def _do(self, works: list[_Work]) -> None:
        try:
            self._do_together(works)
        except Exception as fault:  # nothing of it is kept
            if len(works) == 1:
                works[0].fault = fault
            else:  # what stopped one of them may let the others be
                for one in works:
                    self._do([one])
        except BaseException as fault:
            for one in works:
                one.fault = fault
            raise
        finally:
            for one in works:
                one.done = True

    def _do_together(self, works: list[_Work]) -> None:
        with self.engine.begin() as connection:
            for one in works:
                one.fault = None
                try:
                    with connection.begin_nested():
                        try:
                            one.result = one.work(connection)
                        except Exception as fault:
                            one.fault = fault  # not that there is no savepoint any more
                            raise
                except Exception as fault:
                    one.fault = one.fault or fault
                    driver: Any = connection.connection.dbapi_connection
                    if not driver.in_transaction:  # SQLite took back the whole of it: no room, no memory, a bad read
                        raise one.fault from None

    def close(self) -> None:
        self.engine.dispose()


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # sqlite3 begins no transactions of its own; _begin_sqlite does
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _server(place: str) -> sa.URL:
    try:
        url = sa.make_url(place)
    except sa.exc.ArgumentError as error:
        raise UserError(f"{place}: not a database's URL: write postgresql://USER@HOST/DATABASE") from error
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise UserError(f"{place.partition(':')[0]}://…: not known: give a file's path, or postgresql://…")
    if importlib.util.find_spec("psycopg") is None:
        raise UserError("PostgreSQL needs the library psycopg: pip install 'rrhf[arena]'")
    return url.set(drivername="postgresql+psycopg")


def name_of(place: str) -> str:
    """What messages call a study: its path, or its URL without a password and without what else it is given."""
    return place if "://" not in place else sa.make_url(place).set(query={}).render_as_string(hide_password=True)


@contextmanager
def told(place: str) -> Iterator[None]:
    """Say of a study that cannot be read or written what is wrong with it.

    Raises:
        UserError: for what the database's library raised.
    """
    try:
        yield
    except sa.exc.DBAPIError as error:
        cure = "see that its disk has room and that you may write there; a damaged one is replaced by a copy of it"
        if "://" in place:
            cure = "see that its server runs, has room, and lets you in"
        raise UserError(f"{name_of(place)}: the study cannot be read or written ({error.orig}): {cure}") from error


def is_blank(place: str) -> bool:
    """Whether a file without a byte stands there: no study, but SQLite would make an empty database of it."""
    return "://" not in place and Path(place).is_file() and Path(place).stat().st_size == 0


def leftovers(place: str) -> list[str]:
    """The files that SQLite keeps beside a study while it is open; a process that was killed leaves them there."""
    beside = [] if "://" in place else [f"{place}-{kind}" for kind in ("wal", "shm", "journal")]
    return [file for file in beside if Path(file).exists()]


def exists(place: str) -> bool:
    """Whether there is a study already.

    Raises:
        UserError: the database's server cannot be reached.
    """
    if "://" not in place:
        return Path(place).exists()
    database = Database(place)
    try:
        return sa.inspect(database.engine).has_table("study")
    except sa.exc.OperationalError as error:
        raise UserError(f"{name_of(place)}: cannot be reached ({error.orig}): start it, or mend the URL") from error
    finally:
        database.close()
