"""The docs site: built as `make docs` builds it, without a warning, with every page and every public name in it."""

from __future__ import annotations

import zlib
from pathlib import Path

import rrhf
import rrhf.losses
from support import tiny
from support.markdown import ROOT


def public_names() -> set[str]:
    """Functions and classes; what is neither (a table, a type) has no docstring of its own."""
    named = {f"rrhf.{name}": getattr(rrhf, name) for name in rrhf.__all__}
    named |= {f"rrhf.losses.{name}": getattr(rrhf.losses, name) for name in rrhf.losses.__all__}
    return {name for name, value in named.items() if getattr(value, "__module__", "").startswith("rrhf")}


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line)
    flags = command.partition("-m sphinx ")[2].split()[:-2]  # all but the folders
    assert "-W" in flags
    arguments = [*flags, "-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "site")]
    tiny.forks(*tiny.PRELOADED)("sphinx.cmd.build:main", arguments).done()
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    _, _, _, _, inventory = (tmp_path / "site" / "objects.inv").read_bytes().split(b"\n", 4)
    objects = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert public_names() - objects == set()
