"""The results of a study for a terminal and as Markdown: the same tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rrhf.arena.raters import CARELESS, LEVEL
from rrhf.common.presentation import NONE, Row, clean, markdown_table, number, percent, rate, text_table

Table = tuple[str, Row, list[Row]]  # title, header, rows
MOST_PAIRS = 15  # of raters, in a table


def format_results(results: Mapping[str, Any]) -> str:
    """For a terminal."""
    return _page(results, str, lambda header, rows: text_table(header, rows, indent="  "), "")


def markdown_results(results: Mapping[str, Any]) -> str:
    """As Markdown."""
    return _page(
        results, lambda title: f"## {title}\n", lambda header, rows: markdown_table(*_plain(header, rows)), "- "
    )


def live_tables(found: Mapping[str, Any]) -> list[Table]:
    """What ``live_results`` found, as tables for the owner's page; none before the first vote."""
    rows: list[Row] = []
    for one in found["comparisons"]:
        shares = (f"{one[name]} ({percent(one[name] / one['votes'])})" for name in ("win", "tie", "lose"))
        rows.append((f"{one['a']} against {one['b']}", str(one["votes"]), *shares, rate(one["win_rate"])))
    header = ("comparison", "votes", "win", "tie", "lose", "win rate, a tie is half")
    tables: list[Table] = [("Votes by comparison", header, rows), _strengths(found["strengths"])]
    return [table for table in tables if table[2]]


def _page(
    results: Mapping[str, Any], title: Callable[[str], str], table: Callable[[Row, list[Row]], str], bullet: str
) -> str:
    parts = [_counts(results)]
    for name, header, rows in _tables(results):
        if rows:
            parts.append(f"{title(name)}\n{table(header, rows)}")
    parts += ["\n".join(f"{bullet}{line}" for line in _remarks(results))]
    return "\n\n".join(part for part in parts if part)


def _plain(header: Row, rows: list[Row]) -> tuple[Row, list[Row]]:
    """Names are the user's: a bar or a line break would break a Markdown table, and HTML would act."""
    return header, [
        [re.sub(r"([\\`|<>\[\]])", r"\\\1", clean(cell).replace("\n", " ")) for cell in row] for row in rows
    ]


def _counts(results: Mapping[str, Any]) -> str:
    said = f"{results['votes']} votes" if results["votes"] or not results["rankings"] else ""
    ranked = f"{results['rankings']} rankings" if results["rankings"] else ""
    words = " and ".join(filter(None, (said, ranked)))
    return f"{words} on {results['queries']} queries by {len(results['raters'])} raters; {results['skipped']} skipped"


def _tables(results: Mapping[str, Any]) -> Iterator[Table]:
    yield _comparisons(results["comparisons"])
    yield _strengths(results["strengths"])
    yield _agreement(results["agreement"])
    yield _raters(results["raters"])


def _comparisons(found: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[Row] = [
        (
            f"{one['a']} against {one['b']}", str(one["queries"]),
            *(rate(one[f"{name}_share"]) for name in ("win", "tie", "lose")), rate(one["win_rate"]),
        )
        for one in found
    ]  # fmt: skip
    return "Comparisons", ("", "queries", "win", "tie", "lose", "win rate, a tie is half"), rows


def _strengths(found: Mapping[str, Any]) -> Table:
    rows: list[Row] = [
        (name, number(one["mean"], 2, sign=True), _span(one))
        for name, one in sorted(found.items(), key=lambda item: -item[1]["mean"])
    ]
    return "Bradley–Terry strengths", ("system", "strength", "95 %"), rows


def _span(interval: Mapping[str, float]) -> str:
    return " to ".join(number(interval[end], 2, sign=True) for end in ("low", "high"))


def _agreement(found: Mapping[str, Any]) -> Table:
    header = ("", "n", "same label", "no contradiction", "kappa", "alpha, nominal", "alpha, ordinal")
    raters = found["raters"]
    rows: list[Row] = []
    if raters["n"]:
        alphas = (number(raters["krippendorff"][level], 2) for level in ("nominal", "ordinal"))
        rows.append(("raters among each other", *_agreed(raters), *alphas))
        pairs = list(found["pairs"].items())
        rows += [(name, *_agreed(one), "", "") for name, one in pairs[:MOST_PAIRS]]
        if len(pairs) > MOST_PAIRS:
            rows.append((f"… {len(pairs) - MOST_PAIRS} more pairs are in the JSON", *[""] * 6))
    for judge, by_rater in found["judges"].items():
        rows.append((f"{judge} and all raters", *_agreed(by_rater["all raters"]), "", ""))
    return "Agreement", header, rows


def _agreed(one: Mapping[str, Any]) -> Row:
    return str(one["n"]), rate(one["same"]), rate(one["not_contradicting"]), number(one["kappa"], 2)


def _raters(found: Mapping[str, Any]) -> Table:
    header = ("", "said", "skipped", "checks passed", "agrees with the others", "p", "left", "flags")
    rows: list[Row] = [
        (
            name,
            str(one["votes"] + one["rankings"]),
            str(one["skipped"]),
            f"{one['checks']['passed']} of {one['checks']['n']}" if one["checks"]["n"] else NONE,
            percent(one["agreement"]["with_others"]) if one["agreement"] else NONE,
            number(one["p"], 4),
            percent(one["sides"]["share"]["mean"]) if one["sides"]["share"] else NONE,
            ", ".join(one["flags"]),
        )
        for name, one in found.items()
    ]
    return "Raters", header, rows


def _remarks(results: Mapping[str, Any]) -> Iterator[str]:
    sides = results["sides"]
    if sides["share"]:
        yield f"the left response is chosen in {rate(sides['share'])} of votes for a side (p {number(sides['p'], 3)})"
    if results["checks"]["n"]:
        yield f"attention checks passed: {results['checks']['passed']} of {results['checks']['n']}"
    for name in results["flagged"]:
        flags = results["raters"][name]["flags"]
        if "random" in flags:
            yield (
                f"{name} looks like somebody who does not read: one who fails at most {percent(CARELESS, 0)} of the "
                f"checks and agrees as the others do looks as bad in less than {percent(LEVEL, 0)} of studies"
            )
        if "one side" in flags:
            yield f"{name} chooses one side too often for chance"
    counting = [name for name in results["flagged"] if name not in results["left_out"]]
    if counting:
        yield f"their votes count all the same; to leave them out: --without {' '.join(counting)}"
    if results["left_out"]:
        yield f"left out: {', '.join(results['left_out'])}"
    if results["unlinked"]:
        groups = " | ".join(", ".join(group) for group in results["unlinked"])
        yield f"never compared with each other, so their strengths are not either: {groups}"
