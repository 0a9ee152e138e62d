"""Verdicts: the tests that a claim rests on, and what they say together.

A claim with tests holds where each of them points its way with a Holm-adjusted p below 0.05 over all tests of its
section, fails where one points the other way with that certainty, and is not resolved otherwise. The others say their
own rule.
Nothing is resolved by fewer than three seeds: how far trainings differ from each other is not known then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rrhf.recipes.study.results import Study
from rrhf.recipes.study.statistics import ALPHA, Estimate, holm

HOLDS, FAILS, OPEN, MISSING = "holds", "fails", "not resolved", "not run"
SEEDS = 3  # fewer resolve nothing


@dataclass(frozen=True)
class Test:
    """A difference that a claim says is above 0 (``sign`` 1) or below (−1)."""

    what: str
    estimate: Estimate
    sign: int = 1
    adjusted: float = 1.0

    @property
    def verdict(self) -> str:
        if self.adjusted >= ALPHA or self.estimate.seeds < SEEDS:
            return OPEN
        return HOLDS if self.estimate.mean * self.sign > 0 else FAILS


@dataclass(frozen=True)
class Finding:
    """What results say of a claim."""

    tests: Sequence[Test] = ()
    said: str = ""  # numbers beside the tests
    own: str | None = None  # a verdict by the claim's own rule
    arms: Sequence[str] = ()  # that it rests on
    ranked: Callable[[Sequence[Test]], str] | None = None  # an order for a verdict, by what the tests tell apart

    @property
    def verdict(self) -> str:
        if self.own is not None:
            return self.own
        if self.ranked is not None:
            return self.ranked(self.tests)
        found = {test.verdict for test in self.tests}
        if not found:
            return MISSING
        return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        letter, text: which, and what it says.
        paper: its numbers there.
        besides: what else could explain what is seen.
        measure: holds it against results; a finding without tests and verdict where the arms were not run.
    """

    letter: str
    text: str
    paper: str
    besides: str
    measure: Callable[[Study], Finding] = field(repr=False)


def adjusted(tests: Sequence[Test]) -> list[Test]:
    """The tests with their p-values adjusted together."""
    p_values = holm([test.estimate.p for test in tests])
    return [replace(test, adjusted=p) for test, p in zip(tests, p_values, strict=True)]


def settled(study: Study, findings: Sequence[Finding]) -> list[Finding]:
    """The findings, all their tests adjusted together, and none by an own rule of too few seeds."""
    found = [_of_enough_seeds(study, finding) for finding in findings]
    tests = iter(adjusted([test for finding in found for test in finding.tests]))
    return [replace(finding, tests=[next(tests) for _ in finding.tests]) for finding in found]


def _of_enough_seeds(study: Study, finding: Finding) -> Finding:
    """A verdict by a claim's own rule is open where an arm has fewer seeds than resolve anything."""
    few = any(len(study.seeds(name)) < SEEDS for name in finding.arms)
    return replace(finding, own=OPEN) if few and finding.own in (HOLDS, FAILS) else finding
