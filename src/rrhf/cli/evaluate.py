"""rrhf evaluate: measure a model on held-out prompts, or two models on the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rrhf.cli.parser import show_help
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.files import refuse_existing
from rrhf.common.flag_help import Groups, flags_of
from rrhf.common.flags import Flags
from rrhf.common.logging import set_up_logging
from rrhf.evaluation.stage import EvaluationSettings, evaluate_models, reward_context
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.report.terminal import format_evaluation
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "records with held-out queries"})
    output: str = field(metadata={"help": "where the numbers go (.json); generations are written beside it"})
    reference_model: str | None = field(default=None, metadata={"help": "ρ: the model the gain is measured against"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


def short_help() -> Groups:
    return {
        "files": flags_of(Files),
        "model": flags_of(ModelSettings),
        "rewards": flags_of(RewardSettings),
        "other measures": flags_of(EvaluationSettings),
        "sampling": flags_of(SamplingSettings),
        "text": flags_of(TextSettings),
        "judges, and what they may cost": flags_of(EndpointLimits),
    }


def flags() -> Flags:
    kinds = [ModelSettings, Files, RewardSettings, SamplingSettings, TextSettings, EvaluationSettings, EndpointLimits]
    return Flags(kinds, "evaluate")


def main(arguments: list[str]) -> None:
    show_help(arguments, "evaluate", __doc__, short_help())
    model, files, reward, sampling, text, settings, remote = flags().parse(arguments)
    set_up_logging()
    refuse_existing(files.output, files.overwrite)
    models = {"pi": model}
    if files.reference_model:
        models = {"rho": replace(model, model=files.reference_model), "pi": model}
    output = Path(files.output)
    context = reward_context(model, sampling, text, settings, remote, files.reference_model)
    result = evaluate_models(
        Path(files.data), output, models, reward, sampling, text, settings, context=context, overwrite=files.overwrite
    )
    print(format_evaluation(result))
