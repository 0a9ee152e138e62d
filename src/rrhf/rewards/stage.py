"""The scoring stage: a file of responses → a file of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rrhf.records.files import count_records, read_records
from rrhf.records.parts import in_parts
from rrhf.records.record import Record

SCORING_PART = 512  # records in a part


@dataclass(frozen=True)
class RewardSettings:
    """What scores responses."""

    reward: list[str] = field(
        metadata={"help": "pkg.module:function, provided, or provided:NAME; several are summed", "nargs": "+"}
    )
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "one factor a reward; default: 1 each", "nargs": "*"}
    )


def score_file(data: Path, output: Path, settings: RewardSettings, *, overwrite: bool = False) -> None:
    """Score the responses of ``data`` and write the records with ``rewards`` and ``scores`` to ``output``.

    A stopped call goes on where it was, with the same rewards and the same code of theirs.

    Raises:
        UserError: a reward is unknown or fails, ``output`` exists, or unfinished work of other rewards stands there.
    """
    from rrhf.rewards.kind import RewardContext
    from rrhf.rewards.scoring import reward_digest, score_records

    context = RewardContext(records=data)
    weights = settings.reward_weights or None
    score_records([], settings.reward, weights=weights, context=context)  # an unknown reward is refused before any work

    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        for record in score_records(block, settings.reward, weights=weights, context=context):
            yield record
            done(1)

    in_parts(
        lambda: read_records(data, require="responses"),
        output,
        {"score": work},
        {**asdict(settings), **{f"code of {reward}": reward_digest(reward) for reward in settings.reward}},
        part_size=SCORING_PART,
        overwrite=overwrite,
        total=count_records(data),
    )
