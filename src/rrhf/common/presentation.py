"""How numbers and counts are printed."""

from __future__ import annotations

from collections import Counter


def describe_counts(counts: Counter[str]) -> str:
    """``3 empty response dropped; 1 …`` for the reasons counted."""
    return "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
