"""The one exception a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. Commands print it without a traceback and exit with code 2.

    The message says what was wrong, where (file, line, record id, flag) and how to mend it.
    """


class FailedError(UserError):
    """A failure that may not come again, or lies in one of several records: worth another try where that is possible.

    Where nothing is tried again it is the user's to mend, as any ``UserError``.
    """


def too_small(settings: object, **least: float) -> list[str]:
    """A fault for each of these settings, None aside, that is below the least it may be."""
    return [
        f"--{name} {value}: must be at least {low}"
        for name, low in least.items()
        if (value := getattr(settings, name)) is not None and not value >= low
    ]


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a sentence that lists ``known`` and, where one is close to ``name``, suggests it."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}known: {', '.join(known)}"
