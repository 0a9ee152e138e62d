"""Best-of-n at inference: n samples a held-out prompt, scored, and the best kept. Nothing is trained.

The folder is that of a run without a model: ``responses.jsonl`` (all samples), ``cut.jsonl`` (as they are scored: cut
where a dialogue opens another turn), ``scored.jsonl``, ``best.jsonl`` (the best alone; of equals, and where nothing is
scored, the first) and ``evaluation.json``, in which ρ is the first sample, π the best of n and ``best_of_n`` the reward
as a function of n.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.launch import is_first
from rrhf.evaluation.best_of_n import best_index, best_of_n_curve
from rrhf.evaluation.metrics import cut_at_turn
from rrhf.evaluation.stage import EvaluationSettings, refuse_unusable
from rrhf.evaluation.texts import Text, evaluate_texts, is_dialogue
from rrhf.models.cache import PolicyCache
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.recipes.offline import Stage, carry_out
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records, require_file, write_records
from rrhf.records.record import Record
from rrhf.report import write_report
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import Rewards
from rrhf.rewards.stage import RewardSettings, ScoringSettings, opened_rewards, rewards_digests, score_file
from rrhf.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class BestOfNSettings:
    """What is measured on the best, beside the reward that chooses it."""

    gold_reward: list[str] = field(
        default_factory=list,
        metadata={"help": "rewards that choose nothing and are measured on what is kept", "nargs": "+"},
    )


@dataclass(frozen=True)
class BestOfN:
    """What is asked for: n is ``sampling.responses``; ``rewards`` choose."""

    data: Path
    output: Path
    model: ModelSettings
    sampling: SamplingSettings
    rewards: RewardSettings
    scoring: ScoringSettings
    text: TextSettings
    remote: EndpointLimits
    evaluation: EvaluationSettings
    settings: BestOfNSettings

    @property
    def context(self) -> RewardContext:
        return self.scoring.context(self.text, self.remote, journals=self.output / "journals")

    @property
    def gold(self) -> RewardSettings:
        return RewardSettings(self.settings.gold_reward)

    def refuse(self) -> None:
        """Refuse, before any work, what has no best of n."""
        require_file(self.data)
        faults = []
        if self.sampling.is_beam:
            faults.append(f"--policy {self.sampling.policy}: beams are no independent samples: take top-p or top-k")
        if self.sampling.responses < 2:
            faults.append(f"--num_responses {self.sampling.responses}: the best of how many? Give at least 2")
        if self.scoring.kl_beta:
            faults.append("--kl_beta: best-of-n chooses by the reward alone, and its KL has a bound: leave it out")
        if faults:
            raise UserError("\n".join(faults))
        measured = RewardSettings([*self.rewards.reward, *self.settings.gold_reward])
        refuse_unusable(measured, replace(self.sampling, num_responses=1), self.context)
        opened_rewards(self.rewards, self.scoring, self.context)  # as many weights and normalisations as rewards

    def as_settings(self) -> dict[str, Any]:
        """Everything that the results depend on, for the folder's config.yaml."""
        parts: dict[str, Any] = {
            "sample": self.sampling, "score": self.rewards, "scoring": self.scoring, "evaluate": self.evaluation,
            "text": self.text, "best_of_n": self.settings,
        }  # fmt: skip
        model = {"model": self.model.model, "dtype": self.model.dtype}
        return {"baseline": "best-of-n", **model, **{name: asdict(part) for name, part in parts.items()}}


def run_best_of_n(asked: BestOfN) -> dict[str, Any]:
    """Sample, score and measure in ``asked.output``; what is complete is not done again.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: samples cannot have a best, or a stage cannot be done, or other settings, or another process, stand
            in the folder.
    """
    asked.refuse()
    run, policies = RunFolder(asked.output), PolicyCache()
    with run.alone():
        run.remember_config(json.loads(json.dumps(asked.as_settings())))
        carry_out(_stages(asked, run, policies), run)
        if is_first():
            with run.timed("report"):
                write_report([run.folder], run.report)
    result: dict[str, Any] = json.loads(run.evaluation.read_text(encoding="utf-8"))
    return result


def _stages(asked: BestOfN, run: RunFolder, policies: PolicyCache) -> list[Stage]:
    from rrhf.sampling.stage import sample_file

    def files(*paths: Path) -> dict[str, str]:
        return {path.name: checksum_of_file(path) for path in paths}

    cut, gold = run.folder / "cut.jsonl", run.folder / "gold.jsonl"

    def sample() -> None:
        prompts = [record.without_responses() for record in read_records(asked.data)]
        sample_file(prompts, run.responses, asked.model, asked.sampling, asked.text, policies=policies, merge=False)

    def score(rewards: RewardSettings, source: Path, output: Path) -> Stage:
        # The sum of gold rewards chooses nothing, so it is not normalised either.
        scoring = asked.scoring if output != gold else replace(asked.scoring, reward_normalisation=["none"])

        def work() -> None:
            policies.release()
            score_file(source, output, rewards, scoring, asked.text, asked.remote, require="query")

        inputs = rewards_digests(rewards, asked.context)
        return Stage(output.stem if output == gold else "score", output, lambda: {**files(source), **inputs}, work)

    scored = gold if asked.settings.gold_reward else run.scored
    model = asked.model.model
    return [
        Stage("sample", run.responses, lambda: {**files(asked.data), model: model_digest(model)}, sample),
        Stage(
            "cut",
            cut,
            lambda: files(run.responses),
            lambda: write_records(cut, _cut(asked, run.responses)),
            shared=False,
        ),
        score(asked.rewards, cut, run.scored),
        *([score(asked.gold, run.scored, gold)] if asked.settings.gold_reward else []),
        Stage(
            "evaluate",
            run.evaluation,
            lambda: {**files(run.scored, scored), "perplexity model": model_digest(_judge(asked))},
            lambda: _evaluate(asked, run, scored, policies),
            shared=False,  # the first process measures for all
        ),
    ]


def _judge(asked: BestOfN) -> str:
    return asked.evaluation.judge({"pi": asked.model})


def _cut(asked: BestOfN, file: Path) -> Iterator[Record]:
    """The records with their samples as an evaluation would see them: cut where a dialogue opens another turn."""
    markers = asked.evaluation.cut_markers
    for record in read_records(file):
        if not is_dialogue(record.query, markers):
            yield record
            continue
        texts = [cut_at_turn(text, markers) for text in record.responses]
        finish = [how if kept == text else "length" for kept, text, how in zip(texts, record.responses, record.finish)]
        yield replace(record, responses=texts, finish=finish)


def _evaluate(asked: BestOfN, run: RunFolder, scored: Path, policies: PolicyCache) -> None:
    from rrhf.evaluation.perplexity import nll_under

    chosen_by = [record.scores for record in read_records(run.scored)]
    records = list(read_records(scored))
    best = [best_index(scores) or 0 for scores in chosen_by]
    kept = [record.keeping([index]) for record, index in zip(records, best)]
    write_records(run.folder / "best.jsonl", kept, overwrite=True)
    names = [*asked.rewards.reward, *asked.settings.gold_reward]
    places = {"rho": [0] * len(records), "pi": best}
    texts = {model: [_text(*place) for place in zip(records, indices)] for model, indices in places.items()}
    rewards = Rewards(names, context=asked.context)
    try:
        result, rows = evaluate_texts(
            [record.without_responses() for record in records],
            texts["rho"],
            texts["pi"],
            rewards,
            perplexity=nll_under(*policies.get(replace(asked.model, model=_judge(asked))), asked.text),
            perplexity_model=_judge(asked),
            seed=asked.sampling.seed,
            cut_markers=asked.evaluation.cut_markers,
            settings={"sampling": asdict(asked.sampling), "models": dict.fromkeys(("rho", "pi"), asked.model.model)},
            generations=f"{run.evaluation.stem}.generations.jsonl",
            known={  # a judge asked about one response alone would be paid again, and may say something else
                model: {name: [r.rewards[name][index] for r, index in zip(records, indices)] for name in names}
                for model, indices in places.items()
            },
        )
    finally:
        rewards.close()
    result["best_of_n"] = _curves(asked, records, chosen_by)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(run.evaluation.with_name(result["generations"]), lines)
    write_text(run.evaluation, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _text(record: Record, index: int) -> Text:
    return record.responses[index], record.finish[index]


def _curves(asked: BestOfN, records: Sequence[Record], scores: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """The score that chooses and every reward, as functions of n: ``evaluation.best_of_n``."""
    names = [*asked.rewards.reward, *asked.settings.gold_reward]
    values = {name: [record.rewards[name] for record in records] for name in names}
    measured: dict[str, Sequence[Sequence[float | None]]] = {"score": scores, **values}
    return {name: best_of_n_curve(scores, of_name, asked.sampling.seed) for name, of_name in measured.items()}
