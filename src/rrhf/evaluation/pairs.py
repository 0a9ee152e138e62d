"""Accuracy as a reward model: how often what people prefer scores higher (Table 5 of arXiv 2304.05302).

A record's own ``scores`` say which of its responses are better. Judged are policies, by p_i (Eq. 1), and any reward.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rrhf.common.errors import UserError
from rrhf.common.presentation import describe_counts
from rrhf.common.remote import origin
from rrhf.common.scores import score_levels
from rrhf.evaluation.generations import made_of_else, note_made_of
from rrhf.evaluation.metrics import paired_bootstrap
from rrhf.models.load import ModelSettings
from rrhf.records.checksums import checksum_of_records
from rrhf.records.files import read_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.parts import in_parts
from rrhf.records.parts_folder import Work
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.kl import log_ratios
from rrhf.rewards.logprob import LogprobModel, reference_sums_name
from rrhf.rewards.scoring import Rewards, reward_digest
from rrhf.rewards.stage import SCORING_PART
from rrhf.rewards.steps import SORTED_TOGETHER, release

log = logging.getLogger("rrhf")

IMPLICIT = "pi - rho"  # the name of DPO's implicit reward among the judges
MEAN = "logprob"  # what p_i's column is called, with the judge's name behind it


@dataclass(frozen=True)
class Verdict:
    """What a judge's scores make of one record, each between 0 and 1.

    Attributes:
        pairs: the share of pairs, of a better and a worse response, whose better one scores higher; ties count 1/2.
        best: the chance that the response that scores highest is one of the best; ties are drawn.
        every: 1 where each of the best scores above each of the others.
        ties: pairs with equal scores.
    """

    pairs: float
    best: float
    every: float
    ties: int


class Violation(NamedTuple):
    """The most violated pair of a query; see ``most_violated``. ``better`` and ``worse`` are places of responses."""

    better: int
    worse: int
    margin: float
    violated: int
    pairs: int


def verdict(preferred: Sequence[float | None], scores: Sequence[float | None]) -> Verdict | None:
    """Hold a judge's scores of a record's responses against which of them people prefer.

    Args:
        preferred: the record's scores; None takes part in nothing.
        scores: the judge's, likewise.

    Returns:
        None where no pair of a better and a worse response has both scores.
    """
    both = [(a, b) for a, b in zip(preferred, scores, strict=True) if a is not None and b is not None]
    wanted, given = score_levels([a for a, _ in both]), score_levels([b for _, b in both])
    if len(set(wanted)) < 2:
        return None
    pairs = [(given[i], given[j]) for i, j in product(range(len(both)), repeat=2) if wanted[i] > wanted[j]]
    ties = sum(better == worse for better, worse in pairs)
    wins = sum(better > worse for better, worse in pairs)
    top = [wanted[i] == max(wanted) for i in range(len(both)) if given[i] == max(given)]
    best = [level for level, rank in zip(given, wanted, strict=True) if rank == max(wanted)]
    others = [level for level, rank in zip(given, wanted, strict=True) if rank < max(wanted)]
    return Verdict((wins + ties / 2) / len(pairs), sum(top) / len(top), float(min(best) > max(others)), ties)


def accuracy(verdicts: Sequence[Verdict | None], seed: int) -> dict[str, Any]:
    """The mean over records of each share, with its 95 % bootstrap interval over records.

    ``accuracy`` is of pairs, ``best`` and ``every`` as ``Verdict`` says; ``n`` records, ``ties`` pairs in all,
    ``unscored`` records without a pair of scores.
    """
    counted = [each for each in verdicts if each is not None]
    block: dict[str, Any] = {"n": len(counted), "unscored": len(verdicts) - len(counted)}
    if not counted:
        return block
    for name, values in (
        ("accuracy", [each.pairs for each in counted]),
        ("best", [each.best for each in counted]),
        ("every", [each.every for each in counted]),
    ):
        block[name] = paired_bootstrap(values, seed)
    return {**block, "ties": sum(each.ties for each in counted)}


def accuracies(
    records: Sequence[Record], judges: Mapping[str, Callable[[Record], Sequence[float | None]]], seed: int
) -> dict[str, Any]:
    """Each judge's ``accuracy`` over all records and, where they have the column ``subset``, over each of these.

    Where the judges ``rho`` and ``pi`` are among them, ``gain`` is the difference of their accuracies on the same
    records, with its interval.
    """
    subsets = sorted({str(record.extra["subset"]) for record in records if record.extra.get("subset") is not None})
    found = {name: [verdict(record.scores, judge(record)) for record in records] for name, judge in judges.items()}
    result: dict[str, Any] = {}
    for name, verdicts in found.items():
        result[name] = accuracy(verdicts, seed)
        if subsets:
            result[name]["subsets"] = {
                subset: accuracy(
                    [one for one, record in zip(verdicts, records) if str(record.extra.get("subset")) == subset], seed
                )
                for subset in subsets
            }
    if "rho" in found and "pi" in found:
        both = [pair for pair in zip(found["rho"], found["pi"], strict=True) if None not in pair]
        changes = [after.pairs - before.pairs for before, after in both if before is not None and after is not None]
        result["gain"] = paired_bootstrap(changes, seed) if changes else None
    return result


# --- the stage -------------------------------------------------------------------------------------------------------


def evaluate_pairs(
    pairs: str | Path,
    output: Path,
    models: Mapping[str, ModelSettings],
    rewards: Sequence[str],
    context: RewardContext,
    *,
    brought: Collection[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """The accuracy of ``models`` and ``rewards`` on preferences.

    The scores are kept beside ``output``, in ``….pairs.jsonl``; a stopped call goes on where it was, and one that was
    stopped later, in other measures, finds them whole. The models are in memory one after another.

    Args:
        pairs: records whose ``scores`` prefer one response to another, or a data set in any known format.
        output: the evaluation's file; it is not written here.
        models: by name; where ``pi`` and ``rho`` are among them, DPO's implicit reward is judged too.
        rewards: names, judged beside the models.
        context: what they need; ``context.seed`` is that of the bootstrap too.
        brought: those of ``models`` whose log-probabilities the records bring: ``pairs`` is what an evaluation by the
            same models kept.
        overwrite: judge anew in any case.

    Raises:
        UserError: nothing is preferred in the data, or a model or reward cannot be used.
    """
    counts: Counter[str] = Counter()
    records = _preferring(load_dataset_records(pairs, counts=counts), counts)
    if not records:
        raise UserError(f"{pairs}: no record prefers a response to another: give scores, or pairs in a known format")
    if counts:
        log.info(f"{pairs}: left out: {describe_counts(counts)}")
    return {"file": origin(pairs), **_judge(records, output, models, rewards, context, brought, overwrite)}


def kept_scores(output: Path) -> Path:
    """Where ``evaluate_pairs`` keeps the judges' scores of every response."""
    return output.with_name(f"{output.stem}.pairs.jsonl")


def rank_samples(
    samples: Path, output: Path, models: Mapping[str, ModelSettings], context: RewardContext, most: int
) -> dict[str, Any] | None:
    """As ``evaluate_pairs``, without rewards, of training samples: whether ρ and π order them as their scores do.

    Args:
        samples: scored records; of those that have a pair, ``most`` are taken, evenly spread over the file.
        most: how many.

    Returns:
        None where no record has a pair.
    """
    records = _preferring(read_records(samples, "scores", "drop"), Counter())
    if not records or most < 1:
        return None
    step = max(1.0, len(records) / most)
    kept = [records[int(number * step)] for number in range(min(most, len(records)))]
    return {"file": samples.name, "of": len(records), **_judge(kept, output, models, [], context)}


def most_violated(scores: Sequence[float | None], logprobs: Sequence[float | None]) -> Violation | None:
    """The pair (better, worse) by ``scores`` whose worse response has the most log-probability above the better one's.

    Args:
        scores: r_i of a query's responses; None takes part in nothing.
        logprobs: p_i (Eq. 1), likewise.

    Returns:
        None where no pair has both. ``margin`` is p_worse − p_better in nats a token: what the hinge of Eq. 2 makes the
        policy pay, and at most 0 where no pair is violated; ``violated`` of ``pairs`` are above 0.
    """
    known = [i for i, (r, p) in enumerate(zip(scores, logprobs, strict=True)) if r is not None and p is not None]
    levels = dict(zip(known, score_levels(r for i in known if (r := scores[i]) is not None), strict=True))
    margins = {
        (i, j): p_worse - p_better
        for i, j in product(known, repeat=2)
        if levels[i] > levels[j] and (p_worse := logprobs[j]) is not None and (p_better := logprobs[i]) is not None
    }
    if not margins:
        return None
    better, worse = max(margins, key=lambda pair: margins[pair])
    violated = sum(margin > 0 for margin in margins.values())
    return Violation(better, worse, margins[better, worse], violated, len(margins))


def _judge(
    records: list[Record],
    output: Path,
    models: Mapping[str, ModelSettings],
    rewards: Sequence[str],
    context: RewardContext,
    brought: Collection[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """The accuracies on ``records``, whose scores by each judge are kept beside ``output``."""
    place = kept_scores(output)
    context = replace(context, journals=place.with_name(f"{place.name}.parts"))
    columns = {
        name: reference_sums_name(model.model, context.text, context.max_length) for name, model in models.items()
    }
    held = {name: _model(model, context) for name, model in models.items() if name not in brought}
    asked = Rewards(rewards, context=context) if rewards else None
    steps = {f"log-probabilities of {name}": _by_model(name, columns[name], held) for name in held}
    if asked is not None:
        steps["rewards"] = _by_rewards(asked, held)
    depends_on = {
        "columns": columns,
        "dtype": context.dtype,
        **{f"the code of {reward}": reward_digest(reward, context) for reward in rewards},
    }
    made_of = json.loads(json.dumps({**depends_on, "records": checksum_of_records(records)}))
    if overwrite or not place.exists() or made_of_else(place, made_of):
        try:
            # A file that stands there is of an earlier evaluation; parts that were made of the same are taken up.
            in_parts(
                lambda: records, place, steps, depends_on,
                part_size=SCORING_PART, overwrite=True, total=len(records),
            )  # fmt: skip
        finally:
            release(held.values())
            if asked is not None:
                asked.close()
        note_made_of(place, made_of)
    judges = _judges(columns, rewards)
    return accuracies(list(read_records(place)), judges, context.seed)


def _preferring(records: Iterable[Record], counts: Counter[str]) -> list[Record]:
    """The records that prefer a response to another; ``counts`` is told how many do not."""
    kept = []
    for record in records:
        if record.scores and verdict(record.scores, record.scores) is not None:
            kept.append(record)
        else:
            counts["no response preferred to another"] += 1
    return kept


def _model(model: ModelSettings, context: RewardContext) -> LogprobModel:
    limits = {"max_length": context.max_length, "max_tokens_per_forward": context.max_tokens_per_forward}
    return LogprobModel(model, context.text, **limits)


def _by_model(name: str, column: str, held: Mapping[str, LogprobModel]) -> Work:
    """Adds p_i of the responses under a model, and the sums, from one pass."""

    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        release(held.values(), [held[name]])
        for start in range(0, len(block), SORTED_TOGETHER):
            batch = block[start : start + SORTED_TOGETHER]
            found = iter(held[name]([(record, index) for record in batch for index in range(len(record.responses))]))
            for record in batch:
                own = [next(found) for _ in record.responses]
                added = {
                    f"{MEAN} {name}": [each and each.sum / each.length for each in own],
                    column: [each and each.sum for each in own],
                }
                yield replace(record, rewards={**record.rewards, **added})
                done(1)

    return work


def _by_rewards(asked: Rewards, held: Mapping[str, LogprobModel]) -> Work:
    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        release(held.values())
        for record in asked.judge(block):
            yield record
            done(1)

    return work


def _judges(
    columns: Mapping[str, str], rewards: Sequence[str]
) -> dict[str, Callable[[Record], Sequence[float | None]]]:
    """What each judge says of a record's responses."""
    judges: dict[str, Callable[[Record], Sequence[float | None]]] = {
        name: partial(_column, f"{MEAN} {name}") for name in columns
    }
    if "rho" in columns and "pi" in columns:
        judges[IMPLICIT] = lambda record: log_ratios(record.rewards[columns["pi"]], record.rewards[columns["rho"]])
    return judges | {reward: partial(_column, reward) for reward in rewards}


def _column(name: str, record: Record) -> Sequence[float | None]:
    return record.rewards[name]
