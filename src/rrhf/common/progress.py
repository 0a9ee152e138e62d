"""Progress on long loops: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

PLAIN_SECONDS = 15.0  # between two plain lines
PAUSE = 1.0  # seconds; units that come with less between them are of one batch


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class Progress:
    """Count units done out of ``total`` and show the rate and the time left, on stderr.

    Use as a context manager and call ``update(n)``; ``done`` units may stand from an earlier run.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "it", done: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.initial = self.count = done
        self.start = self.last = self.updated = time.monotonic()
        self.before_pause = (done, self.start)  # units, and when, before the batch at hand
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=description, unit=f" {unit}", initial=done, smoothing=0.1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None and self.count > self.initial:
            self._line(self.count, time.monotonic())

    def update(self, n: int = 1, note: str = "") -> None:
        """Add ``n`` units; ``note`` is shown behind the numbers."""
        now = time.monotonic()
        if now - self.updated > PAUSE:
            self.before_pause = self.count, self.updated
        self.updated = now
        self.count += n
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif now - self.last >= PLAIN_SECONDS:
            self._line(*self.before_pause, note)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Clear the bar while other lines are written."""
        if self.bar is None:
            yield
        else:
            with tqdm.external_write_mode(file=sys.stderr):
                yield

    def _line(self, count: int, then: float, note: str = "") -> None:
        """Print how far it is, with the rate at which ``count`` units were done ``then``.

        The first units of a batch come when all of it is done, but before the others are counted: a rate with them
        would be far too low.
        """
        now = time.monotonic()
        self.last = now
        rate = (count - self.initial) / max(then - self.start, 1e-9)
        line = f"{self.description}: {self.count}"
        if self.total is not None:
            line += f"/{self.total}"
        line += f" {self.unit}"
        if rate > 0:
            line += f", {rate:.3g} {self.unit}/s"
        line += f", {_clock(now - self.start)} elapsed"
        if self.total is not None and rate > 0 and self.count < self.total:
            line += f", {_clock((self.total - self.count) / rate)} left"
        print(line + (f", {note}" if note else ""), file=sys.stderr, flush=True)


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield ``items``, showing how far the loop is."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
