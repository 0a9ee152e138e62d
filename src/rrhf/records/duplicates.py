"""Exact duplicates among a query's responses become one response with several sources; empty ones are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rrhf.records.record import Record
from rrhf.records.sources import JOIN


def merge_duplicates(record: Record) -> tuple[Record, int, int]:
    """Merge a record's equal responses and drop its empty ones.

    A response that comes again (the same text, character by character) goes into its first occurrence, which keeps its
    place. The tags of all its occurrences are joined by ``|``; it has ended ("stop") if one of them has; each of its
    scores is the first that is not None. Responses of nothing but white space are dropped. ``record`` stays as it is.

    Returns:
        (the record, how many responses were merged into others, how many were empty).
    """
    places: dict[str, list[int]] = {}
    for index, response in enumerate(record.responses):
        if response.strip():
            places.setdefault(response, []).append(index)
    groups = list(places.values())
    kept = sum(map(len, groups))
    empty, duplicates = len(record.responses) - kept, kept - len(groups)
    if not empty and not duplicates:
        return record, 0, 0
    merged = replace(
        record.keeping([group[0] for group in groups]),
        sources=[_joined([record.sources[index] for index in group]) for group in groups],
        finish=["stop" if any(record.finish[index] == "stop" for index in group) else "length" for group in groups],
        scores=_merged_scores(record.scores, groups),
        rewards={name: _merged_scores(scores, groups) for name, scores in record.rewards.items() if groups},
    )
    return merged, duplicates, empty


def _joined(tags: Sequence[str]) -> str:
    """One tag for all; a tag that was joined before is taken apart, so that none is named twice."""
    return JOIN.join(dict.fromkeys(tag for joined in tags for tag in joined.split(JOIN)))


def _merged_scores(scores: Sequence[float | None], groups: Sequence[Sequence[int]]) -> list[float | None]:
    if not scores:
        return []
    return [next((scores[index] for index in group if scores[index] is not None), None) for group in groups]
