"""People's judgements as scores: ``people:FILE``, where FILE has a row a judgement (CSV or JSON lines).

A row says which record (``id``), who judged (``rater``), which response (``response``, its index; ``source``, its tag;
or ``text``) and what was said of it: ``rank`` (1 is the best, equal ranks are ties), ``rating`` (higher is better) or
``choice`` (best or worst). A file has one column of each kind. docs/data.md has examples.

Several raters of a query become one score a response, as ``AGGREGATES`` says; None where nobody judged it. The score
depends on the file and the record alone, whatever else is scored with it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rrhf.common.errors import UserError, nearest
from rrhf.common.remote import fetched
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records, require_file
from rrhf.records.foreign.rows import number_of
from rrhf.records.formats import file_rows
from rrhf.records.record import Record, RowError
from rrhf.rewards.kind import Item, RewardContext, RewardKind, Scorer

log = logging.getLogger("rrhf")

Values = dict[int, float]  # what one rater said of a record: index of a response → its value, higher is better
PRIOR = 0.5  # of Plackett-Luce: choix takes off PRIOR · Σ θ², so the variance of the strengths is 1
CHOICES = {"best": 1.0, "worst": -1.0}
RESPONSES = ("response", "source", "text")  # the columns that say which response is meant


# --- several raters, one score -----------------------------------------------------------------------------------


def mean(judgements: Sequence[Values], kind: str) -> Values:
    """Ratings: their mean. Ranks and choices: the mean share of the others that a response beats, a tie is half.

    For m ranked responses the share is (m − rank) / (m − 1), so for full rankings this is the mean rank, turned so that
    higher is better and 0 to 1 for any m. With one best and one worst choice it counts best minus worst choices. Who
    ranked a single response said nothing.
    """
    given: dict[int, list[float]] = {}
    for judgement in judgements:
        for index, value in (judgement if kind == "rating" else _beaten(judgement)).items():
            given.setdefault(index, []).append(value)
    return {index: math.fsum(values) / len(values) for index, values in given.items()}


def _beaten(judgement: Values) -> Values:
    others = len(judgement) - 1
    return {
        index: math.fsum((own > value) + (own == value) / 2 for other, value in judgement.items() if other != index)
        / others
        for index, own in judgement.items()
        if others
    }


def plackett_luce(judgements: Sequence[Values], kind: str) -> Values:
    """The strengths θ of the Plackett-Luce model (Plackett 1975, Luce 1959), found by choix; partial rankings count.

    Each response wins against all that its rater put lower: P = e^θ_i / (e^θ_i + Σ e^θ_j). Equals do not compete, as in
    ``rrhf.losses.listmle``. A standard normal prior on θ keeps the strengths of few judgements finite.
    """
    from choix import opt_top1

    told = [judgement for judgement in judgements if len(judgement) > 1]
    items = sorted({index for judgement in told for index in judgement})
    place = {index: number for number, index in enumerate(items)}
    wins = []
    for judgement in told:
        for index, own in judgement.items():
            lower = tuple(place[other] for other, value in judgement.items() if value < own)
            if lower:
                wins.append((place[index], lower))
    if not wins:
        return dict.fromkeys(items, 0.0)
    strengths = opt_top1(len(items), wins, alpha=PRIOR, tol=1e-12)
    return {index: round(float(strengths[place[index]]), 6) for index in items}  # equals by symmetry stay equal


AGGREGATES: dict[str, Callable[[Sequence[Values], str], Values]] = {"mean": mean, "plackett-luce": plackett_luce}


# --- the file ----------------------------------------------------------------------------------------------------


class Vote(NamedTuple):
    """One row: its value, higher is better, and its line in the file."""

    value: float
    line: int


@dataclass(frozen=True)
class Judgements:
    """What a file holds. ``votes``: record → rater → response, as the column ``by`` names it → vote."""

    path: Path
    kind: str
    by: str
    votes: dict[str, dict[str, dict[str, Vote]]] = field(default_factory=dict)

    def of(self, record: Record) -> list[Values]:
        """What each rater said of the record's responses.

        Raises:
            UserError: the record has no such response.
        """
        judged = []
        for votes in self.votes.get(record.id, {}).values():
            values: dict[int, list[float]] = {}
            for response, vote in votes.items():
                for index in self._indices(record, response, vote):
                    values.setdefault(index, []).append(vote.value)
            known = {index: math.fsum(said) / len(said) for index, said in values.items()}
            rest = dict.fromkeys(range(len(record.responses)), 0.0) if self.kind == "choice" else {}
            judged.append({**rest, **known})
        return judged

    def _indices(self, record: Record, response: str, vote: Vote) -> list[int]:
        if self.by == "response":
            number = response.removesuffix(".0")  # as tables with empty cells write it
            found = [int(number)] if number.isdecimal() and int(number) < len(record.responses) else []
            has = f"0 to {len(record.responses) - 1}"
        elif self.by == "source":
            found = [i for i, tag in enumerate(record.sources) if response == tag or response in tag.split("|")]
            has = ", ".join(record.sources)
        else:
            found = [i for i, text in enumerate(record.responses) if text.strip() == response.strip()]
            has = f"{len(record.responses)} others"
        if not found:
            raise RowError(
                f"{self.path}, line {vote.line}",
                f"record {record.id!r} has no {self.by} {response!r} (it has {has})",
                "name one that it has",
            )
        return found


def read_judgements(path: Path) -> Judgements:
    """Read a file of judgements.

    Raises:
        UserError: a row lacks a column, holds what is no rank, rating or choice, or says something a second time.
    """
    judgements: Judgements | None = None
    for row, where, number in file_rows(path):
        if not isinstance(row, dict):
            raise RowError(
                where, "a judgement must be an object", 'write {"id": …, "rater": …, "response": 0, "rank": 1}'
            )
        if judgements is None:
            judgements = Judgements(path, _only(row, tuple(KINDS), where), _only(row, RESPONSES, where))
        record, rater = _filled(row, "id", where), str(row.get("rater") or "")
        response = _filled(row, judgements.by, where)
        vote = Vote(KINDS[judgements.kind](_filled(row, judgements.kind, where), where), number)
        votes = judgements.votes.setdefault(record, {}).setdefault(rater, {})
        same = [other for other in votes.values() if other.value == vote.value] if judgements.kind == "choice" else []
        for before in [votes[response]] if response in votes else same:
            raise RowError(
                where,
                f"rater {rater!r} judges {judgements.by} {response!r} of record {record!r} after line {before.line}, "
                "a second time",
                "take one of the two out, or give each rater a name in `rater`",
            )
        votes[response] = vote
    if judgements is None:
        raise UserError(f"{path}: holds no judgements: check that what wrote it finished")
    return judgements


def _only(row: Mapping[str, Any], columns: Sequence[str], where: str) -> str:
    found = [name for name in columns if row.get(name) not in (None, "")]
    if len(found) != 1:
        has = ", ".join(map(str, row)) or "none"
        raise RowError(where, f"needs one of the columns {', '.join(columns)} (it has {has})", "see docs/data.md")
    return found[0]


def _filled(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None or value == "" or isinstance(value, (bool, list, dict)):
        raise RowError(where, f"no {name}", "fill it in, or take the row out")
    return str(value)


def _rating(text: str, where: str) -> float:
    value = number_of(text)
    if value is None:
        raise RowError(where, f"{text!r} is no number", "give a finite number, or take the row out")
    return value


def _rank(text: str, where: str) -> float:
    rank = _rating(text, where)
    if rank < 1:
        raise RowError(where, f"rank {text} is below 1", "the best has rank 1")
    return -rank


def _choice(text: str, where: str) -> float:
    if text.lower() not in CHOICES:
        raise RowError(where, f"choice is {text!r}", f"it must be {' or '.join(CHOICES)}")
    return CHOICES[text.lower()]


# The columns that say what was said of a response → their values, higher is better.
KINDS: dict[str, Callable[[str, str], float]] = {"rank": _rank, "rating": _rating, "choice": _choice}


# --- agreement ---------------------------------------------------------------------------------------------------


LEVELS: dict[str, Any] = {"rank": "ordinal", "rating": "interval", "choice": "nominal"}


def krippendorff_alpha(units: Sequence[Mapping[str, float]], level: Any) -> float | None:
    """Krippendorff's α: 1 is full agreement, 0 what chance gives. None where two never meet, or all say the same.

    Args:
        units: of each thing judged, rater → value.
        level: of measurement: nominal, ordinal or interval.
    """
    from krippendorff import alpha

    met = [unit for unit in units if len(unit) > 1]
    names = sorted({rater for unit in met for rater in unit})
    if len({value for unit in met for value in unit.values()}) < 2:
        return None
    matrix = [[unit.get(name, math.nan) for unit in met] for name in names]
    return float(alpha(matrix, level_of_measurement=level))


def agreement(judgements: Judgements) -> dict[str, float]:
    """Krippendorff's α between the raters, by what was judged; empty where two never meet.

    A unit is a response of a record, its values are ranks (ordinal) or ratings (interval). Of choices a unit is a
    record and its value the response chosen, for the best and the worst apart (nominal).
    """
    found = {}
    for what, units in _units(judgements).items():
        value = krippendorff_alpha(units, LEVELS[judgements.kind])
        if value is not None:
            found[what] = value
    return found


def _units(judgements: Judgements) -> dict[str, list[dict[str, float]]]:
    """What α is of → its units, each rater → value."""
    choosing = judgements.kind == "choice"
    codes: dict[str, float] = {}
    units: dict[tuple[str, str, str], dict[str, float]] = {}
    for record, raters in judgements.votes.items():
        for rater, votes in raters.items():
            for response, vote in votes.items():
                if choosing:
                    what = next(name for name, value in CHOICES.items() if value == vote.value)
                    units.setdefault((what, record, ""), {})[rater] = codes.setdefault(response, len(codes))
                else:
                    units.setdefault((judgements.kind + "s", record, response), {})[rater] = vote.value
    rows: dict[str, list[dict[str, float]]] = {}
    for (what, _, _), unit in units.items():
        rows.setdefault(what, []).append(unit)
    return rows


# --- what is said ------------------------------------------------------------------------------------------------


def _summary(judgements: Judgements) -> str:
    raters = {rater for votes in judgements.votes.values() for rater in votes}
    count = sum(len(votes) for by_rater in judgements.votes.values() for votes in by_rater.values())
    words = f"{judgements.path}: {count} {judgements.kind}s of {len(judgements.votes)} records by {len(raters)} raters"
    try:
        found = agreement(judgements)
    except ModuleNotFoundError:
        return f"{words}; for their agreement pip install 'rrhf[judging]'"
    level = LEVELS[judgements.kind]
    alphas = [f"Krippendorff's α of {what} ({level}) {value:.3f}" for what, value in found.items()]
    return f"{words}; {', '.join(alphas) or 'no response has two raters who could differ, so no agreement'}"


def _oddities(judgements: Judgements, sizes: Mapping[str, int]) -> Iterator[str]:
    """What a reader should know of the file: each with how often, and the first line. ``sizes``: record → k."""
    seen: dict[str, list[int]] = {}
    for record, raters in judgements.votes.items():
        for votes in raters.values():
            line = min(vote.line for vote in votes.values())
            if sizes and record not in sizes:
                seen.setdefault("of a record that is not there", []).append(line)
            elif judgements.kind == "rank" and len(votes) < sizes.get(record, 0):
                seen.setdefault("that rank only some of the responses", []).append(line)
            if judgements.kind == "rank" and len({vote.value for vote in votes.values()}) < len(votes):
                seen.setdefault("with ties", []).append(line)
    for what, lines in seen.items():
        yield f"{judgements.path}: {len(lines)} judgements {what}, the first in line {min(lines)}"


@cache
def _tell(path: Path, checksum: str, records: Path | None) -> None:
    """Log, once, what the file holds and how far its raters agree.

    Raises:
        UserError: none of its records is in ``records``.
    """
    judgements = _judgements(path, checksum)
    sizes = {} if records is None else {record.id: len(record.responses) for record in read_records(records)}
    if sizes and not any(record in sizes for record in judgements.votes):
        first = next(iter(judgements.votes))
        raise UserError(
            f"{path}: none of its {len(judgements.votes)} records is in {records} ({nearest(first, list(sizes)[:5])}): "
            "the ids must be those of the records that were shown"
        )
    log.info(f"people: {_summary(judgements)}")
    for oddity in _oddities(judgements, sizes):
        log.warning(f"people: {oddity}")


@cache
def _judgements(path: Path, checksum: str) -> Judgements:
    return read_judgements(path)


# --- the reward --------------------------------------------------------------------------------------------------


def _split(argument: str) -> tuple[Path, str]:
    """``FILE`` or ``FILE#AGGREGATE``."""
    file, sharp, aggregate = argument.rpartition("#")
    if not sharp or Path(argument).exists():
        file, aggregate = argument, "mean"
    if aggregate not in AGGREGATES:
        raise UserError(f"people:{argument}: {nearest(aggregate, AGGREGATES)}")
    return fetched(file), aggregate


def people_scorer(argument: str, context: RewardContext) -> Scorer:
    """Return the scorer of ``people:FILE`` or ``people:FILE#AGGREGATE``.

    Raises:
        UserError: the file is not there or broken, or (the scorer) a record lacks a response that was judged.
    """
    path, aggregate = _split(argument)
    require_file(path)
    if aggregate == "plackett-luce" and importlib.util.find_spec("choix") is None:
        raise UserError(f"people:{argument} needs the library choix: pip install 'rrhf[judging]'")
    checksum = checksum_of_file(path)
    _tell(path, checksum, context.records)
    judgements = _judgements(path, checksum)

    def scores(items: Sequence[Item]) -> list[float | None]:
        known: dict[str, Values] = {}
        for record, _ in items:
            if record.id not in known:
                known[record.id] = AGGREGATES[aggregate](judgements.of(record), judgements.kind)
        return [known[record.id].get(index) for record, index in items]

    return scores


def people_digest(argument: str, context: RewardContext) -> str:
    """The checksum of the file."""
    path, _ = _split(argument)
    require_file(path)
    return checksum_of_file(path)


PEOPLE = RewardKind(
    ("people:FILE", *(f"people:FILE#{name}" for name in AGGREGATES if name != "mean")),
    people_scorer,
    people_digest,
    judges_new=False,
    stays=True,
)
