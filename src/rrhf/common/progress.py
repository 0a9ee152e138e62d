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
        self.start = self.last = time.monotonic()
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
            self._line()

    def update(self, n: int = 1, note: str = "") -> None:
        """Add ``n`` units; ``note`` is shown behind the numbers."""
        self.count += n
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last >= PLAIN_SECONDS:
            self._line(note)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Clear the bar while other lines are written."""
        if self.bar is None:
            yield
        else:
            with tqdm.external_write_mode(file=sys.stderr):
                yield

    def _line(self, note: str = "") -> None:
        now = time.monotonic()
        self.last = now
        rate = (self.count - self.initial) / max(now - self.start, 1e-9)
        line = f"{self.description}: {self.count}"
        if self.total is not None:
            line += f"/{self.total}"
        line += f" {self.unit}, {rate:.3g} {self.unit}/s, {_clock(now - self.start)} elapsed"
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
