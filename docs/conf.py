"""The docs site: `make docs`. Pages are Markdown as they stand; the reference is made from the docstrings."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import rrhf

project, author, release = "rrhf", "the authors of rrhf", rrhf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", f"rrhf {release}"
exclude_patterns = ["results"]

highlight_language = "text"  # of indented blocks
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def settings_in_words(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Behind the docstring of a settings class: what its own fields are for, as the command's help says it."""
    if what == "class" and dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            if "help" in field.metadata and field.name in vars(found).get("__annotations__", {}):
                default = "" if field.default in (dataclasses.MISSING, None, "") else f" (default: ``{field.default}``)"
                text = " ".join(str(field.metadata["help"]).split()).replace("\\", r"\\").replace("*", r"\*")
                lines += ["", f"``{field.name}``", f"    {text.replace('`', '')}{default}"]
        lines.append("")


def bars_in_formulas(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """|a − b| in a docstring is an absolute value, not a name to be replaced."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda bar: bar[1] or r"\|", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", bars_in_formulas)
    app.connect("autodoc-process-docstring", settings_in_words)
