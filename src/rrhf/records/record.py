"""The record that every stage reads and writes, checked when it is made from a row and written as one.

One record is a query with its k responses, where each came from, how it ended and what a reward said of it::

    {"id": "…", "query": "text" | [{"role", "content"}, …],
     "responses": ["…", …], "sources": ["diverse-beam/0", "human/chosen", …], "finish": ["stop" | "length", …],
     "scores": [0.7, null, …], "rewards": {"pkg.mod:f": [0.7, null, …], …}}

Only ``query`` is required; unknown columns travel along. ``records/files.py`` reads and writes files of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rrhf.common.errors import UserError

Message = dict[str, str]
Query = str | list[Message]
Require = Literal["query", "responses", "scores"]
EmptyResponses = Literal["error", "drop"]
Row = tuple[Any, str, int]  # the parsed row, what errors call its place, its line or row number

FIELDS = ("id", "query", "responses", "sources", "finish", "scores", "rewards")
FINISH = ("stop", "length")
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
# Columns beside the fields that have a list a response: log P(y_t | …) of its tokens, as training sees them, under the
# policy that drew it and under the reference. Losses over tokens read them (``RRHFTrainer.with_token_logprobs``).
TOKEN_COLUMNS = ("old_token_logprobs", "reference_token_logprobs")
# The same of the tokens themselves, null for a response that no policy of ours drew: its text may have another split.
DRAWN_TOKENS = "drawn_tokens"
RESPONSE_COLUMNS = (*TOKEN_COLUMNS, DRAWN_TOKENS)
REQUIRED = ("query", "responses", "scores")  # a stage that needs one needs those before it
CURES = {"responses": "run `rrhf sample` first", "scores": "run `rrhf score` first"}


class RowError(UserError):
    """A row that is no record. ``reason`` says why in words that do not depend on the row."""

    def __init__(self, where: str, reason: str, cure: str) -> None:
        super().__init__(f"{where}: {reason}: {cure}")
        self.reason = reason


@dataclass(slots=True)
class Record:
    """A query x with its k responses y_i and their scores r_i.

    ``sources``, ``finish`` and every list in ``rewards`` have k entries; ``scores`` has k, or none where nothing was
    scored yet. A score of None takes part in no pair. Left out, ``sources`` becomes ``provided/0`` …, ``finish``
    ``stop`` and ``id`` the query's hash.
    """

    query: Query
    responses: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = self.id or content_id(self.query)
        self.sources = self.sources or [f"provided/{i}" for i in range(len(self.responses))]
        self.finish = self.finish or ["stop"] * len(self.responses)

    def without_responses(self) -> Record:
        """A record of the query alone, with its id and unknown columns."""
        extra = {name: value for name, value in self.extra.items() if name not in RESPONSE_COLUMNS}
        return replace(self, responses=[], sources=[], finish=[], scores=[], rewards={}, extra=extra)

    def keeping(self, indices: Sequence[int]) -> Record:
        """A record with the responses at ``indices`` and all that belongs to them, in that order."""

        def kept(values: list[Any]) -> list[Any]:
            return [values[index] for index in indices] if values else []

        columns = {name: kept(values) for name, values in self.response_columns().items()}
        return replace(
            self,
            responses=kept(self.responses),
            sources=kept(self.sources),
            finish=kept(self.finish),
            scores=kept(self.scores),
            rewards={name: kept(values) for name, values in self.rewards.items()} if indices else {},
            extra={**self.extra, **columns},
        )

    def with_responses(
        self, texts: Sequence[str], finish: Sequence[str], sources: Sequence[str], scored: Record | None = None
    ) -> Record:
        """A record with responses appended; those of ``scored`` bring the scores and rewards they have.

        In columns with a list a response (``RESPONSE_COLUMNS``) they have None.
        """
        unscored: list[float | None] = [None] * len(texts)
        before: list[float | None] = [None] * len(self.responses)
        scores = [*(self.scores or before), *((scored.scores if scored else []) or unscored)]
        theirs = scored.rewards if scored else {}
        rewards = {
            name: [*self.rewards.get(name, before), *theirs.get(name, unscored)] for name in {**self.rewards, **theirs}
        }
        return replace(
            self,
            responses=[*self.responses, *texts],
            sources=[*self.sources, *sources],
            finish=[*self.finish, *finish],
            scores=scores if any(score is not None for score in scores) else [],
            rewards=rewards,
            extra={**self.extra, **{n: [*v, *[None] * len(texts)] for n, v in self.response_columns().items()}},
        )

    def response_columns(self) -> dict[str, list[Any]]:
        """The unknown columns that have a list a response."""
        k = len(self.responses)
        return {
            name: values
            for name, values in self.extra.items()
            if name in RESPONSE_COLUMNS and isinstance(values, list) and len(values) == k
        }


def content_id(query: Query) -> str:
    """Return 16 hexadecimal digits that depend on the query alone (BLAKE2b of its text or of its messages' JSON)."""
    text = query if isinstance(query, str) else json.dumps(query, ensure_ascii=False, sort_keys=True)
    kind = b"text\0" if isinstance(query, str) else b"messages\0"
    return hashlib.blake2b(kind + text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def query_text(query: Query) -> str:
    """Return the query as plain text for people to read; messages become ``role: content`` paragraphs."""
    if isinstance(query, str):
        return query
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in query)


def asked_text(query: Query) -> str:
    """The whole query as one text, by which records of several files meet: a lone user message is its text."""
    if not isinstance(query, str) and len(query) == 1 and query[0]["role"] == "user":
        return query[0]["content"]
    return query_text(query)


# --- one row -----------------------------------------------------------------------------------------------------


def record_from_row(
    row: Any,
    where: str,
    require: Require = "query",
    empty_responses: EmptyResponses = "error",
    counts: Counter[str] | None = None,
) -> Record:
    """Check one row and return its record.

    Args:
        row: the parsed JSON object (or Parquet row).
        where: what an error calls the row's place, such as ``data.jsonl, line 3``.
        require: the last field the stage needs. From ``responses`` on an empty response is an error.
        empty_responses: ``drop`` takes empty responses out, with their scores, whatever ``require`` says.
        counts: counts what was dropped.

    Raises:
        RowError: the row is no valid record, or lacks what ``require`` asks for.
    """
    if not isinstance(row, dict):
        raise RowError(where, f"a row must be a JSON object, not {_kind_name(row)}", 'write {"query": …} on each line')
    query = _query(row, where)
    responses = _texts(row, "responses", None, where) or []
    k = len(responses)
    record = Record(
        query=query,
        responses=responses,
        sources=_texts(row, "sources", k, where) or [],
        finish=_texts(row, "finish", k, where) or [],
        scores=_scores(row.get("scores"), "scores", k, where),
        rewards=_rewards(row.get("rewards"), k, where),
        id=_id(row.get("id"), where),
        extra={name: value for name, value in row.items() if name not in FIELDS},
    )
    for finish in record.finish:
        if finish not in FINISH:
            raise RowError(where, f"finish is {finish!r}", "it must be 'stop' or 'length'")
    for name in REQUIRED[1 : REQUIRED.index(require) + 1]:
        if not getattr(record, name):
            raise RowError(where, f"no {name}", CURES[name])
    if empty_responses == "drop":
        record = _drop_empty(record, counts)
    elif require != "query":
        for index, response in enumerate(record.responses):
            if not response.strip():
                raise RowError(
                    where,
                    f"response {index} is empty",
                    "take it out, or run `rrhf convert` on the file, which drops empty responses and counts them",
                )
    return record


def _kind_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, numbers.Number) else type(value).__name__)


def _query(row: dict[str, Any], where: str) -> Query:
    query = row.get("query")
    if query is None:
        columns = ", ".join(map(str, row)) or "none"
        raise RowError(
            where,
            f"no query (columns: {columns})",
            "give `query`, or bring another format in with `rrhf convert SRC --format X --output F`",
        )
    if not isinstance(query, (str, list)):
        raise RowError(where, f"query is {_kind_name(query)}", "it must be text or a list of messages")
    if isinstance(query, list):
        for message in query:
            if not isinstance(message, dict) or not all(isinstance(message.get(n), str) for n in ("role", "content")):
                raise RowError(
                    where, "a message of the query lacks role or content", 'write {"role": "user", "content": "…"}'
                )
    texts = [query] if isinstance(query, str) else [message["content"] for message in query]
    if not any(text.strip() for text in texts):
        raise RowError(where, "the query is empty", "fill it in or take the row out")
    return query


def _id(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RowError(where, f"id is {value!r}", "it must be text, or be left out")
    return str(value)


def _list(value: Any, name: str, k: int | None, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(where, f"{name} is {_kind_name(value)}", "it must be a list with one entry a response")
    if k is not None and len(value) != k:
        raise RowError(where, f"{name} and responses differ in length ({len(value)} and {k})", "give one a response")
    return value


def _texts(row: dict[str, Any], name: str, k: int | None, where: str) -> list[str] | None:
    value = row.get(name)
    if value is None:
        return None
    for index, entry in enumerate(_list(value, name, k, where)):
        if not isinstance(entry, str):
            raise RowError(where, f"{name}[{index}] is {_kind_name(entry)}", "it must be text")
    return list(value)


def _scores(value: Any, name: str, k: int, where: str) -> list[float | None]:
    if value is None:
        return []
    return [
        None if entry is None else _number(entry, f"{name}[{index}]", where)
        for index, entry in enumerate(_list(value, name, k, where))
    ]


def _number(value: Any, name: str, where: str) -> float:
    if type(value) is float and math.isfinite(value):  # nearly all are
        return value
    cure = "a score is a finite number, or null for a response that was not scored"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RowError(where, f"{name} is {_kind_name(value)}", cure)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(where, f"{name} is {'NaN' if math.isnan(number) else 'infinite'}", cure)
    return number


def _rewards(value: Any, k: int, where: str) -> dict[str, list[float | None]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(where, f"rewards is {_kind_name(value)}", 'write {"pkg.module:function": [score, …]}')
    # Parquet gives every row every reward, null where the row does not have it.
    return {
        name: _scores(scores, f"rewards {name!r}", k, where) for name, scores in value.items() if scores is not None
    }


def _drop_empty(record: Record, counts: Counter[str] | None) -> Record:
    kept = [index for index, response in enumerate(record.responses) if response.strip()]
    dropped = len(record.responses) - len(kept)
    if not dropped:
        return record
    if counts is not None:
        counts["empty response dropped"] += dropped
    return record.keeping(kept)


def record_to_row(record: Record) -> dict[str, Any]:
    """Return the record as a JSON object in the fixed order of fields, empty ones left out, unknown columns last."""
    row: dict[str, Any] = {"id": record.id, "query": record.query}
    for name in FIELDS[2:]:
        value = getattr(record, name)
        if value:
            row[name] = value
    row.update((name, value) for name, value in record.extra.items() if name not in FIELDS)
    return row


def record_line(record: Record) -> str:
    """Return the record as one line of JSON, without the newline.

    Raises:
        UserError: it holds NaN, an infinity, a broken character or something JSON has no word for.
    """
    row = record_to_row(record)
    try:
        line = ENCODER.encode(row)
        line.encode("utf-8")  # refuses half a surrogate pair here, with the record's name
    except (ValueError, TypeError) as error:
        column = next((name for name, value in row.items() if not writable(value)), "?")
        raise UserError(
            f"record {record.id!r}: {column!r} cannot be written as JSON ({error}): mend or drop it"
        ) from error
    return line


def writable(value: Any, allow_nan: bool = False) -> bool:
    """Whether ``value`` can be written as JSON in UTF-8; ``allow_nan`` lets NaN and infinities pass."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode("utf-8")
    except (ValueError, TypeError):
        return False
    return True


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types: dates as ISO text, tuples as lists, anything unknown as its text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        return plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
