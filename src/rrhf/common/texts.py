"""Small operations on texts."""

from __future__ import annotations

from collections.abc import Iterable


def cut_at_first(text: str, marks: Iterable[str]) -> tuple[str, bool]:
    """``text`` before the first of ``marks`` in it, and whether there was one."""
    places = [place for place in (text.find(mark) for mark in marks) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
