"""What ``inspect_records`` measured, as the titled tables that the terminal and the page show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rrhf.common.presentation import NONE, percent, quantity


@dataclass(frozen=True)
class Table:
    """A table; the cells of the header are empty where it has none."""

    title: str
    header: list[str]
    rows: list[list[str]]


def inspection_tables(result: dict[str, Any]) -> list[Table]:
    """The result of ``inspect_records`` as tables; those of responses and scores only where there are some."""
    tables = [_records(result), _lengths(result)]
    if result["responses"]:
        tables.append(_diversity(result["diversity"]))
    if result["scores"]:
        tables.append(_scores({**result["scores_by_source"], "all": result["scores"]}))
    return tables


def _records(result: dict[str, Any]) -> Table:
    facts = [
        ["records", quantity(result["n"])],
        ["responses", quantity(result["responses"])],
        ["responses a query", ", ".join(f"{k} ({count:,})" for k, count in result["k"].items()) or NONE],
        ["finish", ", ".join(f"{name} {count:,}" for name, count in result["finish"].items()) or NONE],
        ["cut by a token limit", percent(result["truncated"])],
        ["empty responses", quantity(result["empty_responses"])],
        ["duplicates within a query", f"{result['duplicates']['responses']:,} in {result['duplicates']['queries']:,}"],
        ["unscored responses", quantity(result["unscored"]["responses"])],
        ["records without a score", quantity(result["unscored"]["records"])],
    ]
    if result["scores"]:
        answered = result["n"] - result["k"].get("0", 0)
        ties, no_signal = result["ties"], result["no_signal"]
        correlation = result["score_length_correlation"]
        facts += [
            ["tied pairs", _out_of(ties["tied"], ties["pairs"], ties["share"])],
            ["queries without a ranking signal", _out_of(no_signal["queries"], answered, no_signal["share"])],
            ["score and length, correlation", quantity(correlation["overall"])],
            ["… within a query", quantity(correlation["within_query"])],
        ]
    return Table("Records", ["", ""], facts)


def _out_of(part: int, whole: int, share: float | None) -> str:
    return f"{part:,} of {whole:,} ({percent(share)})"


def _lengths(result: dict[str, Any]) -> Table:
    rows = [
        [f"{text}, {unit}", *(quantity(summary[name]) for name in ("mean", "p50", "p95", "max"))]
        for text, units in result["lengths"].items()
        for unit, summary in units.items()
        if summary
    ]
    return Table("Lengths", ["", "mean", "p50", "p95", "max"], rows)


def _diversity(diversity: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            quantity(row["responses"]),
            percent(row["truncated"]),
            *(quantity(row[column]) for column in ("distinct_1", "distinct_2", "self_bleu")),
        ]
        for name, row in {**diversity["by_source"], "all": diversity["all"]}.items()
    ]
    queries = diversity["self_bleu_queries"]
    title = f"Sources and their diversity within a query (self-BLEU on {queries} queries)"
    return Table(title, ["source", "responses", "cut", "distinct-1", "distinct-2", "self-BLEU"], rows)


def _scores(by_source: dict[str, Any]) -> Table:
    measures = ("n", "mean", "std", "std_within_query", "mean_of_maxima", "min", "max")
    shares = ("win_share", "response_share")
    rows = [
        [name, *(quantity(row[column]) for column in measures), *(percent(row[column]) for column in shares)]
        for name, row in by_source.items()
    ]
    header = ["source", "n", "mean", "std", "std in query", "mean of max", "min", "max", "wins", "of responses"]
    return Table("Scores", header, rows)
