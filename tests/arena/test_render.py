"""Model output is data: nothing in it becomes an element that acts, loads, leads away or looks like the page's own."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rrhf.arena.render import query_turns, text_html
from support.attacks import ATTACKS

ELEMENTS = {
    "p", "br", "strong", "em", "s", "code", "pre", "ul", "ol", "li", "blockquote", "hr", "div", "table", "thead",
    "tbody", "tr", "th", "td", "span",
}  # fmt: skip
ATTRIBUTES = {("p", "class", "heading"), ("span", "class", "link"), ("div", "class", "table"), ("div", "role", "group")}
ATTRIBUTES |= {("div", "aria-label", "Table"), ("div", "tabindex", "0")}


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.faults: list[object] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS:
            self.faults.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            number = (tag, name) == ("ol", "start") and re.fullmatch(r"\d+", value or "")
            if not number and (tag, name, value) not in ATTRIBUTES:
                self.faults.append((tag, name, value))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.faults.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def faults(text: str) -> list[object]:
    found = Elements()
    found.feed(str(text_html(text)))
    found.close()
    return [*found.faults, *found.open]


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_becomes_an_element(name: str) -> None:
    assert faults(ATTACKS[name]) == []


MARKUP = st.text(alphabet=st.sampled_from(list("<>\"'&/=!-[](){}*_`#|~:\\ \n\tabhijrst1.")), max_size=80)


@settings(deadline=None)
@given(MARKUP | st.text(max_size=60))
@example("a\n:-:|-\n|\n1")
def test_no_text_becomes_an_element(text: str) -> None:
    assert faults(text) == []
    assert not re.search("[\u202a-\u202e]", text_html(text))


def test_markdown_is_shown() -> None:
    page = text_html("# Head\n\n1. *a*\n2. **b** `c`\n\n```js\nx < y\n```\n\n|a|b|\n|-|:-:|\n|1|2|\n\nline\nline")
    for part in (
        '<p class="heading">Head</p>', "<li><em>a</em></li>", "<strong>b</strong> <code>c</code>",
        "<pre><code>x &lt; y\n</code></pre>", "<th>b</th>", "line<br />\nline",
    ):  # fmt: skip
        assert part in page, part


@pytest.mark.parametrize("depth", [1, 9, 10, 19, 20, 21, 39, 40, 60])
@pytest.mark.parametrize("kind", ["list", "quote", "both"])
def test_however_deep_every_word_is_shown(kind: str, depth: int) -> None:
    if kind == "list":
        text = "\n".join("  " * level + f"- word{level}" for level in range(depth))
    elif kind == "quote":
        text = "> " * depth + f"word{depth - 1}"
    else:
        text = "\n".join("> " * level + f"- word{level}\n" for level in range(depth))
    page = text_html(text + "\n\nthe <end>")
    assert f"word{depth - 1}" in page and "the &lt;end&gt;" in page


def test_links_and_images_are_told_and_not_followed() -> None:
    assert 'x <span class="link">here (https://a.org/b)</span>' in text_html("x [here](https://a.org/b)")
    assert '<span class="link">https://a.org</span>' in text_html("<https://a.org>")
    assert '!<span class="link">alt (http://a.org/x.png)</span>' in text_html("![alt](http://a.org/x.png)")


def test_what_systems_differ_in_unseen_is_not_in_the_source() -> None:
    """White space at the ends, kinds of line ends."""
    assert text_html("\n a\r\nb\n\n") == text_html("a\nb") == text_html("a\rb  ")


def test_characters_that_turn_the_order_are_named() -> None:
    assert "⟨U+202E⟩" in text_html("a\u202eb") and "\u202e" not in text_html("a\u202eb")
    for text in ("a &#x202E;evil&#8238; b", "<https://a.org/%E2%80%AEgpj>", "[&#x202E;](b)", "`a\u202eb`"):
        assert "⟨U+202E⟩" in text_html(text) and "\u202e" not in text_html(text), text
    assert "&amp;lt;" not in text_html("&lt;p&gt;")  # other entities are what they stand for
    assert "\u200f" in text_html("\u200fשלום")  # a mark that honest right-to-left text needs stays


def test_a_dialogue_is_shown_as_one() -> None:
    said = query_turns("\n\nHuman: What is 1 < 2?\n\nAssistant: True.\nHuman: Sure?\n\nAssistant:")
    assert [(turn.role, turn.html) for turn in said] == [
        ("Human", "<p>What is 1 &lt; 2?</p>\n"),
        ("Assistant", "<p>True.</p>\n"),
        ("Human", "<p>Sure?</p>\n"),
    ]
    assert [
        turn.role for turn in query_turns([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    ] == [
        "System",
        "User",
    ]
    for text in ("What does Human: mean?", "Human:", "x\nHuman: y"):
        assert [turn.role for turn in query_turns(text)] == [""]
