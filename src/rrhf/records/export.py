"""Records as rows for other trainers: pairs or best responses, for TRL and LLaMA-Factory.

An export is a function from a record and its pairs (indices of the better and the worse response) to rows; the first
line of its docstring describes it in ``--help``. A new one is one function and one line in ``EXPORTS``. Equal scores
(``rrhf.common.scores``) are no pair, responses without a score are in none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.scores import score_levels
from rrhf.records.record import Message, Query, Record

Row = dict[str, Any]
Pair = tuple[int, int]  # better, worse
Export = Callable[[Record, Sequence[Pair]], Iterator[Row]]


def _levels(record: Record) -> dict[int, int]:
    """Index of each scored response → its level, 0 the lowest."""
    scored = [(index, score) for index, score in enumerate(record.scores) if score is not None]
    return dict(zip((index for index, _ in scored), score_levels(score for _, score in scored)))


def best_of(record: Record) -> int | None:
    """The first of the best responses, None where none is scored."""
    levels = _levels(record)
    return max(levels, key=lambda index: levels[index]) if levels else None


def all_pairs(record: Record) -> list[Pair]:
    """every pair with r_i > r_j."""
    levels = _levels(record)
    return [(i, j) for i in levels for j in levels if levels[i] > levels[j]]


def best_worst(record: Record) -> list[Pair]:
    """the best and the worst."""
    levels = _levels(record)
    best, worst = best_of(record), min(levels, key=lambda index: levels[index], default=None)
    return [(best, worst)] if best is not None and worst is not None and levels[best] > levels[worst] else []


PAIRS: dict[str, Callable[[Record], list[Pair]]] = {"all": all_pairs, "best-worst": best_worst}


# --- rows --------------------------------------------------------------------------------------------------------


def _said(query: Query, response: str) -> str | list[Message]:
    """A response as TRL has it: text to text, an assistant's message to messages."""
    return response if isinstance(query, str) else [{"role": "assistant", "content": response}]


def trl_preference(record: Record, pairs: Sequence[Pair]) -> Iterator[Row]:
    """TRL's preference rows with explicit prompts (DPOTrainer, RewardTrainer): prompt, chosen, rejected."""
    for better, worse in pairs:
        chosen, rejected = (_said(record.query, record.responses[index]) for index in (better, worse))
        yield {
            "id": record.id,
            "prompt": record.query,
            "chosen": chosen,
            "rejected": rejected,
            **_scores(record, better, worse),
        }


def _scores(record: Record, better: int, worse: int) -> Row:
    return {"score_chosen": record.scores[better], "score_rejected": record.scores[worse]}


def trl_best(record: Record, pairs: Sequence[Pair]) -> Iterator[Row]:
    """TRL's prompt-completion rows (SFTTrainer) with the best response: prompt, completion."""
    best = best_of(record)
    if best is not None:
        yield {"id": record.id, "prompt": record.query, "completion": _said(record.query, record.responses[best])}


SPEAKERS = {"user": "human", "assistant": "gpt"}  # by ShareGPT's names


def _conversation(query: Query) -> list[Message]:
    messages = [{"role": "user", "content": query}] if isinstance(query, str) else query
    return [{"from": SPEAKERS.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def llamafactory_preference(record: Record, pairs: Sequence[Pair]) -> Iterator[Row]:
    """LLaMA-Factory's ShareGPT rows with "ranking": true: conversations, chosen, rejected."""
    for better, worse in pairs:
        chosen, rejected = ({"from": "gpt", "value": record.responses[index]} for index in (better, worse))
        row: Row = {
            "id": record.id,
            "conversations": _conversation(record.query),
            "chosen": chosen,
            "rejected": rejected,
        }
        yield {**row, **_scores(record, better, worse)}


def llamafactory_best(record: Record, pairs: Sequence[Pair]) -> Iterator[Row]:
    """LLaMA-Factory's ShareGPT rows with the best response as the last turn: conversations."""
    best = best_of(record)
    if best is not None:
        last = {"from": "gpt", "value": record.responses[best]}
        yield {"id": record.id, "conversations": [*_conversation(record.query), last]}


EXPORTS: dict[str, Export] = {
    "trl-preference": trl_preference,
    "trl-best": trl_best,
    "llamafactory-preference": llamafactory_preference,
    "llamafactory-best": llamafactory_best,
}


def describe_export(export: Callable[..., Any]) -> str:
    """The first line of its docstring, without its full stop."""
    return (export.__doc__ or "").partition("\n")[0].removesuffix(".")


def exported(
    records: Iterable[Record], to: str, pairing: str = "all", counts: Counter[str] | None = None
) -> Iterator[Row]:
    """Rows of ``records`` for another trainer, in their order; records that give none are counted.

    Args:
        records: scored records.
        to: a name in ``EXPORTS``.
        pairing: a name in ``PAIRS``.
        counts: counts records without a row.

    Raises:
        UserError: at once for an unknown name; at the end where no record gave a row.
    """
    if to not in EXPORTS:
        raise UserError(f"--to {to}: {nearest(to, EXPORTS)}")
    if pairing not in PAIRS:
        raise UserError(f"--pairing {pairing}: {nearest(pairing, PAIRS)}")
    return _rows(records, EXPORTS[to], PAIRS[pairing], Counter[str]() if counts is None else counts)


def _rows(
    records: Iterable[Record], export: Export, pairs: Callable[[Record], list[Pair]], counts: Counter[str]
) -> Iterator[Row]:
    empty = True
    for record in records:
        rows = list(export(record, pairs(record)))
        if not rows:
            unscored = all(score is None for score in record.scores)
            counts["no response is scored" if unscored else "all scores are equal"] += 1
        empty = empty and not rows
        yield from rows
    if empty:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.items())
        raise UserError(f"no record gives a row: {reasons or 'there is none'}: run `rrhf score` first")
