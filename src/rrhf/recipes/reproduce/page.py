"""The page of a reproduction, from whatever results there are: report.md with its plots, and report.html."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from rrhf.common.files import write_text
from rrhf.common.presentation import html_table, markdown_table, number
from rrhf.common.svg import inline_svg
from rrhf.recipes.reproduce import plots
from rrhf.recipes.reproduce.place import Place
from rrhf.recipes.reproduce.rows import (
    Cells,
    Row,
    cost_table,
    differences,
    main_table,
    meaning_table,
    rate_table,
    rows_of,
    seed_table,
)
from rrhf.recipes.reproduce.scale import Scale
from rrhf.recipes.reproduce.work import Results, Table, by_key

Block = str | Cells | tuple[str, "plots.Draw", tuple[float, float]]  # a paragraph, a table, or a plot with its caption


def write_page(place: Place, scale: Scale, table: Table) -> Path:
    """Write both pages of the results there are; returns the HTML page's path."""
    results = by_key(place.results())
    title = f"{scale.task} at the scale {Path(scale.name).stem}"
    blocks = _blocks(scale, table, results)
    write_text(place.folder / "report.md", _markdown(place, title, blocks))
    page = place.folder / "report.html"
    write_text(page, _html(title, blocks))
    return page


def _blocks(scale: Scale, table: Table, results: Results) -> list[tuple[str, list[Block]]]:
    """Headings, each with what stands below it."""
    rows = rows_of(table, results)
    if not rows:
        return [("Results", ["No arm has ended yet."])]
    wanted = len(table.arms) * table.seeds
    done = sum(len(row.results) for row in rows)
    found: list[tuple[str, list[Block]]] = [("Results", [_introduction(table, rows, done, wanted), main_table(rows)])]
    drawn: list[Block] = [
        (
            "Gain over ρ of each arm: mean over seeds and, thin, their range",
            plots.gains(rows),
            (7.0, 1.2 + 0.34 * len(rows)),
        ),
        ("Reward and KL to ρ: arms further up at the same KL are better", plots.frontier(rows), (7.0, 4.2)),
    ]
    found[0][1].extend(drawn)
    found.append(("What the arms are", [meaning_table(rows)]))
    cost: list[Block] = [cost_table(rows), *differences(rows)]
    cost.append(
        "Responses are counted after empty ones were dropped and equal ones of a query merged. "
        "Samples that several arms train on are drawn once; their seconds count in each of these arms. "
        "Memory is this process's whole one, its libraries included."
    )
    found.append(("What they take", cost))
    found.append(("Every seed", [seed_table(rows)]))
    if len(table.rates) > 1 and any(arm.has_rate for arm in table.arms):
        text = (
            f"The mean reward that trains, on {scale.rate_queries} prompts kept for this, over the seeds that "
            "were run at every rate; the chosen rate's in brackets. All arms choose from the same rates in the same "
            "way."
        )
        found.append(("Learning rates", [text, rate_table(table, results)]))
    return found


def _introduction(table: Table, rows: Sequence[Row], done: int, wanted: int) -> str:
    first = rows[0].results[0]
    commits = sorted({str(result["commit"]) for row in rows for result in row.results})
    responses = "one response" if (samples := first.get("held_out_samples", 1)) == 1 else f"{samples} responses"
    state = "" if done == wanted else f" {done} of {wanted} have ended so far."
    return (
        f"{len(table.arms)} arms from {table.seeds} seed(s) each.{state} Rewards are means over {first['n']} held-out "
        f"prompts, the same for all arms, {responses} each; ± is the standard deviation over seeds. The proxy reward "
        "trains, the gold reward only judges: a gain of the first without the second is reward hacking. KL to ρ is in "
        "nats a response, estimated on samples of π (of best-of-n a bound). Perplexity is under ρ. "
        f"ρ: proxy {number(rows[0].mean('proxy', 'start'))}"
        + (f", gold {number(rows[0].mean('gold', 'start'))}" if "gold" in first else "")
        + f". Code: {', '.join(commits)}."
    )


# -- Markdown


def _markdown(place: Place, title: str, blocks: Sequence[tuple[str, Sequence[Block]]]) -> str:
    parts = [f"# {title}"]
    for heading, inside in blocks:
        parts.append(f"## {heading}")
        for block in inside:
            if isinstance(block, str):
                parts.append(block)
            elif len(block) == 2:
                parts.append(markdown_table(*block))
            else:
                parts.append(_saved(place, *block))
    return "\n\n".join(parts) + "\n"


def _saved(place: Place, caption: str, draw: plots.Draw, size: tuple[float, float]) -> str:
    """Write a plot beside the page and name it there."""
    name = f"plots/{draw.__name__}.svg"
    write_text(place.folder / name, plots.on_white(draw, size, draw.__name__))
    return f"![{caption}]({name})"


# -- HTML

STYLES = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td { white-space: nowrap } td:last-child { white-space: normal; min-width: 6rem }
.text td { white-space: normal !important }
figure { margin: 1.5rem 0 } figcaption { font-size: 0.85rem; opacity: 0.8 } svg { max-width: 100%; height: auto }
"""


def _html(title: str, blocks: Sequence[tuple[str, Sequence[Block]]]) -> str:
    parts = []
    for heading, inside in blocks:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in inside:
            if isinstance(block, str):
                parts.append(f"<p>{html.escape(block)}</p>")
            elif len(block) == 2:
                parts.append(f'<div class="wide{" text" if len(block[0]) == 3 else ""}">{html_table(*block)}</div>')
            else:
                caption, draw, size = block
                picture = inline_svg(draw, size, caption)
                parts.append(f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLES}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
