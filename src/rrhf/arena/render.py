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
from markupsafe import Markup, escape

from rrhf.common.presentation import clean
from rrhf.evaluation.metrics import TURN_MARKERS
from rrhf.records.record import Message, Query

# Embeddings, overrides and isolates: what stands between them is shown in another order than it was written in.
TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
DEEPEST = 40  # lists and quotes within each other, two a level of a list
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
    shown = _MARKDOWN.render(clean(text).strip())
    # Named here and not before: Markdown makes characters of entities, and of what is percent-encoded in an address.
    shown = TURNING.sub(lambda found: f"\u2068⟨U+{ord(found[0]):04X}⟩\u2069", shown)
    return Markup(shown)  # nosec B704 # escaped by the library: `html` is off


def _plain(tokens: list[Token]) -> list[Token]:
    """The tokens as elements of text, without attributes that a text has chosen; behind a link's text its address."""
    kept: list[Token] = []
    address, start = "", 0
    for token in tokens:
        token.children = _plain(token.children) if token.children else token.children
        attributes: dict[str, str | int | float] = {}
        if token.type in ("heading_open", "heading_close"):
            token.tag, attributes = "p", {"class": "heading"} if token.nesting == 1 else {}
        elif token.type == "link_open":
            address, start = str(token.attrs.get("href", "")), len(kept)
            token.tag, attributes = "span", {"class": "link"}
        elif token.type == "link_close":
            token.tag = "span"
            if address not in "".join(other.content for other in kept[start:]):
                kept.append(Token("text", "", 0, content=f" ({address})"))
        elif token.type == "ordered_list_open":
            attributes = token.attrs  # the number it begins with
        elif token.type == "fence":
            token.info = ""  # a language, which would become a class
        token.attrs = attributes
        kept.append(token)
    return kept


def _table_open(renderer: Any, *_: Any) -> str:
    return '<div class="table" role="group" aria-label="Table" tabindex="0"><table>'


def _table_close(renderer: Any, *_: Any) -> str:
    return "</table></div>"


class _Markdown(MarkdownIt):
    def render(self, src: str, env: Any = None) -> str:
        tokens = self.parse(src, {})
        if max((token.level for token in tokens), default=0) >= DEEPEST - 1:
            # The library leaves out what lies deeper, and all that follows it: so the text is shown as it was written.
            return f"<pre>{escape(src)}</pre>"
        return str(self.renderer.render(_plain(tokens), self.options, {}))


def _markdown() -> MarkdownIt:
    parser = _Markdown("commonmark", {"html": False, "breaks": True, "maxNesting": DEEPEST})
    parser.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    return parser


_MARKDOWN = _markdown()
