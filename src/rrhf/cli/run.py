"""rrhf run: a whole run in a folder, from one configuration; run again to resume."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.cli.parser import PlainParser, add_flags
from rrhf.cluster.settings import ClusterSettings

if TYPE_CHECKING:
    from rrhf.recipes.config import RunConfig


def main(arguments: list[str]) -> int:
    parser = PlainParser("run", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "config",
        help="a YAML file, or the name of a shipped configuration; NAME+ABLATION lays an ablation over it",
    )
    files.add_argument("--output", help="the run folder; --dry_run needs none")
    add_flags(parser.add_argument_group("on a cluster"), ClusterSettings)
    settings = parser.add_argument_group("settings")
    settings.add_argument("overrides", nargs="*", default=[], help="section.key=value, laid over the configuration")
    settings.add_argument(
        "--dry_run", "--dry-run", action="store_true",
        help="print each stage's tokens, bytes, requests and machine hours, and do nothing",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    cluster = ClusterSettings(**{field.name: getattr(options, field.name) for field in fields(ClusterSettings)})
    if options.dry_run:
        return show_estimate(options.config, options.overrides)
    if not options.output:
        parser.error("the following arguments are required: --output")
    return execute(options.config, options.overrides, Path(options.output), cluster)


def show_estimate(config: str, overrides: list[str]) -> int:
    """Print what a run will come to."""
    from rrhf.recipes.estimate import estimate_run
    from rrhf.recipes.offline import check_loss

    settings = checked(config, overrides, Path("model"))[1]
    _refuse_unusable(settings)
    check_loss(settings)
    print(estimate_run(settings).table())
    return 0


def checked(config: str, overrides: list[str], model: Path) -> tuple[dict[str, Any], RunConfig]:
    """A configuration with the overrides laid over it, as written and parsed."""
    from rrhf.recipes.config import override, parse_config, read_config

    values = override(read_config(config), overrides)
    return values, parse_config(values, model)


def execute(config: str, overrides: list[str], output: Path, cluster: ClusterSettings | None = None) -> int:
    """Run a configuration in a folder and print what it came to."""
    import json
    from dataclasses import replace

    from rrhf.common.files import inside, json_lines
    from rrhf.common.launch import is_first
    from rrhf.common.logging import set_up_logging
    from rrhf.recipes.recipe import run_recipe
    from rrhf.recipes.run_folder import RunFolder
    from rrhf.report.terminal import format_evaluation, format_examples, format_timings
    from rrhf.training.callbacks import Stopped

    run = RunFolder(output)
    values, parsed = checked(config, overrides, run.model)
    settings = replace(parsed, cluster=cluster or ClusterSettings())
    _refuse_unusable(settings)
    with run.alone():
        run.remember_config(values)
        set_up_logging(run.log)
        try:
            evaluation = run_recipe(run, settings)
        except Stopped as stopped:
            print(f"rrhf run: {stopped}", file=sys.stderr)
            return stopped.code
    if not is_first():
        return 0
    generations = json_lines(inside(output, evaluation["generations"]))
    print()
    print(format_evaluation(evaluation))
    print(format_timings(json.loads(run.timings.read_text(encoding="utf-8"))))
    print()
    print(format_examples(generations))
    print()
    print(f"report: {run.report}")
    return 0


def _refuse_unusable(settings: RunConfig) -> None:
    """Raise ``UserError`` for an unknown reward or model, before any work."""
    from rrhf.rewards.scoring import score_records
    from rrhf.rewards.stage import opened_rewards

    context = settings.scoring.context(settings.text)
    opened_rewards(settings.score, settings.scoring, context)
    score_records([], settings.evaluate_rewards.reward, context=context)
