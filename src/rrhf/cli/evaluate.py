"""rrhf evaluate: measure a model on held-out prompts, or two models on the same ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rrhf.cli.parser import show_help
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.files import refuse_existing, write_text
from rrhf.common.flag_help import Groups, flags_of, without
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.evaluation.pairs import evaluate_pairs
from rrhf.evaluation.stage import REFUSED, EvaluationSettings, evaluate_models, refuse_unusable, reward_context
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.report.terminal import format_accuracies, format_evaluation
from rrhf.rewards.scoring import NEW_FORMS
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Files:
    output: str = field(metadata={"help": "where the numbers go (.json); generations are written beside it"})
    data: str | None = field(default=None, metadata={"help": "records with held-out queries"})
    pairs: str | None = field(
        default=None,
        metadata={"help": "records with scores, or a preference data set in a known format, RewardBench too: the "
                  "accuracy of ρ, π and the rewards on them; with or without --data"},
    )  # fmt: skip
    reference_model: str | None = field(default=None, metadata={"help": "ρ: the model the gain is measured against"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


@dataclass(frozen=True)
class EvaluatedRewards(RewardSettings):
    """``--reward`` is not needed where only ``--pairs`` are looked at."""

    reward: list[str] = field(
        default_factory=list, metadata={"help": f"one of {', '.join(NEW_FORMS)}; several are shown apart", "nargs": "+"}
    )


def short_help() -> Groups:
    return {
        "files": flags_of(Files),
        "model": flags_of(ModelSettings),
        "rewards": without(flags_of(EvaluatedRewards), REFUSED),
        "other measures": flags_of(EvaluationSettings),
        "sampling": without(flags_of(SamplingSettings), REFUSED),
        "text": flags_of(TextSettings),
        "judges, and what they may cost": flags_of(EndpointLimits),
    }


def flags() -> Flags:
    kinds = [ModelSettings, Files, EvaluatedRewards, SamplingSettings, TextSettings, EvaluationSettings, EndpointLimits]
    return Flags(kinds, "evaluate")


def main(arguments: list[str]) -> None:
    show_help(arguments, "evaluate", __doc__, short_help())
    model, files, reward, sampling, text, settings, remote = flags().parse(arguments)
    set_up_logging()
    refuse_existing(files.output, files.overwrite)
    models = {"pi": model}
    if files.reference_model:
        models = {"rho": replace(model, model=files.reference_model), "pi": model}
    if not files.data and not files.pairs:
        raise UserError("nothing to evaluate on: give --data FILE with held-out queries, or --pairs FILE")
    if files.data and not reward.reward:
        raise UserError(f"--data needs a reward: give --reward, one of {', '.join(NEW_FORMS)}")
    output = Path(files.output)
    context = reward_context(model, sampling, text, settings, remote, files.reference_model)
    if reward.reward or reward.reward_weights or sampling.num_responses is not None:
        refuse_unusable(reward, sampling, context)  # before the pairs are read and judged
    result: dict[str, Any] = {}
    if files.pairs:
        result["accuracy"] = evaluate_pairs(
            files.pairs, output, models, reward.reward, context, overwrite=files.overwrite
        )
        print(format_accuracies(result["accuracy"]))
    if files.data:
        result = evaluate_models(
            Path(files.data), output, models, reward, sampling, text, settings,
            context=context, overwrite=files.overwrite, more=result,
        )  # fmt: skip
        print(format_evaluation(result))
    else:
        write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
