"""rrhf judge: compare two systems' answers to the same questions, by one judge or several, in both orders."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.cli.parser import show_help
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.files import refuse_existing, write_text
from rrhf.common.flag_help import Groups, flags_of
from rrhf.common.flags import Flags
from rrhf.common.imports import of_extra
from rrhf.common.logging import set_up_logging
from rrhf.common.presentation import number, rate, text_table
from rrhf.common.remote import origin


@dataclass(frozen=True)
class Settings:
    questions: str = field(
        metadata={"help": "records, or questions in Vicuna's layout, with a category each or without"}
    )
    a: str = field(
        metadata={
            "help": "records with the first system's answers (of several responses the first), joined by id, else by "
            "the query"
        }
    )
    b: str = field(metadata={"help": "records with the second system's answers"})
    judge: list[str] = field(
        metadata={"help": "a judge's file (see docs/judging.md); several are compared", "nargs": "+"}
    )
    output: str = field(
        metadata={"help": "where the numbers go (.json); what was said of each question: ….comparisons.jsonl"}
    )
    seed: int = field(default=0, metadata={"help": "of requests and of the bootstraps over questions"})
    samples: int = field(default=500, metadata={"help": "resamples of the bootstrap at equal length, at least 1"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})


def short_help() -> Groups:
    return {"files": flags_of(Settings), "the judges' servers, and what they may cost": flags_of(EndpointLimits)}


def flags() -> Flags:
    return Flags([Settings, EndpointLimits], "judge")


def main(arguments: list[str]) -> None:
    show_help(arguments, "judge", __doc__, short_help())
    settings, limits = flags().parse(arguments)
    set_up_logging()
    refuse_existing(settings.output, settings.overwrite)
    if settings.samples < 1:
        raise UserError(f"--samples {settings.samples}: must be at least 1")
    if len(set(settings.judge)) < len(settings.judge):
        raise UserError("--judge: a file is named twice")
    from rrhf.evaluation.agreement import MISSING
    from rrhf.evaluation.pairwise.judging import comparison_records, judge_pair
    from rrhf.evaluation.pairwise.questions import answers_of_both, read_questions
    from rrhf.records.files import write_records
    from rrhf.rewards.judges.reward import open_judge

    for module in ("sklearn.linear_model", "choix"):
        of_extra(module, MISSING)  # found missing here, and not when all replies are paid for
    questions = read_questions(Path(settings.questions))
    a, b = answers_of_both(questions, Path(settings.a), Path(settings.b))
    judges = {origin(name): open_judge(name, limits, settings.seed) for name in settings.judge}
    result = {"a": origin(settings.a), "b": origin(settings.b), "seed": settings.seed}
    numbers, said = judge_pair(judges, questions, a, b, seed=settings.seed, samples=settings.samples)
    result |= numbers
    # One that stands there is of a command that was stopped here: the numbers, which are refused above, come last.
    each = Path(settings.output).with_suffix(".comparisons.jsonl")
    write_records(each, comparison_records(questions, a, b, said), overwrite=True)
    write_text(settings.output, json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    print(format_result(result))


def format_result(result: dict[str, Any]) -> str:
    """The numbers that a judged comparison is never told without, a judge a paragraph."""
    lines = [f"a: {result['a']}, b: {result['b']}, {result['questions']} questions"]
    for name, said in result["judges"].items():
        lines += [f"{name}: {said['replies']}"]
        if not said["n"]:
            lines += ["  no question was judged in both orders"]
            continue
        sums = said["summed_scores"]
        apart = " to ".join(number(sums["difference"][end], 1, sign=True) for end in ("low", "high"))
        lines += [
            f"  a wins {said['win']}, ties {said['tie']}, loses {said['lose']}; {said['unjudged']} not judged",
            f"  win rate {rate(said['win_rate'])}",
            f"  win rate at equal length {rate(said['length_controlled_win_rate'])}",
            f"  summed scores {number(sums['a'], 1)} – {number(sums['b'], 1)}, "
            f"{number(sums['difference']['mean'], 1, sign=True)} ({apart}) for a",
            f"  the two orders contradict each other on {rate(said['position_flip_rate'])}; "
            f"the first answer shown wins {rate(said['first_position_win_rate'])}",
            f"  control: a constant answer in a's place wins {rate(said['null_model']['win_rate'])}",
        ]
        if said["categories"]:
            lines += [_categories(said["categories"])]
    for pair, found in result["agreement"].items():
        lines += [
            f"{pair}: same outcome on {rate(found['same'])} of {found['n']}, no contradiction on "
            f"{rate(found['not_contradicting'])}, kappa {number(found['kappa'], 2)}"
        ]
    return "\n".join(lines)


def _categories(categories: dict[str, Any]) -> str:
    header = ("category", "n", "win", "tie", "lose", "win rate", "summed scores")
    rows = []
    for name, said in categories.items():
        counts = [str(said[key]) for key in ("n", "win", "tie", "lose")]
        sums = " – ".join(number(said["summed_scores"][system], 1) for system in "ab")
        rows.append((name, *counts, rate(said["win_rate"]), sums))
    return text_table(header, rows, indent="  ")
