"""rrhf reproduce: the paper's systems and their rivals as one table; run again, or in several processes, it goes on."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf.cli.parser import PlainParser
from rrhf.common.errors import UserError
from rrhf.common.remote import origin

if TYPE_CHECKING:
    from rrhf.recipes.reproduce.place import Place


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    from rrhf.common.logging import set_up_logging
    from rrhf.recipes.reproduce.arms import arms_named
    from rrhf.recipes.reproduce.page import write_page
    from rrhf.recipes.reproduce.place import Place
    from rrhf.recipes.reproduce.scale import read_scale
    from rrhf.recipes.reproduce.work import Table, check, prepare, work_through
    from rrhf.training.callbacks import Stopped

    if options.check:
        _refuse_beside_check(options, parser)
        return _check(options.task, options.check, options.output)
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: must be at least 1")
    if options.learning_rate is not None and not 0 < options.learning_rate < math.inf:
        raise UserError(f"--learning_rate {options.learning_rate:g}: must be a number above 0")
    data = [f"data.source={options.data}"] if options.data else []
    model = [f"model={options.model}"] if options.model else []
    scale = read_scale(options.task, options.scale, [*data, *model, *options.overrides])
    names = scale.default_arms if options.arms is None else options.arms.split(",")
    rates = [options.learning_rate] if options.learning_rate else scale.learning_rates
    arms = arms_named(options.task, names)
    table = Table(arms, options.seeds, rates, scale.first_seed, options.every_rate, scale.rate_seeds)
    place = Place(Path(options.output or f"runs/reproduce-{options.task}-{Path(options.scale).stem}"))
    if options.export:
        return _export(place, Path(options.export))
    if options.page and not options.take and not place.folder.exists():
        raise UserError(f"--page: {origin(place.folder)}: no such folder: give the --output that arms were run in")
    if not options.page:
        check(place, scale, table)  # mistyped keys are not to cost the training of a model
    set_up_logging(place.log)
    if options.take:
        from rrhf.recipes.study.results import take

        take(Path(options.take), place, scale)
    if not options.page:
        scale = prepare(place, scale)
    try:
        if not options.page:
            work_through(place, scale, table)
    except Stopped as stopped:
        print("rrhf reproduce: stopped; the same command goes on from there", file=sys.stderr)
        return stopped.code
    finally:
        page = write_page(place, scale, table)
    print(f"page: {page} (and {page.with_suffix('.md').name})")
    return 0


def _export(place: Place, file: Path) -> int:
    """Add the results that have ended to a file of lines."""
    from rrhf.recipes.study.results import export

    results = place.results()
    if not results:
        raise UserError(f"{place.folder}: no arm has ended there: nothing to export")
    print(f"{origin(file)}: {export(results, place.folder, file)} results")
    return 0


def _refuse_beside_check(options: Namespace, parser: PlainParser) -> None:
    """Refuse settings that ``--check`` would ignore."""
    shown = {"overrides": "section.key=value"}
    beside = [shown.get(flag, f"--{flag}") for flag, value in vars(options).items()
              if flag not in ("task", "check", "output") and value != parser.get_default(flag)]  # fmt: skip
    if beside:
        raise UserError(
            f"--check runs an arm again as its result says it was run, without {', '.join(beside)}: leave that out"
        )


def _check(task: str, file: str, output: str | None) -> int:
    """Run the arm of a result again, and print whether it comes out within the result's intervals."""
    from rrhf.common.logging import set_up_logging
    from rrhf.recipes.reproduce.check import read_result, run_again
    from rrhf.recipes.reproduce.place import Place
    from rrhf.training.callbacks import Stopped

    before = read_result(file)
    if before["task"] != task:
        raise UserError(f"--check {file}: is a result of {before['task']}, not of {task}")
    set_up_logging()
    try:
        _, sentence = run_again(Place(Path(output or f"runs/check-{before['arm']}-seed-{before['seed']}")), before)
    except Stopped as stopped:
        print("rrhf reproduce: stopped; the same command goes on from there", file=sys.stderr)
        return stopped.code
    print(sentence)
    return 0


def _parser() -> PlainParser:
    parser = PlainParser("reproduce", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--output", help="the folder of arms, results and page; default: runs/reproduce-TASK-SCALE")
    files.add_argument("--data", help="where the queries come from, in place of the scale's source")
    files.add_argument("--model", help="ρ, in place of the scale's model")
    what = parser.add_argument_group("what")
    what.add_argument("task", help="imdb, hh or wombat")
    what.add_argument(
        "--scale", default="micro", help="micro (imdb alone), small, full, or a YAML file; default: micro"
    )
    what.add_argument("--arms", help="names with commas between them; default: those of the task and scale; any "
                      "best-of-N and loss:NAME too")  # fmt: skip
    what.add_argument("--seeds", type=int, default=1, help="how many; default: 1")
    what.add_argument("--learning_rate", "--learning-rate", type=float, help="one for all arms; default: each arm's "
                      "best of three on prompts kept for that")  # fmt: skip
    what.add_argument(
        "--every_rate",
        "--every-rate",
        action="store_true",
        help="run every seed at every rate, for comparisons at equal KL; default: later seeds run the best",
    )
    what.add_argument("--page", action="store_true", help="write the page of what has ended, and do nothing else")
    what.add_argument("--export", metavar="FILE.jsonl", help="add the results that have ended to a file of lines, "
                      "without absolute paths, for the page of claims (python -m rrhf.recipes.study)")  # fmt: skip
    what.add_argument("--take", metavar="FILE.jsonl", help="begin with the results of such a file, which are not "
                      "computed again")  # fmt: skip
    what.add_argument("--check", metavar="RESULT", help="a file of results/, or FILE.jsonl:LINE: run its arm again, "
                      "and say whether it comes out within the intervals there")  # fmt: skip
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "overrides", nargs="*", default=[], help="section.key=value, laid over the scale's configuration"
    )
    return parser
