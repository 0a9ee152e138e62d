"""What is compared: files of records → systems, each with a response a query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rrhf.common.errors import UserError, nearest
from rrhf.records.files import read_records
from rrhf.records.record import Query, Record, content_id


@dataclass(frozen=True)
class Systems:
    """``queries``: record id → query. ``responses``: system → record id → response."""

    queries: dict[str, Query] = field(default_factory=dict)
    responses: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, query: str) -> dict[str, str]:
        """System → its response to the query, where it has one."""
        return {name: texts[query] for name, texts in self.responses.items() if query in texts}


def read_systems(data: Sequence[str]) -> Systems:
    """Read ``FILE`` or ``NAME=FILE``; records of several files belong together by their id, or else by their query.

    Of records with the same query in one file each is a query of the study; the first of them belongs to the first in
    another file, and so on.

    A file with one response a record is one system, by the name given or the file's. A file with several is as many
    systems, by the tags of their sources; a name that is given says nothing there.

    Raises:
        UserError: a file cannot be read, a name stands twice, or there are fewer than two systems.
    """
    systems = Systems()
    ids: dict[str, list[str]] = {}  # of the query's content → the ids in the study
    for argument in data:
        name, path = _named(argument)
        here: set[str] = set()
        for record in read_records(path, require="responses"):
            same = ids.setdefault(content_id(record.query), [])
            free = [known for known in same if known not in here]
            query = record.id if record.id in systems.queries or not free else free[0]
            if content_id(systems.queries.setdefault(query, record.query)) != content_id(record.query):
                raise UserError(
                    f"{path}: record {record.id!r} has another query than the record of that id before: "
                    "the files must be answers to the same queries"
                )
            here.add(query)
            if query not in same:
                same.append(query)
            for system, text in _responses(record, name, path).items():
                texts = systems.responses.setdefault(system, {})
                if query in texts:
                    raise UserError(
                        f"{path}: record {record.id!r}: system {system!r} has a response to it already: {_cure(record)}"
                    )
                texts[query] = text
                _check_names(path, record.id, system)
    if len(systems.responses) < 2:
        raise UserError(
            f"--data: {', '.join(systems.responses) or 'nothing'} is not two systems: "
            "give a file each, or one with several responses a record"
        )
    return systems


def _cure(record: Record) -> str:
    if len(record.responses) == 1:
        return "name the systems apart with --data NAME=FILE"
    return (
        "where records have several responses their sources are the systems, whatever NAME says: give files with one "
        "response a record. `rrhf sample` keeps the responses that its data bring; `rrhf convert QUERIES "
        "--queries_only --output F` takes them out before it"
    )


def _check_names(path: Path, record_id: str, system: str) -> None:
    """Raises UserError: the id has characters that no database keeps, or the system's name such that no line shows."""
    if "\0" in record_id or record_id != record_id.encode("utf-8", "replace").decode():
        raise UserError(f"{path}: {record_id!r}: an id has U+0000 or half a surrogate: mend it")
    if not system.isprintable():
        raise UserError(
            f"{path}: {system!r}: a system's name has a line break, or another character that no line shows: mend it"
        )


def _named(argument: str) -> tuple[str, Path]:
    name, sign, path = argument.partition("=")
    if not sign or Path(argument).exists():
        name, path = "", argument
    place = Path(path)
    return name or place.name.removesuffix(".gz").rpartition(".")[0] or place.name, place


def _responses(record: Record, name: str, path: Path) -> dict[str, str]:
    if len(record.responses) == 1:
        return {name: record.responses[0]}
    found = {}
    for source, text in zip(record.sources, record.responses, strict=True):
        for tag in source.split("|"):  # equal responses that were merged
            if tag in found:
                raise UserError(f"{path}: record {record.id!r} has two responses of source {tag!r}: name them apart")
            found[tag] = text
    return found


def comparisons(systems: Systems, asked: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of systems that ``A:B`` asks for, or all there are.

    Raises:
        UserError: it names no two systems of the study.
    """
    names = list(systems.responses)
    if not asked:
        return [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    found = [(a, b) for a in names for b in names if a != b]
    chosen = []
    for text in asked:
        pairs = [pair for pair in found if ":".join(pair) == text]
        if not pairs:
            raise UserError(f"--compare {text}: write A:B; {nearest(text, [':'.join(pair) for pair in found])}")
        if pairs[0] in chosen or pairs[0][::-1] in chosen:
            raise UserError(f"--compare {text}: stands there twice")
        chosen.append(pairs[0])
    return chosen
