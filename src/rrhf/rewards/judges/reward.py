"""The reward ``judge:FILE``: r_i is the sum of the scores that a judge gives a response, aspect by aspect."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rrhf.common.endpoint_settings import EndpointLimits, share_of_process
from rrhf.common.remote import fetched
from rrhf.records.files import read_records
from rrhf.records.record import Record, query_text
from rrhf.rewards.judges.judge import Judge, calls_of
from rrhf.rewards.judges.template import JudgeTemplate, read_template
from rrhf.rewards.kind import Item, RewardContext, RewardKind

log = logging.getLogger("rrhf")


class JudgeScorer:
    """A judge as a ``Scorer``: all responses of a record that are asked for go into one call.

    Args:
        name: the judge's file.
        context: ``remote`` limits what is asked; ``seed`` shuffles the responses.
    """

    def __init__(self, name: str, context: RewardContext) -> None:
        self.name, self.seed = name, context.seed
        self.judge = open_judge(name, context.remote, context.seed, context.alone)
        self.template = self.judge.template

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        groups: dict[int, list[int]] = {}  # a record → the places of its items
        for place, (record, _) in enumerate(items):
            groups.setdefault(id(record), []).append(place)
        asked = [
            (items[places[0]][0], [items[place][0].responses[items[place][1]] for place in places])
            for places in groups.values()
        ]
        calls = list(calls_of(((r.id, query_text(r.query), texts) for r, texts in asked), self.template, self.seed))
        scores: list[float | None] = [None] * len(items)
        for places, found in zip(groups.values(), self.judge.scores(calls), strict=True):
            for place, by_aspect in zip(places, found or []):
                scores[place] = math.fsum(by_aspect.values())
        return scores

    def estimate(self, records: Iterable[Record]) -> dict[str, float | None]:
        """What all responses of ``records`` would cost; see ``Judge.estimate``."""
        items = ((record.id, query_text(record.query), record.responses) for record in records if record.responses)
        return self.judge.estimate(calls_of(items, self.template, self.seed))

    def close(self) -> None:
        """Say what happened."""
        if self.judge.counts["calls"]:
            log.info(f"judge {self.name}: {self.judge.summary()}")


def open_judge(name: str, limits: EndpointLimits, seed: int, alone: bool = False) -> Judge:
    """The judge of a file, ready to be asked within this process's share of ``limits``, or ``alone`` within all.

    Raises:
        UserError: faults of the file, or budgets of less than one for each process.
    """
    template = read_template(fetched(name))
    return Judge(template, limits if alone else share_of_process(limits), _cache_folder(name, template), seed)


def _cache_folder(name: str, template: JudgeTemplate) -> Path:
    """Where a judge's replies are kept, for every command and every output that asks it."""
    return Path(template.cache) if template.cache else fetched(name).with_name(f"{Path(name).name}.replies")


def judge_digest(name: str, context: RewardContext) -> str:
    """A digest of all that a judge is told; which weights stand behind its address nobody knows."""
    content = json.dumps([asdict(read_template(fetched(name))), context.seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def estimate_judge(name: str, records: Iterable[Record], context: RewardContext) -> dict[str, float | None]:
    """What ``judge:NAME`` would ask for on ``records``; see ``Judge.estimate``. Nothing is asked."""
    return JudgeScorer(name, context).estimate(records)


def describe_estimate(rewards: Sequence[str], data: Path, context: RewardContext) -> str:
    """What the judges among ``rewards`` would ask for on a record file, a line each. Nothing is asked."""
    lines = []
    for reward in rewards:
        kind, _, name = reward.partition(":")
        if kind == "judge":
            scorer = JudgeScorer(name, context)
            found = scorer.estimate(read_records(data, require="responses"))
            cost = "the file gives no price"
            if found["cost"] is not None:
                cost = f"${found['cost']:.2f} where each is read at once, ${found['most']:.2f} where all are refused"
                cost += f" as often as they are asked ({scorer.template.tries})"
            kept = f"{found['cached']} of them in the journal"
            if scorer.template.model is None:
                kept = "the journal is not looked at, since the file names no model"
            lines.append(
                f"{reward}: {found['calls']} calls, {kept}; about {found['prompt_tokens']:,} tokens of prompts, at "
                f"most {found['reply_tokens']:,} of replies: {cost}"
            )
    return "\n".join(lines or ["no judge is asked, and nothing is paid for"])


JUDGE = RewardKind(("judge:FILE",), JudgeScorer, judge_digest, stays=True)
