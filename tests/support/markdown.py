"""The code blocks of Markdown pages, and the ``rrhf`` commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent.parent
SHELL = ("sh", "bash", "shell", "console")
MARKER = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of code; ``info`` is what stands behind the fence, ``reason`` why it is not run."""

    page: Path
    line: int
    info: str
    text: str
    reason: str | None = None

    @property
    def language(self) -> str:
        """The fence's word; of an indented block what its text looks like."""
        if self.info:
            return self.info.split()[0]
        if re.match(r"\s*(rrhf|make|python|pip) ", self.text):
            return "sh"
        return "python" if re.search(r"^(from \S+ import|import|def) ?", self.text, re.MULTILINE) else ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that the block is: Python says it in a comment first, others behind the fence."""
        named = re.match(r"# (\S+\.py)$", self.text.partition("\n")[0]) if self.language == "python" else None
        return named[1] if named else next(iter(self.info.split()[1:]), None)

    def commands(self) -> list[list[str]]:
        """The words of each command: continued lines joined; comments, words behind three spaces, and variables'
        assignments left out, and the brackets around what may be left out."""
        lines = [re.split(r"\s{3,}", line.strip())[0] for line in re.sub(r"\\\n\s*", "", self.text).splitlines()]
        found = [[_bare(word) for word in shlex.split(line, comments=True)] for line in lines if line]
        without = [
            words[next((i for i, word in enumerate(words) if not _assigns(word)), len(words)) :] for words in found
        ]
        return [words for words in without if words]


def _bare(word: str) -> str:
    return word if "=" in word or "'" in word or re.match(r"\w+\[", word) else word.strip("[]") or word


def _assigns(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


def pages() -> list[Path]:
    """The README and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in its order."""
    reason: str | None = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, reason)
        marker = MARKER.search(token.content) if token.type == "html_block" else None
        if token.type in ("html_block", "fence", "code_block"):
            reason = marker["reason"] if marker else None
