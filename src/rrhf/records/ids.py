"""Ids that no two records of a file share: 8 bytes of hash and 8 of a line number for each."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left


class _Lines:
    """64-bit hash → line: 16 bytes each in sorted arrays, but for the last ones, which wait in a dict."""

    WAITING = 1 << 14

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._hashes, self._lines = array("Q"), array("Q")

    def get(self, digest: int) -> int | None:
        line = self._last.get(digest)
        if line is None and self._hashes:
            place = bisect_left(self._hashes, digest)
            if place < len(self._hashes) and self._hashes[place] == digest:
                line = self._lines[place]
        return line

    def add(self, digest: int, line: int) -> None:
        self._last[digest] = line
        if len(self._last) >= max(self.WAITING, len(self._hashes) // 8):
            self._sort()

    def _sort(self) -> None:
        hashes, lines, start = array("Q"), array("Q"), 0
        for digest in sorted(self._last):
            stop = bisect_left(self._hashes, digest, start)
            hashes.extend(self._hashes[start:stop])
            lines.extend(self._lines[start:stop])
            hashes.append(digest)
            lines.append(self._last[digest])
            start = stop
        hashes.extend(self._hashes[start:])
        lines.extend(self._lines[start:])
        self._hashes, self._lines = hashes, lines
        self._last.clear()


class Ids:
    """Makes ids unique within one file and remembers of each an 8-byte hash and the line of its first use."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._repeats: dict[int, int] = {}

    @staticmethod
    def _digest(name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

    def first_line(self, name: str) -> int | None:
        """Return the line of the first use of ``name``, None where it is new."""
        return self._lines.get(self._digest(name))

    def claim(self, name: str, line: int) -> str:
        """Return ``name``, or with the first free of the suffixes -2, -3, … where it is taken."""
        digest = self._digest(name)
        if self._lines.get(digest) is None:
            self._lines.add(digest, line)
            return name
        number = self._repeats.get(digest, 1) + 1
        while self._lines.get(other := self._digest(f"{name}-{number}")) is not None:
            number += 1
        self._repeats[digest] = number
        self._lines.add(other, line)
        return f"{name}-{number}"
