"""rrhf run: a whole run in a folder, from one configuration; run again to resume."""

from __future__ import annotations

import sys
from pathlib import Path

from rrhf.cli.parser import PlainParser


def main(arguments: list[str]) -> int:
    parser = PlainParser("run", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "config",
        help="a YAML file, or the name of a shipped configuration; NAME+ABLATION lays an ablation over it",
    )
    files.add_argument("--output", required=True, help="the run folder")
    settings = parser.add_argument_group("settings")
    settings.add_argument("overrides", nargs="*", help="section.key=value, laid over the configuration")
    options = parser.parse_intermixed_args(arguments)
    return execute(options.config, options.overrides, Path(options.output))


def execute(config: str, overrides: list[str], output: Path) -> int:
    """Run a configuration in a folder and print what it came to."""
    import json

    from rrhf.common.files import inside
    from rrhf.common.logging import set_up_logging
    from rrhf.recipes.config import override, parse_config, read_config
    from rrhf.recipes.recipe import run_recipe
    from rrhf.recipes.run_folder import RunFolder
    from rrhf.report.terminal import format_evaluation, format_examples, format_timings
    from rrhf.rewards.scoring import score_records
    from rrhf.rewards.stage import opened_rewards
    from rrhf.training.callbacks import Stopped

    run = RunFolder(output)
    values = override(read_config(config), overrides)
    settings = parse_config(values, run.model)
    context = settings.scoring.context(settings.text)  # an unknown reward or model is refused before any work
    opened_rewards(settings.score, settings.scoring, context)
    score_records([], settings.evaluate_rewards.reward, context=context)
    with run.alone():
        run.remember_config(values)
        set_up_logging(run.log)
        try:
            evaluation = run_recipe(run, settings)
        except Stopped as stopped:
            print(f"rrhf run: {stopped}", file=sys.stderr)
            return stopped.code
    generations = inside(output, evaluation["generations"]).read_text(encoding="utf-8").splitlines()
    print()
    print(format_evaluation(evaluation))
    print(format_timings(json.loads(run.timings.read_text(encoding="utf-8"))))
    print()
    print(format_examples([json.loads(line) for line in generations]))
    print()
    print(f"report: {run.report}")
    return 0
