"""Texts of models as HTML that is text: Markdown's structure, and nothing that acts, loads or leads away.

No HTML passes; images and links are shown, not loaded or followed; headings are bold lines, so that the outline is the
page's own; characters that turn the order of others around are named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from rrhf.common.presentation import clean
from rrhf.evaluation.metrics import TURN_MARKERS
from rrhf.records.record import Message, Query

# Embeddings, overrides and isolates: what stands between them is shown in another order than it was written in.
TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
TURN = re.compile(rf"(?:^|\n)[ \t]*({'|'.join(TURN_MARKERS)})")


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue; ``role`` is empty where the query is a text alone."""

    role: str
    html: Markup


def query_turns(query: Query) -> list[Turn]:
    """A query as its messages; a text in the layout of HH (``Human: … Assistant: …``) is a dialogue too."""
    messages = split_turns(query) if isinstance(query, str) else query
    return [Turn(message["role"].capitalize(), text_html(message["content"])) for message in messages]


def split_turns(text: str) -> list[Message]:
    """The messages of a dialogue in one text; a text that does not begin with a turn is one message of nobody."""
    before, *pieces = TURN.split(text.strip())
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    messages = [{"role": role.rstrip(":"), "content": said} for role, said in turns if said.strip()]
    return [{"role": "", "content": text}] if before.strip() or not messages else messages


@lru_cache(maxsize=4096)
def text_html(text: str) -> Markup:
    """A text in Markdown as safe HTML. White space at its ends, in which systems differ, is not shown."""
    shown = TURNING.sub(lambda found: f"\u2068⟨U+{ord(found[0]):04X}⟩\u2069", clean(text).strip())
    return Markup(_MARKDOWN.render(shown))  # escaped by the library: `html` is off


def _plain_tokens(tokens: list[Token]) -> list[Token]:
    """The tokens with nothing but elements of text, without attributes that a text has chosen."""
    kept: list[Token] = []
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag, token.attrs = "p", {"class": "heading"} if token.nesting == 1 else {}
        elif token.type == "link_open":
            token.attrs = {"class": "link", "data-to": str(token.attrs.get("href", ""))}
            token.tag = "span"
        elif token.type == "link_close":
            token.tag = "span"
        elif token.type == "fence":
            token.info = ""
        elif token.type != "ordered_list_open":  # its number may stay
            token.attrs = {}
        if token.children:
            token.children = _plain_tokens(token.children)
        kept.append(token)
    return kept


def _links_told(tokens: list[Token]) -> list[Token]:
    """Behind a link's text its address, where the text is another."""
    told: list[Token] = []
    start, address = 0, ""
    for token in tokens:
        if token.children:
            token.children = _links_told(token.children)
        if token.type == "link_open":
            address, start = str(token.attrs.pop("data-to")), len(told)
        if token.type == "link_close" and address not in "".join(other.content for other in told[start:]):
            told.append(Token("text", "", 0, content=f" ({address})"))
        told.append(token)
    return told


def _table_open(renderer: Any, *_: Any) -> str:
    return '<div class="table" role="group" aria-label="Table" tabindex="0"><table>'


def _table_close(renderer: Any, *_: Any) -> str:
    return "</table></div>"


class _Markdown(MarkdownIt):
    def render(self, src: str, env: Any = None) -> str:
        tokens = _links_told(_plain_tokens(self.parse(src, {})))
        return str(self.renderer.render(tokens, self.options, {}))


def _markdown() -> MarkdownIt:
    parser = _Markdown("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    return parser


_MARKDOWN = _markdown()
