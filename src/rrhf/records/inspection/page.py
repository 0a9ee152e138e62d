"""An inspection as one HTML page that needs no network."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rrhf.common.presentation import html_table
from rrhf.common.svg import inline_svg
from rrhf.records.inspection.tables import inspection_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCENT = "#040506"  # the page puts its own colour in its place, so that charts follow light and dark

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #3b6ea8; --warn: #b3540033; }
@media (prefers-color-scheme: dark) { :root { --accent: #7fb0e6; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; }
.warning { background: var(--warn); border-radius: .4rem; padding: .6rem .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.charts figure { margin: 0; background: var(--soft); border-radius: .4rem; padding: .5rem; }
.charts svg { width: 100%; height: auto; }
"""


def inspection_html(result: dict[str, Any], title: str = "Records") -> str:
    """Return what ``inspect_records`` measured as a page; the same result gives the same bytes."""
    warnings = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in result["warnings"])
    charts = "".join(
        f"<figure>{_chart(name, histogram)}</figure>" for name, histogram in result["histograms"].items() if histogram
    )
    tables = "".join(
        f'<h2>{html.escape(table.title)}</h2><div class="scroll">{html_table(table.header, table.rows)}</div>'
        for table in inspection_tables(result)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{html.escape(title)}</h1>{warnings}<div class="charts">{charts}</div>{tables}</body></html>\n'
    )


def _chart(title: str, histogram: dict[str, Any]) -> str:
    return inline_svg(_draw_histogram(title, histogram), (4.6, 2.4), title, {ACCENT: "var(--accent)"})


def _draw_histogram(title: str, histogram: dict[str, Any]) -> Callable[[Figure], None]:
    edges = histogram["edges"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(edges[:-1], histogram["counts"], width=edges[1] - edges[0], align="edge", color=ACCENT)
        axes.set_title(title)

    return draw
