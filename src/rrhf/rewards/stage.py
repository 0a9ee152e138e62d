"""The scoring stage: a file of responses → a file of scores."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError, nearest, too_small
from rrhf.common.presentation import describe_counts
from rrhf.models.load import DTYPES
from rrhf.models.locate import locate
from rrhf.models.tokenization import TextSettings
from rrhf.records.elsewhere import Away, Elsewhere, Pool
from rrhf.records.files import WRITERS, count_records, file_suffix, read_records
from rrhf.records.parts import in_parts
from rrhf.records.record import Require
from rrhf.rewards.away import rewards_away, sums_away
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.kl import Shaping
from rrhf.rewards.logprob import logprob_model, reference_sums_name
from rrhf.rewards.normalise import NORMALISATIONS
from rrhf.rewards.scoring import FORMS, NEW_FORMS, Rewards, may_hold_a_model, reward_digest, stays
from rrhf.rewards.steps import Holder, combine_all, release, rewards_work, sums_work

log = logging.getLogger("rrhf")

SCORING_PART = 512  # records in a part


@dataclass(frozen=True)
class RewardSettings:
    """What scores responses."""

    reward: list[str] = field(metadata={"help": f"one of {', '.join(FORMS)}; several are summed", "nargs": "+"})
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "one factor a reward; default: 1 each", "nargs": "*"}
    )


@dataclass(frozen=True)
class NewTextRewardSettings(RewardSettings):
    """What scores responses that are sampled in the same command."""

    reward: list[str] = field(metadata={"help": f"one of {', '.join(NEW_FORMS)}; several are summed", "nargs": "+"})


@dataclass(frozen=True)
class ScoringSettings:
    """What rewards need beside their names, and how their values become one score."""

    reward_normalisation: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "of each reward, or of all, before they are summed: "
                  + "; ".join(f"{name}: {text}" for name, text in NORMALISATIONS.items()), "nargs": "+"},
    )  # fmt: skip
    model: str | None = field(
        default=None, metadata={"help": "π, which the responses were drawn from, where --kl_beta is given"}
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "ρ: its log-probability sums of the responses are kept in the records, and rewards that are "
                  "log-probabilities become differences to it"},
    )  # fmt: skip
    kl_beta: float = field(
        default=0.0, metadata={"help": "β: β (log π(y|x) − log ρ(y|x)), summed over tokens, is taken off each score"}
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
        for method in self.reward_normalisation:
            if method not in NORMALISATIONS:
                faults.append(f"--reward_normalisation {method}: {nearest(method, NORMALISATIONS)}")
        if not 0 <= self.kl_beta < math.inf:
            faults.append(f"--kl_beta {self.kl_beta}: must be a number of at least 0")
        if self.kl_beta:
            for name, meaning in (("model", "π, which the responses were drawn from"), ("reference_model", "ρ")):
                if not getattr(self, name):
                    faults.append(f"--kl_beta {self.kl_beta} needs --{name}: {meaning}")
        if self.dtype not in DTYPES:
            faults.append(f"--dtype {self.dtype}: known: {', '.join(DTYPES)}")
        return faults + too_small(self, max_tokens_per_forward=1, max_length=2)

    def context(
        self,
        text: TextSettings | None = None,
        remote: EndpointLimits | None = None,
        *,
        journals: Path | None = None,
        records: Path | None = None,
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
            records=records,
        )

    def shaping(self, context: RewardContext) -> Shaping | None:
        """The KL term that ``kl_beta`` asks for, of columns that ``sums_columns`` has."""
        if not self.kl_beta:
            return None
        pi, rho = (
            reference_sums_name(str(model), context.text, context.max_length)
            for model in (self.model, self.reference_model)
        )
        return Shaping(self.kl_beta, pi, rho)

    def sums_columns(self, context: RewardContext) -> dict[str, str]:
        """The columns of log-probability sums that the records get, each with its model.

        Raises:
            UserError: there is no such model.
        """
        models = [self.reference_model, self.model if self.kl_beta else None]
        return {reference_sums_name(model, context.text, context.max_length): model for model in models if model}


def rewards_digests(settings: RewardSettings, context: RewardContext) -> dict[str, str]:
    """What the scores depend on beside settings and records: of each reward the digest of its code or weights."""
    return {f"the code of {reward}": reward_digest(reward, context) for reward in settings.reward}


def opened_rewards(settings: RewardSettings, scoring: ScoringSettings, context: RewardContext) -> Rewards:
    """The rewards that settings ask for, weighted, normalised and shaped; nothing heavy is loaded yet.

    Raises:
        UserError: a reward or model is unknown, or there are not as many weights or normalisations as rewards.
    """
    for model in (scoring.reference_model, scoring.model if scoring.kl_beta else None):
        if model:
            locate(model)
    return Rewards(
        settings.reward,
        weights=settings.reward_weights or None,
        normalisation=scoring.reward_normalisation,
        shaping=scoring.shaping(context),
        context=context,
    )


def score_file(
    data: Path,
    output: Path,
    settings: RewardSettings,
    scoring: ScoringSettings | None = None,
    text: TextSettings | None = None,
    remote: EndpointLimits | None = None,
    *,
    overwrite: bool = False,
    require: Require = "responses",
    pool: Pool | None = None,
) -> None:
    """Score the responses of ``data`` and write the records with ``rewards`` and ``scores`` to ``output``.

    A stopped call goes on where it was, with the same rewards and the same code of theirs; answers that were paid for,
    or took long, are kept in the folder of the parts at once. One model at a time is in memory: the reference goes
    through all records, then the policy, then each reward that may hold a model, then the others.

    Args:
        settings: the rewards.
        scoring: what they need, and how one score is made of them; by default the weighted sum.
        text: how policies read queries.
        remote: how servers are asked, and what they may cost.
        require: "query" lets empty responses be scored too.
        pool: other processes, to which the parts are given; but judges and people's ratings are asked from here.

    Raises:
        UserError: a reward is unknown or fails, ``output`` exists, or unfinished work of other rewards stands there.
    """
    scoring = scoring or ScoringSettings()
    file_suffix(output, WRITERS)
    parts = output.with_name(f"{output.name}.parts")
    context = scoring.context(text, remote, journals=parts, records=data)
    rewards = opened_rewards(settings, scoring, context)  # an unknown reward or model is refused before any work
    combine = combine_all(rewards.combination) if rewards.combination.over_the_data else None
    columns = scoring.sums_columns(context)
    held = {name: logprob_model(model, context) for name, model in columns.items()}
    holders: list[Holder] = [*held.values(), *rewards.scorers.values()]
    steps = {f"log-probabilities of {columns[name]}": sums_work(name, held[name], holders, parts) for name in held}
    groups = _groups(settings.reward)
    for step, names in groups.items():
        steps[step] = rewards_work(rewards, names, holders, parts, combine=step == LAST and combine is None)
    counts: Counter[str] = Counter()
    try:
        in_parts(
            lambda: read_records(data, require=require),
            output,
            steps,
            {**_scores_depend_on(settings, scoring, context), "log-probabilities": list(columns)},
            part_size=SCORING_PART,
            overwrite=overwrite,
            counts=counts,
            total=count_records(data),
            finish=combine,
            elsewhere=_elsewhere(pool, columns, groups, context, rewards),
        )
    finally:
        release(holders)
    if counts:
        log.info(describe_counts(counts))


LAST = "score"  # the step that asks the last rewards


def _elsewhere(
    pool: Pool | None,
    columns: Mapping[str, str],
    groups: Mapping[str, list[str]],
    context: RewardContext,
    rewards: Rewards,
) -> Elsewhere | None:
    """The steps that other processes can do."""
    if pool is None:
        return None
    context = replace(context, journals=None)  # they may not see this disk
    away: dict[str, Away] = {
        f"log-probabilities of {model}": sums_away(name, model, context) for name, model in columns.items()
    }
    for step, names in groups.items():
        if not any(map(stays, names)):
            combines = step == LAST and not rewards.combination.over_the_data
            away[step] = rewards_away(names, context, rewards.combination if combines else None)
    return Elsewhere(pool, away)


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Step → the rewards that it asks: at most one in each may hold a model or a server, or stays here."""
    heavy = [name for name in names if may_hold_a_model(name) or stays(name)]
    light = [name for name in names if name not in heavy]
    return {**{f"score by {name}": [name] for name in heavy[:-1]}, LAST: [*heavy[-1:], *light]}


def _scores_depend_on(settings: RewardSettings, scoring: ScoringSettings, context: RewardContext) -> dict[str, object]:
    """What scores depend on. On which device, and how many at a time, they are computed is none of it.

    A model counts by the digest in its column's name, not by where it lies.
    """
    unread = ("device", "max_tokens_per_forward", "model", "reference_model")
    values = {**asdict(settings), **asdict(scoring), **asdict(context.text), **rewards_digests(settings, context)}
    return {name: value for name, value in values.items() if name not in unread}
