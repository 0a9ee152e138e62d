"""The sampling policies by name, and the settings of one, checked at once, all faults in one message."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rrhf.common.errors import UserError, nearest, too_small
from rrhf.common.imports import call_own, code_digest, load_function


@dataclass(frozen=True)
class SamplingPolicy:
    """What is known of a sampling policy without importing it; called, it makes a ``decoding.Policy``.

    Args:
        implementation: ``module:class``, called with (settings, keys, end_tokens, stops, device); see ``Draws``.
        description: what it does, for help texts, model cards and reports.
        default_responses: responses a query where no number is given; for beams all of them.
        most_responses: no more of them can differ.
        beams: it follows ``num_beams`` beams; others decode a row a response.
        grouped: its beams are in ``num_beam_groups`` groups.
        default_top_k: the likeliest tokens it draws from where ``top_k`` is not given; ``None`` is all.
        outside: the implementation is a function of the user's, ``pkg.module:function``, called in the same way.
    """

    implementation: str
    description: str
    default_responses: int = 4
    most_responses: int | None = None
    beams: bool = False
    grouped: bool = False
    default_top_k: int | None = None
    outside: bool = False

    def load(self) -> Callable[..., Any]:
        """What makes the policy.

        Raises:
            UserError: it is a function of the user's, and cannot be imported.
        """
        if self.outside:
            usage = "make_policy(settings, keys, end_tokens, stops, device)"
            return load_function(self.implementation, "sampling policy", usage)
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)

    def __call__(self, *arguments: Any) -> Any:
        """The policy for a batch.

        Raises:
            UserError: as ``load``, or a function of the user's fails or makes no policy.
        """
        make = self.load()
        if not self.outside:
            return make(*arguments)
        what = f"--policy {self.implementation}"
        policy = call_own(make, what, *arguments)
        lacking = [name for name in ("width", "advance", "results") if not hasattr(policy, name)]
        if lacking:
            raise UserError(
                f"{what} gave {type(policy).__name__}, which has no {', '.join(lacking)}: it must make a "
                "rrhf.sampling.decoding.Policy"
            )
        return _OwnPolicy(policy, what)

    def code(self) -> dict[str, str]:
        """The digest of a function of the user's under ``policy_code``: edited, it is another policy. Ours are named.

        Raises:
            UserError: as ``load``.
        """
        digest = code_digest(self.load()) if self.outside else ""
        return {"policy_code": digest} if digest else {}


@dataclass(frozen=True)
class _OwnPolicy:
    """A policy of the user's, whose faults name it."""

    policy: Any
    what: str

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.policy, name)
        return partial(call_own, value, self.what) if callable(value) else value


# A new policy is a class and a line here: help texts, checks, documents and the sampler read this dict.
POLICIES = {
    "greedy": SamplingPolicy(
        "rrhf.sampling.policies:Draws", "the likeliest token at each step", default_responses=1, most_responses=1
    ),
    "top-p": SamplingPolicy(
        "rrhf.sampling.policies:Draws", "draws from the likeliest tokens that have the probability top_p together"
    ),
    "top-k": SamplingPolicy(
        "rrhf.sampling.policies:Draws", "draws from the top_k likeliest tokens, by default 50", default_top_k=50
    ),
    "beam": SamplingPolicy("rrhf.sampling.policies:Beams", "the likeliest sequences of num_beams", beams=True),
    "diverse-beam": SamplingPolicy(
        "rrhf.sampling.policies:Beams", "beams in groups that avoid each other's tokens", beams=True, grouped=True
    ),
}


def policy_named(name: str) -> SamplingPolicy:
    """A policy of the dict, or ``pkg.module:function``, which is imported when it is used.

    Raises:
        UserError: neither.
    """
    if name in POLICIES:
        return POLICIES[name]
    if ":" in name:
        return SamplingPolicy(name, "a function of the user's", outside=True)
    raise UserError(f"{nearest(name, POLICIES)}, or pkg.module:function")


BLOCK_BATCHES = 4  # batches of a block of records, whose queries are sorted by length
BLOCK_QUERIES = 128  # … where the batch size is chosen by the memory that is free


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn. The paper's (Table 1): top-p 1.0 at 0.8; 4 beams; 4 beams in 4 groups, penalty 1.0."""

    policy: str = field(
        default="top-p",
        metadata={
            "help": "; ".join(f"{name}: {policy.description}" for name, policy in POLICIES.items())
            + "; or pkg.module:function, which makes one (rrhf.sampling.decoding.Policy)"
        },
    )
    num_responses: int | None = field(
        default=None, metadata={"help": "responses a query; default: 4 samples, all beams, or 1 with greedy"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "most tokens of a response, its end token counted"})
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits, with beams too, before scores are taken"}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "draw from the smallest set with this much probability; 1.0 draws from all"}
    )
    top_k: int | None = field(default=None, metadata={"help": "draw from this many likeliest tokens"})
    num_beams: int = field(default=4, metadata={"help": "beams of beam and diverse-beam"})
    num_beam_groups: int | None = field(
        default=None, metadata={"help": "groups of diverse-beam; default: one a beam; must divide --num_beams"}
    )
    diversity_penalty: float = field(
        default=1.0, metadata={"help": "taken off a token's score for each time earlier groups chose it at this step"}
    )
    length_penalty: float = field(
        default=1.0, metadata={"help": "finished beams compare by log-probability / length ** this"}
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "stop a query's beams as soon as all have finished once"}
    )
    stop: list[str] = field(
        default_factory=list, metadata={"help": "strings that end a response (not part of it)", "nargs": "*"}
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "queries that are decoded together; default: 64 on a CPU, 128 elsewhere (OpenVINO: 32), fewer "
            "where memory is short"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of every random choice"})

    def __post_init__(self) -> None:
        faults = []
        try:
            policy_named(self.policy)
        except UserError as error:
            faults.append(f"--policy {self.policy}: {error}")
        faults += too_small(
            self, max_new_tokens=1, num_beams=1, batch_size=1, num_responses=1, top_k=1, num_beam_groups=1
        )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            faults.append(f"--top_p {self.top_p}: must lie in (0, 1]")
        if not self.temperature > 0:
            faults.append(f"--temperature {self.temperature}: must be above 0 (greedy is a policy of its own)")
        if not 0 <= self.diversity_penalty < math.inf:
            faults.append(f"--diversity_penalty {self.diversity_penalty}: must be a number that is not negative")
        if not math.isfinite(self.length_penalty):
            faults.append(f"--length_penalty {self.length_penalty}: must be a finite number")
        if any(not text for text in self.stop):
            faults.append("--stop: a stop string is empty")
        if not faults:
            faults += self._combination_faults()
        if faults:
            raise UserError("\n".join(faults))

    def _combination_faults(self) -> list[str]:
        faults = []
        grouped, most = self.how.grouped, self.how.most_responses
        if grouped and self.num_beams % self.groups:
            faults.append(f"--num_beams {self.num_beams} is not divisible by --num_beam_groups {self.groups}")
        if not grouped and self.num_beam_groups not in (None, 1):
            names = " or ".join(name for name, policy in POLICIES.items() if policy.grouped)
            faults.append(f"--num_beam_groups {self.num_beam_groups} needs --policy {names}")
        if self.is_beam and self.responses > self.num_beams:
            faults.append(f"--num_responses {self.responses} is more than --num_beams {self.num_beams}")
        if most is not None and self.responses > most:
            has = "one response" if most == 1 else f"at most {most} responses"
            faults.append(f"--num_responses {self.responses}: {self.policy} has {has} a query")
        return faults

    @property
    def how(self) -> SamplingPolicy:
        """What is known of the policy."""
        return policy_named(self.policy)

    @property
    def is_beam(self) -> bool:
        return self.how.beams

    @property
    def groups(self) -> int:
        """Beam groups; plain beam search is one group."""
        return (self.num_beam_groups or self.num_beams) if self.how.grouped else 1

    @property
    def block_size(self) -> int:
        """Records that are sorted by length and decoded before the next ones are read; no more than a stop can lose."""
        return BLOCK_QUERIES if self.batch_size is None else BLOCK_BATCHES * self.batch_size

    @property
    def responses(self) -> int:
        """Responses a query."""
        if self.num_responses is not None:
            return self.num_responses
        return self.num_beams if self.is_beam else self.how.default_responses

    @property
    def width(self) -> int:
        """Rows that are decoded a query."""
        return self.num_beams if self.is_beam else self.responses

    def refuse_longer(self, query_tokens: int, record: str, context: int, model: str) -> None:
        """Refuse the query of a record that leaves no room for a response in a model's context.

        Raises:
            UserError: the query and ``max_new_tokens`` are more than ``context``.
        """
        room = context - self.max_new_tokens
        if query_tokens > room:
            cure = f"give --max_query_length {room}" if room > 0 else "lower --max_new_tokens"
            raise UserError(
                f"record {record}: a query of {query_tokens} tokens and --max_new_tokens {self.max_new_tokens} are "
                f"more than the context of {context} of {model}: {cure}"
            )

    @property
    def tokens_kept(self) -> int | None:
        """From how many of the likeliest tokens is drawn, before ``top_p`` cuts; ``None`` is all."""
        return self.top_k or self.how.default_top_k
