"""How numbers and tables are printed, and SVG that a page can hold."""

from __future__ import annotations

import math
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from rrhf.common.presentation import (
    clean,
    describe_counts,
    describe_shares,
    html_table,
    markdown_table,
    number,
    percent,
    quantity,
    short_name,
    shorten,
    text_table,
    typeset_number,
)
from rrhf.common.svg import INK, inline_svg


def test_numbers() -> None:
    assert number(-1234.5678) == "-1234.568"
    assert number(1234.5678, 1, sign=True, thousands=True) == "+1,234.6"
    assert typeset_number(-1234.5678, 2) == "−1\u202f234.57" and typeset_number(0.1, sign=True) == "+0.100"
    assert number(np.float32(0.5)) == "0.500" and number(7, 0) == "7"
    assert percent(0.12345) == "12.3%" and percent(1 / 3, 0) == "33%"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1", True])
def test_what_is_no_number_is_a_dash(value: Any) -> None:
    assert number(value) == typeset_number(value) == "–"
    assert percent(None) == quantity(None) == quantity(math.nan) == "–"


def test_quantities_by_size() -> None:
    assert [quantity(value) for value in (0, 12_345, 0.5, -99.9994, 100.0, -12_345.678)] == [
        "0", "12,345", "0.500", "-99.999", "100.0", "-12,345.7",
    ]  # fmt: skip


def test_counts_shares_and_names() -> None:
    assert describe_counts({"b dropped": 2, "a kept": 1}) == "1 a kept; 2 b dropped" and describe_counts({}) == ""
    assert describe_shares({"top-p": 0.75, "human": 0.25}) == "top-p 75%, human 25%"
    names = {"pkg.module:function": "function", "models/reward/": "reward", "org/name": "name", "plain": "plain"}
    assert {name: short_name(name) for name in names} == names
    assert shorten("a  line\nand another", 8) == "a line …"
    assert clean("a\r\nb\x00\ud800c\t") == "a\nb\ufffd\ufffdc\t"


def test_text_tables_align_the_first_column_left_and_the_others_right() -> None:
    assert text_table(["name", "n"], [["a", "100"], ["longer", ""]]) == "name      n\na       100\nlonger"
    assert text_table(["", ""], [["a", "1"], ["bb", "22"]], indent="  ") == "  a    1\n  bb  22"
    assert text_table(["name", "n"], []) == "name  n"


def test_markdown_and_html_tables() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert html_table(["<b>"], [["a & b"]]) == ("<table><tr><th>&lt;b&gt;</th></tr><tr><td>a &amp; b</td></tr></table>")
    assert "<th>" not in html_table([""], [["x"]])


def test_inline_svg_takes_the_pages_colours_and_reaches_for_nothing() -> None:
    accent = "#040506"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.bar([0, 1], [2, 3], color=accent)
        axes.set_title("title <&>")

    svg = inline_svg(draw, (3, 2), "label <&>", {accent: "var(--accent)"})
    assert svg == inline_svg(draw, (3, 2), "label <&>", {accent: "var(--accent)"})
    assert svg.startswith('<svg viewBox="') and 'aria-label="label &lt;&amp;&gt;"' in svg
    assert "var(--accent)" in svg and "currentColor" in svg and INK not in svg and accent not in svg
    assert "xmlns" not in svg and "<metadata" not in svg and "http" not in svg

    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

    Tags().feed(svg)
    assert tags.count("svg") == 1 and "text" in tags
    # Two plots on one page share no id.
    other = inline_svg(draw, (3, 2), "another", {accent: "var(--accent)"})
    assert not _ids(svg) & _ids(other) and _ids(svg)


def _ids(svg: str) -> set[str]:
    return {part.partition('"')[0] for part in svg.split(' id="')[1:]}


def test_the_kit_is_light() -> None:
    """Commands print numbers; none should load matplotlib for it."""
    script = "import sys, rrhf.common.presentation, rrhf.common.svg, rrhf.records.inspection\n"
    script += "assert not {'matplotlib', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
