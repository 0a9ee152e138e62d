"""Put one or several runs on one page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.presentation import finite, short_name, typeset_number
from rrhf.report import charts, plots, rows
from rrhf.report.alarms import run_alarms, watched
from rrhf.report.load import load_run, run_names, with_rounds
from rrhf.report.results import Results, interval, read_results
from rrhf.report.run import Generation, Run
from rrhf.report.tables import MEASURES, MODELS, phrases

MAX_ROWS = 500  # before/after texts on the page, all runs together, and half as many pairs
TEXT_BUDGET = 2_400_000  # bytes of these texts, all runs together: with them a page stays under 5 MB

DASH_ARRAYS = ("", "5 3", "2 2", "7 3 2 3")  # as plots.RUN_DASHES, for the legend in the page


def verdict(run: Run) -> tuple[int | None, str]:
    """Say what came of a run in one sentence, with its interval and with what the interval allows to say.

    Returns:
        +1, 0 or −1 as the interval of the main reward's gain lies above, around or below 0 (None: not measured), and
        the sentence.
    """
    measured = rows.gains(run)
    if not measured:
        return None, f"The gain of π over ρ is not known yet: {run.missing.get('evaluation', 'no gain was measured')}."
    main, *others = measured
    prompts = (run.evaluation.get("pi") or {}).get("n")
    some = main.n is not None and main.n < (finite(prompts) or 0)  # the reward left out a text of the others
    where = f"on {prompts} held-out prompts" if prompts else "on the held-out prompts"
    if some:
        where = f"on the {main.n:.0f} of {prompts} held-out prompts where it scored both"
    readings = {
        1: "π earns more than ρ",
        0: "no gain of π over ρ is shown, the interval includes 0,",
        -1: "π earns less than ρ",
    }
    pi, rho = typeset_number(main.pi.get("mean")), typeset_number(main.rho.get("mean"))
    means = "" if some else f"a mean reward of {pi} against {rho}, "  # which are of all texts that it scored
    sentence = f"By {short_name(main.reward)}, {readings[main.side]} {where}: {means}a gain of {main.text}"
    for other in others:
        also = "also " if other.side == main.side and main.side else ""
        sentence += f"; by {short_name(other.reward)}, {other.text}, which {also}{other.long_reading}"
    return main.side, f"{sentence}."


def _texts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The before/after texts with the main reward on both sides, its gain, and the other rewards."""

    def row(run: Run, texts: Generation) -> dict[str, Any]:
        before, after = (side.get(run.main_reward or "") for side in (texts.rho_rewards, texts.pi_rewards))
        gain = None if before is None or after is None else after - before
        others = [
            (short_name(name), texts.rho_rewards.get(name), texts.pi_rewards.get(name))
            for name in texts.pi_rewards
            if name != run.main_reward
        ]
        return {"run": run.name, "texts": texts, "before": before, "after": after, "gain": gain, "others": others}

    return [row(run, texts) for run in runs for texts in run.generations]


def _missing(runs: Sequence[Run], *parts: str) -> list[str]:
    """What is missing for some parts of the page, with the run's name where there are several."""
    named = [(run.name, run.missing[part]) for run in runs for part in parts if part in run.missing]
    return [f"{name}: {what}" if len(runs) > 1 else what for name, what in named]


def _csp_hash(script: str) -> str:
    """The hash under which a content security policy lets this one script run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Any:
    """jinja2 with the page's filters; kept, because reading the templates takes as long as several charts."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=typeset_number, csp_hash=_csp_hash, short_name=short_name, interval=interval)
    environment.tests["finite"] = lambda value: finite(value) is not None
    return environment


def render(runs: Sequence[Run], results: Results | None = None) -> str:
    """Return the page as HTML. Everything that comes from a run is escaped."""
    results = results or Results()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=f"RRHF run {runs[0].name}" if len(runs) == 1 else f"RRHF: {len(runs)} runs compared",
            runs=runs,
            several=len(runs) > 1,
            models=MODELS,
            measures=MEASURES,
            missing=lambda *parts: _missing(runs, *parts),
            results=results,
            **_summary(runs),
            **_numbers(runs, results),
            **_charts(runs),
            texts=_texts(runs),
        )
    )


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What stands at the top and at the end: what was run, what came of it, what it warns of."""
    facts = {run.name: rows.facts(run) for run in runs}
    stages = list(dict.fromkeys(stage for run in runs for stage in run.timings))
    verdicts = [(run.name, *verdict(run)) for run in runs]
    known = [one for one in verdicts if one[1] is not None]
    return {
        "facts": facts,
        "fact_names": list(dict.fromkeys(name for of_run in facts.values() for name in of_run)),
        "verdicts": known or verdicts,
        "not_evaluated": [] if not known else [one for one in verdicts if one[1] is None],
        "alarms": [(run.name, alarm) for run in runs for alarm in run_alarms(run)],
        "watched": {run.name: watched(run) for run in runs},
        "settings": rows.settings_rows(runs),
        "environment": rows.environment_rows(runs),
        "fingerprints": rows.fingerprint_rows(runs),
        "stages": stages,
        "longest": max((run.timings[s] for run in runs for s in run.timings), default=0) or 1,
    }


def _numbers(runs: Sequence[Run], results: Results) -> dict[str, Any]:
    """The tables of numbers."""
    return {
        "result_rows": rows.result_rows(runs),
        "forest": rows.forest([gain for run in runs for gain in rows.gains(run)]),
        "versus": rows.forest(rows.versus(runs)),
        "matched": rows.matched(runs),
        "accuracy": rows.accuracy_rows(runs, results),
        "agreement": rows.agreement_rows(runs),
        "phrases": [(run.name, found) for run in runs if (found := phrases(run.evaluation))],
    }


def _charts(runs: Sequence[Run]) -> dict[str, Any]:
    legend = [
        (run.name, plots.RUN_COLOURS[i % len(plots.RUN_COLOURS)], DASH_ARRAYS[i % len(DASH_ARRAYS)])
        for i, run in enumerate(runs)
    ]
    return {
        "legend": legend,
        "curves": charts.curves(runs),
        "loss_and_reward": charts.loss_and_reward(runs),
        "histograms": charts.histograms(runs),
        "best_of_n": [*charts.best_of_n(runs), *charts.best_curves(runs)],
        "source_charts": charts.sources(runs),
        "window_charts": charts.windows(runs),
    }


def write_report(run_folders: Sequence[str | Path], output: str | Path, results: Sequence[str | Path] = ()) -> None:
    """Write one self-contained HTML page on one run, or on several side by side.

    The page needs no network, holds all its styles, scripts and plots, and is the same bytes for the same runs. Parts
    whose files are missing are left out with a note. Of the texts a stratified part is shown (``report.choice``) where
    all would make the page heavier than 5 MB; the numbers are of all of them.

    Args:
        run_folders: folders written by ``rrhf run``, finished or not, or by ``rrhf train`` or ``rrhf baseline``; a run
            in rounds stands for its rounds.
        output: the HTML file; replaced whole if it exists.
        results: files of other commands that are shown beside the runs: see ``report.results``.

    Raises:
        UserError: no folder is given, one is no run folder, or a file cannot be read.
    """
    folders = with_rounds([Path(folder) for folder in run_folders])
    if not folders:
        raise UserError("no run folder given: name at least one folder written by `rrhf run`")
    beside = read_results(results)
    share, budget = max(1, MAX_ROWS // len(folders)), TEXT_BUDGET // len(folders)
    runs = [load_run(folder, name, share, budget) for folder, name in zip(folders, run_names(folders))]
    write_text(output, render(runs, beside))
