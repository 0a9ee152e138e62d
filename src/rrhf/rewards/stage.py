"""The scoring stage: a file of responses → a file of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.models.load import DTYPES
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import count_records, read_records
from rrhf.records.parts import in_parts
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import FORMS, Rewards, reward_digest

SCORING_PART = 512  # records in a part


@dataclass(frozen=True)
class RewardSettings:
    """What scores responses."""

    reward: list[str] = field(metadata={"help": f"one of {', '.join(FORMS)}; several are summed", "nargs": "+"})
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "one factor a reward; default: 1 each", "nargs": "*"}
    )


@dataclass(frozen=True)
class ScoringSettings:
    """What rewards need beside their names."""

    reference_model: str | None = field(
        default=None, metadata={"help": "ρ: rewards that are a policy's log-probabilities become differences to it"}
    )
    device: str = field(default="auto", metadata={"help": "of reward models: cpu, cuda, cuda:N, mps, or auto"})
    dtype: str = field(default="auto", metadata={"help": f"of reward models' weights: {', '.join(DTYPES)}"})
    max_length: int | None = field(
        default=None,
        metadata={"help": "most tokens of query and response together for log-probabilities, the response is cut from "
                  "the right; default: the model's context, the query is cut from the left"},
    )  # fmt: skip
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "most tokens of a reward model's forward pass; default: by the device"}
    )
    seed: int = field(default=0, metadata={"help": "of what a reward draws, such as the order in which a judge reads"})

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise UserError("\n".join(faults))

    def _faults(self) -> list[str]:
        faults = []
        if self.dtype not in DTYPES:
            faults.append(f"--dtype {self.dtype}: known: {', '.join(DTYPES)}")
        for name, least in (("max_tokens_per_forward", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"--{name} {value}: must be at least {least}")
        return faults

    def context(
        self, text: TextSettings | None = None, remote: EndpointLimits | None = None, journals: Path | None = None
    ) -> RewardContext:
        """What rewards are given; see ``RewardContext``."""
        return RewardContext(
            device=self.device,
            dtype=self.dtype,
            max_tokens_per_forward=self.max_tokens_per_forward,
            text=text or TextSettings(),
            max_length=self.max_length,
            reference_model=self.reference_model,
            remote=remote or EndpointLimits(),
            journals=journals,
            seed=self.seed,
        )


def rewards_digests(settings: RewardSettings, context: RewardContext) -> dict[str, str]:
    """What the scores depend on beside settings and records: of each reward the digest of its code or weights."""
    return {f"the code of {reward}": reward_digest(reward, context) for reward in settings.reward}


def score_file(
    data: Path,
    output: Path,
    settings: RewardSettings,
    scoring: ScoringSettings | None = None,
    text: TextSettings | None = None,
    remote: EndpointLimits | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Score the responses of ``data`` and write the records with ``rewards`` and ``scores`` to ``output``.

    A stopped call goes on where it was, with the same rewards and the same code of theirs; answers that were paid for
    are kept in the folder of the parts.

    Args:
        settings: the rewards.
        scoring: what they need; by default nothing that a function needs.
        text: how policies read queries.
        remote: how servers are asked, and what they may cost.

    Raises:
        UserError: a reward is unknown or fails, ``output`` exists, or unfinished work of other rewards stands there.
    """
    scoring = scoring or ScoringSettings()
    context = scoring.context(text, remote, journals=output.with_name(f"{output.name}.parts"))
    # An unknown reward is refused before any work.
    rewards = Rewards(settings.reward, weights=settings.reward_weights or None, context=context)

    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        for record in rewards.score(block):
            yield record
            done(1)

    try:
        in_parts(
            lambda: read_records(data, require="responses"),
            output,
            {"score": work},
            {**asdict(settings), **_scores_depend_on(scoring, context), **rewards_digests(settings, context)},
            part_size=SCORING_PART,
            overwrite=overwrite,
            total=count_records(data),
        )
    finally:
        rewards.close()


def _scores_depend_on(scoring: ScoringSettings, context: RewardContext) -> dict[str, object]:
    """The settings that scores depend on; on what device, and how many at a time, they are computed is none."""
    settings = {**asdict(scoring), **asdict(context.text)}
    return {name: value for name, value in settings.items() if name not in ("device", "max_tokens_per_forward")}
