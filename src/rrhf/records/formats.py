"""Other people's data sets as records: one function a format, from a row of theirs to a row of ours.

A format function takes a row as a dictionary and returns a dictionary with our columns (``query``, ``responses``,
``sources``, ``scores``; unknown columns travel along), or None or a ``SkipRowError`` where the row cannot be used.
A new format is one function and one line in ``FORMATS``; outsiders pass ``pkg.module:function``.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.imports import load_function
from rrhf.records.files import READERS, Ids, file_suffix, read_records, read_rows, require_file, text_lines
from rrhf.records.foreign.rewardbench import rewardbench
from rrhf.records.record import FIELDS, Message, Query, Record, Row, RowError, plain, record_from_row

ForeignRow = dict[str, Any]
Format = Callable[[ForeignRow], ForeignRow | None]

CHOSEN_SOURCES = ["human/chosen", "human/rejected"]
CHOSEN_SCORES = [1.0, 0.0]
PROMPT_COLUMNS = ("prompt", "query", "instruction", "question", "text")


class SkipRowError(Exception):
    """A row that a format cannot use. Its message is the reason, in words that do not depend on the row."""


# --- formats -----------------------------------------------------------------------------------------------------


def _rest(row: ForeignRow, *used: str) -> ForeignRow:
    """Return the columns a format did not use; those with a name of ours become ``original_…``, but an id stays."""
    rest = {}
    for name, value in row.items():
        if name == "id" and isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            rest["id"] = str(value)
        elif name not in used:
            rest[f"original_{name}" if name in FIELDS else name] = value
    return rest


def _column(row: ForeignRow, name: str) -> Any:
    if row.get(name) is None:
        raise SkipRowError(f"no `{name}`")
    return row[name]


def _text(row: ForeignRow, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise SkipRowError(f"`{name}` is no text")
    return value


def _chosen_row(query: Query, chosen: str, rejected: str, rest: ForeignRow) -> ForeignRow:
    if chosen == rejected:
        raise SkipRowError("chosen and rejected are the same")
    return {
        **rest,
        "query": query,
        "responses": [chosen, rejected],
        "sources": list(CHOSEN_SOURCES),
        "scores": list(CHOSEN_SCORES),
    }


def rrhf(row: ForeignRow) -> ForeignRow:
    """Our own record, and the released RRHF code's ``query``, ``responses``, ``scores``."""
    return row


LAST_TURN = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_parts(row: ForeignRow) -> tuple[str, str, str]:
    """Return an HH row's query, which ends in ``\\n\\nAssistant:``, and its chosen and rejected responses."""
    dialogues = _text(row, "chosen"), _text(row, "rejected")
    cuts = [dialogue.rfind(LAST_TURN) + len(LAST_TURN) for dialogue in dialogues]
    if min(cuts) < len(LAST_TURN):
        raise SkipRowError("a dialogue without an Assistant turn")
    if dialogues[0][: cuts[0]] != dialogues[1][: cuts[1]]:
        raise SkipRowError("the two dialogues part before the last turn")
    return dialogues[0][: cuts[0]], dialogues[0][cuts[0] :], dialogues[1][cuts[1] :]


def hh(row: ForeignRow) -> ForeignRow:
    """Anthropic HH as plain text: the query ends in ``\\n\\nAssistant:``, a response starts with the space after it."""
    return _chosen_row(*_hh_parts(row), _rest(row, "chosen", "rejected"))


def hh_chat(row: ForeignRow) -> ForeignRow:
    """Anthropic HH as messages, for models with a chat template."""
    query, chosen, rejected = _hh_parts(row)
    start, *turns = TURN.split(query)
    if start.strip():
        raise SkipRowError("text before the first turn")
    messages = [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    return _chosen_row(messages[:-1], chosen.strip(), rejected.strip(), _rest(row, "chosen", "rejected"))


def static(row: ForeignRow) -> ForeignRow:
    """Dahoas/rm-static and its kin: ``prompt``, ``chosen``, ``rejected``; ``response`` repeats the chosen one."""
    rest = _rest(row, "prompt", "response", "chosen", "rejected")
    return _chosen_row(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"), rest)


def preference(row: ForeignRow) -> ForeignRow:
    """TRL's preference rows, as text or messages; without ``prompt`` it is what chosen and rejected share."""
    chosen, rejected = _column(row, "chosen"), _column(row, "rejected")
    kinds = {type(chosen), type(rejected)}
    if kinds not in ({str}, {list}):
        raise SkipRowError("chosen and rejected are neither two texts nor two lists of messages")
    parts = _preference_texts if kinds == {str} else _preference_messages
    return _chosen_row(*parts(row.get("prompt"), chosen, rejected), _rest(row, "prompt", "chosen", "rejected"))


def _preference_texts(prompt: Any, chosen: str, rejected: str) -> tuple[Query, str, str]:
    if prompt is not None:
        return prompt, chosen, rejected
    shared = _shared(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the response, as in TRL
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _preference_messages(prompt: Any, chosen: list[Message], rejected: list[Message]) -> tuple[Query, str, str]:
    shared = _shared(chosen, rejected)
    query = chosen[:shared]
    if not query and isinstance(prompt, list):
        query = prompt
    elif not query and isinstance(prompt, str):
        query = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and query[: len(prompt)] != prompt:
        # The prompt begins earlier, with a system message; or completions have several messages, the first shared.
        query = prompt if prompt[-len(query) :] == query else [*prompt, *query]
    answers = chosen[shared:], rejected[shared:]
    for answer in answers:
        if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            raise SkipRowError("chosen and rejected do not differ in one assistant message at their end")
    first, second = (answer[0].get("content") for answer in answers)
    if not isinstance(first, str) or not isinstance(second, str):
        raise SkipRowError("a message without text")
    return query, first, second


def _shared(first: Any, second: Any) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _instruction(row: ForeignRow) -> list[Message]:
    instruction = _text(row, "instruction")
    detail = row.get("input")
    content = f"{instruction}\n\n{detail}" if isinstance(detail, str) and detail.strip() else instruction
    return [{"role": "user", "content": content}]


def alpaca(row: ForeignRow) -> ForeignRow:
    """Alpaca's ``instruction``, ``input``, ``output``: one user message, one response without a score."""
    return {
        **_rest(row, "instruction", "input", "output"),
        "query": _instruction(row),
        "responses": [_text(row, "output")],
    }


def alpacafarm(row: ForeignRow) -> ForeignRow:
    """``instruction``, ``input`` and ``outputs``, a mapping from system to text: sources ``system/<name>``."""
    outputs = _column(row, "outputs")
    if not isinstance(outputs, dict):
        raise SkipRowError("`outputs` is no mapping from system to text")
    answers = {f"system/{name}": text for name, text in outputs.items() if text is not None}
    return {
        **_rest(row, "instruction", "input", "outputs"),
        "query": _instruction(row),
        "responses": list(answers.values()),
        "sources": list(answers),
    }


def vicuna(row: ForeignRow) -> ForeignRow:
    """The Vicuna questions: the first of ``turns`` is the query; ``question_id`` and ``category`` travel along."""
    turns = _column(row, "turns")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise SkipRowError("`turns` is no list of texts")
    used = ("turns",) if len(turns) == 1 else ()
    return {**_rest(row, *used), "query": [{"role": "user", "content": turns[0]}]}


def imdb(row: ForeignRow) -> ForeignRow:
    """Reviews: ``text`` or ``review`` as a plain text query; the label travels along."""
    name = "text" if row.get("text") is not None else "review"
    return {**_rest(row, name), "query": _text(row, name)}


def prompts(row: ForeignRow) -> ForeignRow:
    """Queries alone, text or messages, in whichever of ``PROMPT_COLUMNS`` comes first."""
    for name in PROMPT_COLUMNS:
        if row.get(name) is not None:
            return {**_rest(row, name), "query": row[name]}
    raise SkipRowError(f"none of the columns {', '.join(PROMPT_COLUMNS)}")


FORMATS: dict[str, Format] = {
    "rrhf": rrhf,
    "hh": hh,
    "hh-chat": hh_chat,
    "static": static,
    "preference": preference,
    "rewardbench": rewardbench,
    "alpaca": alpaca,
    "alpacafarm": alpacafarm,
    "vicuna": vicuna,
    "imdb": imdb,
    "prompts": prompts,
}

# The first whose columns are all there is the guess; where two formats share their columns the values decide.
GUESSES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"query"}), "rrhf"),
    (frozenset({"instruction", "outputs"}), "alpacafarm"),
    (frozenset({"instruction", "output"}), "alpaca"),
    (frozenset({"turns"}), "vicuna"),
    (frozenset({"prompt", "chosen", "rejected", "subset"}), "rewardbench"),
    (frozenset({"prompt", "response", "chosen", "rejected"}), "static"),
    (frozenset({"prompt", "chosen", "rejected"}), "preference"),
    (frozenset({"chosen", "rejected"}), "preference"),
    (frozenset({"text", "label"}), "imdb"),
    (frozenset({"review"}), "imdb"),
    *((frozenset({name}), "prompts") for name in PROMPT_COLUMNS),
)


def guess_format(row: ForeignRow, source: str) -> str:
    """Return the format that the columns of ``row`` belong to.

    Raises:
        UserError: none is known; the message lists the columns found and the formats.
    """
    columns = {name for name, value in row.items() if value is not None}
    for needed, name in GUESSES:
        if needed <= columns:
            dialogue = isinstance(row.get("chosen"), str) and LAST_TURN in row["chosen"]
            return "hh" if name == "preference" and "prompt" not in columns and dialogue else name
    raise UserError(
        f"{source}: cannot tell the format from the columns {', '.join(map(str, row)) or '(none)'}: "
        f"give --format, one of {', '.join(FORMATS)}, or pkg.module:function"
    )


def load_format(name: str) -> Format:
    """Return the format function called ``name``, or import it where the name is ``pkg.module:function``.

    Raises:
        UserError: there is none; the message lists the known ones and suggests the nearest.
    """
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        raise UserError(f"unknown format {name!r}: {nearest(name, FORMATS)}, or pkg.module:function")
    return load_function(name, "format", "a function from a row to a row")


# --- sources -----------------------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # texts are longer than the 128 KiB a cell may have
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise RowError(where, "more cells than the header has columns", "quote cells that hold commas")
                yield dict(row), where, reader.line_num
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}): mend the line") from error


def _txt_rows(path: Path) -> Iterator[Row]:
    for text, number in text_lines(path):
        yield {"prompt": text.strip()}, f"{path}, line {number}", number


FILE_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    **dict.fromkeys(READERS, read_rows),
    ".csv": _csv_rows,
    ".txt": _txt_rows,
}


def _is_file(source: str) -> bool:
    """Whether ``source`` means a local file rather than a data set: it exists as one, or ends as one would."""
    return Path(source).is_file() or (source.lower().endswith(tuple(FILE_READERS)) and not Path(source).is_dir())


def _file_rows(path: Path) -> Iterator[Row]:
    reader = FILE_READERS[file_suffix(path, FILE_READERS)]
    require_file(path)
    return reader(path)


def _library_rows(source: str, split: str, config: str | None, data_dir: str | None) -> Iterator[Row]:
    """Rows of a data set's id, of a folder of data files, or of a folder that ``save_to_disk`` wrote."""
    import datasets

    failures = (OSError, ValueError, LookupError, ImportError, RuntimeError, datasets.exceptions.DatasetsError)
    folder = Path(source)
    if not folder.exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: no such file or folder: check the name")
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(source)
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            # Streamed: a data set larger than the disk can be read, and --limit fetches no more than it needs.
            rows = datasets.load_dataset(source, config, data_dir=data_dir, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield dict(row), f"{source}, row {number}", number
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source}: cannot read split {split!r} ({reason}): check the name, the split and the network, "
            "or give a local file"
        ) from error


# --- records -----------------------------------------------------------------------------------------------------


def load_dataset_records(
    source: str | Path,
    format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    counts: Counter[str] | None = None,
    config: str | None = None,
    data_dir: str | None = None,
) -> Iterator[Record]:
    """Read records out of a data set in any known format.

    Dirty rows are dropped and counted: rows the format cannot use, empty responses, records that keep none. In our
    own format only empty responses are; any other fault there is an error.

    Args:
        source: a .jsonl, .jsonl.gz, .json, .parquet, .csv or .txt file, a folder, or a data set's id on the hub.
        format: a name in ``FORMATS`` or ``pkg.module:function``; guessed from the first row's columns when None.
        split: which split of a folder or hub data set. A file has none.
        limit: stop after so many records.
        counts: counts what was dropped, by reason.
        config: the hub data set's configuration.
        data_dir: the hub data set's folder, such as ``harmless-base`` in Anthropic's HH.

    Raises:
        UserError: at once for an unknown format, suffix or missing file; while reading where the source is broken,
            its format cannot be told, or no row gives a record.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1, or left out")
    convert = load_format(format) if format is not None else None
    name = str(source)
    rows = _file_rows(Path(name)) if _is_file(name) else _library_rows(name, split, config, data_dir)
    counter = Counter[str]() if counts is None else counts
    records = _records(name, rows, convert, counter)
    return _first(records, limit)


def _first(records: Generator[Record], limit: int | None) -> Iterator[Record]:
    """Yield ``limit`` records and close what they come from, whose threads would else outlive it."""
    with contextlib.closing(records):
        yield from itertools.islice(records, limit)


def _records(source: str, rows: Iterator[Row], convert: Format | None, counts: Counter[str]) -> Generator[Record]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: holds no rows: check that what wrote it finished")
    if convert is None:
        if not isinstance(first[0], dict):
            raise RowError(first[1], "a row must be an object", "give a file of objects")
        convert = FORMATS[guess_format(first[0], source)]
    if convert is rrhf and _is_file(source) and source.lower().endswith(tuple(READERS)):
        yield from read_records(source, empty_responses="drop", counts=counts)
    else:
        yield from _foreign_records(source, itertools.chain([first], rows), convert, counts)


def _foreign_records(source: str, rows: Iterable[Row], convert: Format, counts: Counter[str]) -> Iterator[Record]:
    ids = Ids()
    skipped = Counter[str]()
    empty = True
    for row, where, number in rows:
        record, reason = _foreign_record(row, where, convert, counts)
        if record is None:
            skipped[reason] += 1
            counts[reason] += 1
            continue
        record.id = ids.claim(record.id, number)
        empty = False
        yield record
    if empty:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(5))
        raise UserError(f"{source}: no row gave a record: {reasons}: check --format, one of {', '.join(FORMATS)}")


def _foreign_record(row: Any, where: str, convert: Format, counts: Counter[str]) -> tuple[Record | None, str]:
    """Return the record of a foreign row, or None and why there is none."""
    if not isinstance(row, dict):
        return None, "a row that is no object"
    try:
        converted = convert(row)
        if converted is None:
            return None, "skipped by the format"
        record = record_from_row(plain(converted), where, empty_responses="drop", counts=counts)
    except SkipRowError as skip:
        return None, str(skip)
    except RowError as fault:
        return None, fault.reason
    if converted.get("responses") and not record.responses:
        return None, "no response left"
    # Tables of floats say NaN where a cell is missing; JSON has no word for it.
    record.extra = {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.extra.items()
    }
    return record, ""
