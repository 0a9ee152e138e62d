"""How a study is laid out: after the paper's Appendix D, unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from rrhf.common.errors import UserError, nearest, too_small

MODES = {
    "pairs": "two responses side by side: left, tie or right",
    "ranking": "all responses to a query, each given a place",
}
QUESTIONS = {"pairs": "Which response is better?", "ranking": "Which response is the best, which comes next?"}


@dataclass(frozen=True)
class StudySettings:
    """The design of a study.

    Raises:
        UserError: values that do not fit, all of them in one message.
    """

    mode: str = field(default="pairs", metadata={"help": ". ".join(f"{name}: {text}" for name, text in MODES.items())})
    per_comparison: int = field(
        default=110, metadata={"help": "pairs a comparison of two systems; of a ranking, queries"}
    )
    common: int = field(default=30, metadata={"help": "how many of all pairs every rater sees, for agreement"})
    per_rater: int = field(default=130, metadata={"help": "pairs a rater at most, the common ones among them"})
    checks: int = field(
        default=5, metadata={"help": "attention checks a rater on top: pairs with one response spoilt on purpose"}
    )
    seed: int = field(default=0, metadata={"help": "of which queries are taken and who sees them"})
    title: str = field(default="Comparing responses", metadata={"help": "what stands at the top of every page"})
    question: str = field(default="", metadata={"help": "what raters are asked (default: which is better)"})
    instructions: str = field(default="", metadata={"help": "what raters should look at, in Markdown"})

    def __post_init__(self) -> None:
        faults = []
        if self.mode not in MODES:
            faults.append(f"--mode {self.mode!r}: {nearest(self.mode, MODES)}")
        faults += too_small(self, per_comparison=1, common=0, per_rater=1, checks=0)
        if self.common > self.per_rater:
            faults.append(f"--common {self.common}: every rater sees these, but --per_rater is {self.per_rater}")
        if faults:
            raise UserError("; ".join(faults))

    @property
    def asked(self) -> str:
        """The question that raters read."""
        return self.question or QUESTIONS[self.mode]


@dataclass(frozen=True)
class LimitSettings:
    """Raises UserError: a limit below 1."""

    requests_per_minute: int = field(default=600, metadata={"help": "pages and votes that a link may ask for a minute"})
    strangers_per_minute: int = field(
        default=30, metadata={"help": "requests without a valid link that an address may send a minute"}
    )

    def __post_init__(self) -> None:
        if faults := too_small(self, requests_per_minute=1, strangers_per_minute=1):
            raise UserError("; ".join(faults))
