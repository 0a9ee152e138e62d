"""rrhf baseline best-of-n: n samples a held-out prompt, the best by the reward kept; reward as a function of n."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rrhf.cli.parser import show_help
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.flag_help import Groups, flags_of, settings_in_source, without
from rrhf.common.flags import Flags
from rrhf.common.launch import is_first
from rrhf.common.logging import set_up_logging
from rrhf.evaluation.stage import EvaluationSettings
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.rewards.stage import NewTextRewardSettings, ScoringSettings
from rrhf.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Files:
    data: str = field(metadata={"help": "records with held-out queries"})
    output: str = field(metadata={"help": "the folder of the results; run again to resume"})


def short_help() -> Groups:
    gold = settings_in_source("rrhf.recipes.baselines.best_of_n", "BestOfNSettings")
    groups = {
        "files": flags_of(Files),
        "model": flags_of(ModelSettings),
        "sampling; n is --num_responses": flags_of(SamplingSettings),
        "rewards": [*flags_of(NewTextRewardSettings), *flags_of(gold)],
        "what rewards need": flags_of(ScoringSettings),
        "other measures": flags_of(EvaluationSettings),
        "text": flags_of(TextSettings),
        "judges, and what they may cost": flags_of(EndpointLimits),
    }
    shown: list[str] = []
    for title, flags in groups.items():
        groups[title] = without(flags, shown)
        shown += [flag.name for flag in flags]
    return groups


def main(arguments: list[str], name: str) -> int:
    show_help(arguments, name, __doc__, short_help())
    from rrhf.recipes.baselines.best_of_n import BestOfN, BestOfNSettings, run_best_of_n
    from rrhf.report.terminal import format_best_of_n, format_evaluation

    kinds = [
        Files, NewTextRewardSettings, ScoringSettings, EvaluationSettings, TextSettings, EndpointLimits,
        BestOfNSettings, SamplingSettings, ModelSettings,
    ]  # fmt: skip
    files, rewards, scoring, evaluation, text, remote, settings, sampling, model = Flags(kinds, name).parse(arguments)
    set_up_logging()
    asked = BestOfN(
        Path(files.data), Path(files.output), model, sampling, rewards, scoring, text, remote, evaluation, settings
    )
    result = run_best_of_n(asked)
    if not is_first():
        return 0
    print(format_evaluation(result))
    print(format_best_of_n(result["best_of_n"]))
    return 0
