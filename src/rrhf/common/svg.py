"""Plots as SVG that sits inside a page, takes the page's colours and is the same bytes each time.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour nobody would choose: in the SVG it becomes the page's own text colour, whichever mode the page is in.
INK = "#010203"

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def stable_svg(svg: str, prefix: str) -> str:
    """Make the same figure the same bytes: the layout solver's last digits, and ids hashed from them, may differ.

    Coordinates are rounded to a hundredth of a point, ids that are used get numbers behind ``prefix``, others go.
    """

    def rounded(attribute: re.Match[str]) -> str:
        numbers = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{round(float(number[0]), 2) + 0.0:g}", attribute[2])
        return f'{attribute[1]}="{numbers}"'

    svg = re.sub(r'( (?:d|x|y|width|height|transform))="([^"]*)"', rounded, svg)
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    names = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", svg)
    return re.sub(r'(href="|url\()#([\w.-]+)', lambda m: f"{m[1]}#{names[m[2]]}", svg)


def figure_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an SVG file's text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return stable_svg(buffer.getvalue(), prefix)


def inline_svg(
    draw: Callable[[Figure], None], size: tuple[float, float], label: str, colours: Mapping[str, str] | None = None
) -> str:
    """Draw a figure and return it as an <svg> element for an HTML page: no reference outwards, always the same bytes.

    Args:
        draw: draws into the figure.
        size: width and height in inches.
        label: what a screen reader says; unique on the page, since the ids inside come from it.
        colours: drawn colours ("#rrggbb") → what the page calls them, such as ``var(--accent)``. ``INK`` is the colour
            of the page's text.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        svg = figure_svg(figure, "p" + hashlib.sha256(label.encode()).hexdigest()[:8])
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    # HTML knows the namespaces of an inline <svg>, and links within the page need no prefix.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, flags=re.S).replace("xlink:href=", "href=")
    for drawn, shown in {INK: "currentColor", **(colours or {})}.items():
        svg = svg.replace(drawn, shown)
    svg = re.sub(r"\n\s*", "\n", svg)
    start, end = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', start)
    assert view is not None
    return f'<svg {view[0]} role="img" aria-label="{html.escape(label)}">{end}'.strip()
