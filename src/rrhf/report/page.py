"""Put one or several runs on one page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.presentation import NONE, finite, short_name, typeset_number
from rrhf.common.svg import inline_svg
from rrhf.report import plots
from rrhf.report.load import Generation, Run, load_run, run_names, setting
from rrhf.report.tables import MEASURES, MODELS, interval_side

MAX_ROWS = 500  # before/after texts on the page, all runs together

DASH_ARRAYS = ("", "5 3", "2 2", "7 3 2 3")  # as plots.RUN_DASHES, for the legend in the page


@dataclass(frozen=True)
class Gain:
    """One reward's gain in one run; ``side`` is +1, 0 or −1 as the interval lies above, around or below 0."""

    run: str
    reward: str
    rho: Mapping[str, Any]
    pi: Mapping[str, Any]
    mean: float
    low: float
    high: float

    @property
    def side(self) -> int:
        return interval_side(self.low, self.high)

    @property
    def reading(self) -> str:
        return {1: "above 0", 0: "includes 0", -1: "below 0"}[self.side]

    @property
    def long_reading(self) -> str:
        return {1: "lies above 0", 0: "includes 0", -1: "lies below 0"}[self.side]

    @property
    def text(self) -> str:
        low, high = typeset_number(self.low, sign=True), typeset_number(self.high, sign=True)
        return f"{typeset_number(self.mean, sign=True)} (95\u00a0% interval {low} to {high})"


def gains(run: Run) -> list[Gain]:
    """List the gains of a run's rewards, the main one first; rewards without an interval are left out."""
    measured = []
    for reward, sides in run.rewards.items():
        gain = sides.get("gain") or (run.evaluation.get("reward_gain") if reward == run.main_reward else None) or {}
        mean, low, high = (finite(gain.get(key)) for key in ("mean", "low", "high"))
        if mean is not None and low is not None and high is not None:
            measured.append(Gain(run.name, reward, sides.get("rho") or {}, sides.get("pi") or {}, mean, low, high))
    return measured


def verdict(run: Run) -> tuple[int | None, str]:
    """Say what came of a run in one sentence, with its interval and with what the interval allows to say.

    Returns:
        +1, 0 or −1 as the interval of the main reward's gain lies above, around or below 0 (None: not measured), and
        the sentence.
    """
    measured = gains(run)
    if not measured:
        return None, f"The gain of π over ρ is not known yet: {run.missing.get('evaluation', 'no gain was measured')}."
    main, *others = measured
    prompts = (run.evaluation.get("pi") or {}).get("n")
    where = f"on {prompts} held-out prompts" if prompts else "on the held-out prompts"
    readings = {
        1: "π earns more than ρ",
        0: "no gain of π over ρ is shown, the interval includes 0,",
        -1: "π earns less than ρ",
    }
    pi, rho = typeset_number(main.pi.get("mean")), typeset_number(main.rho.get("mean"))
    sentence = f"By {short_name(main.reward)}, {readings[main.side]} {where}: a mean reward of {pi} against {rho}, "
    sentence += f"a gain of {main.text}"
    for other in others:
        also = "also " if other.side == main.side and main.side else ""
        sentence += f"; by {short_name(other.reward)}, {other.text}, which {also}{other.long_reading}"
    return main.side, f"{sentence}."


def _facts(run: Run) -> dict[str, str]:
    """Say what was run, from the settings and the evaluation."""
    named = {
        "Model (ρ)": setting(run.settings, "model"),
        "Data": setting(run.settings, "data"),
        "Sampling policy": run.settings.get("sample.source") or run.settings.get("sample.policy"),
        "Reward": " · ".join(run.rewards) or setting(run.settings, "reward"),
        "Perplexity by": run.evaluation.get("perplexity_model"),
        "Seed": run.evaluation.get("seed", setting(run.settings, "seed")),
    }
    return {name: str(value) for name, value in named.items() if value not in (None, "")}


def _settings_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """List the settings as (name, value in each run, whether runs differ), those that differ first."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [(name, [run.settings.get(name, NONE) for run in runs]) for name in names]
    return sorted(((n, v, len(set(v)) > 1) for n, v in rows), key=lambda row: not row[2])


def _forest(rows: Sequence[Gain]) -> list[dict[str, Any]]:
    """Place every gain on one scale that has 0 in it, in per cent of its width."""
    ends = [0.0, *(end for gain in rows for end in (gain.low, gain.high))]
    low, width = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(6 + 88 * (value - low) / width, 2)

    return [
        {"gain": g, "low": place(g.low), "mean": place(g.mean), "high": place(g.high), "zero": place(0)} for g in rows
    ]


def _curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Draw every series that some run logged: (title, svg)."""
    drawn = []
    for name, (title, _) in plots.METRICS.items():
        lines = [plots.series(run.history, name) for run in runs]
        if any(values for _, values in lines):
            svg = inline_svg(lambda f, n=name, s=lines: plots.draw_curves(f.subplots(), s, n), (3.6, 2.4), title)  # type: ignore[misc]
            drawn.append((title, svg))
    return drawn


def _loss_and_reward(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Draw loss and mean reward on two axes, for runs that measured the reward while they trained: (run, svg)."""
    drawn = []
    for run in runs:
        loss, reward = plots.series(run.history, "loss"), plots.series(run.history, "eval_reward_mean")
        if loss[1] and reward[1]:
            label = f"Loss and mean reward through training, {run.name}"
            draw = lambda f, a=loss, b=reward: plots.draw_loss_and_reward(f.subplots(), a, b)  # noqa: E731
            drawn.append((run.name, inline_svg(draw, (5.4, 2.7), label)))
    return drawn


def _histograms(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Draw the rewards of ρ and π: (run, reward, svg)."""
    drawn = []
    for run in runs:
        for reward in sorted(run.values, key=lambda name: name != run.main_reward):
            sides = run.values[reward]
            label = f"Rewards of ρ and π by {reward}, {run.name}"
            draw = lambda f, s=sides: plots.draw_histograms(f.subplots(), s["rho"], s["pi"])  # noqa: E731
            drawn.append((run.name, reward, inline_svg(draw, (4.6, 2.7), label)))
    return drawn


def _best_of_n(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Draw the training samples' mean, std and mean of maxima beside ρ's and π's mean reward: (run, svg)."""
    drawn = []
    for run in runs:
        if run.samples is not None:
            samples = run.samples
            main = run.rewards.get(run.main_reward or "", {})
            rho, pi = (finite((main.get(side) or {}).get("mean")) for side in ("rho", "pi"))
            count = str(samples.most) if samples.fewest == samples.most else f"{samples.fewest}–{samples.most}"
            draw = lambda f, s=samples, r=rho, p=pi, n=count: plots.draw_best_of_n(  # noqa: E731
                f.subplots(), s.mean, s.std, s.mean_max, r, p, n
            )
            drawn.append((run, inline_svg(draw, (5.6, 2.4), f"Best-of-n picture, {run.name}")))
    return drawn


def _texts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """List the before/after texts with the main reward on both sides, its gain, and the other rewards."""

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
    """Say what is missing for some parts of the page, with the run's name where there are several."""
    named = [(run.name, run.missing[part]) for run in runs for part in parts if part in run.missing]
    return [f"{name}: {what}" if len(runs) > 1 else what for name, what in named]


def _csp_hash(script: str) -> str:
    """Return the hash under which a content security policy lets this one script run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML. Everything that comes from a run is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=typeset_number, csp_hash=_csp_hash)

    def safe(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [(*row[:-1], Markup(row[-1])) for row in rows]  # nosec B704 # our own SVG, its label escaped

    stages = list(dict.fromkeys(stage for run in runs for stage in run.timings))
    colours = [
        (run.name, plots.RUN_COLOURS[i % len(plots.RUN_COLOURS)], DASH_ARRAYS[i % len(DASH_ARRAYS)])
        for i, run in enumerate(runs)
    ]
    return environment.get_template("page.html.j2").render(
        title=f"RRHF run {runs[0].name}" if len(runs) == 1 else f"RRHF: {len(runs)} runs compared",
        runs=runs,
        several=len(runs) > 1,
        facts={run.name: _facts(run) for run in runs},
        fact_names=list(dict.fromkeys(name for run in runs for name in _facts(run))),
        models=MODELS,
        measures=MEASURES,
        verdicts=[(run.name, *verdict(run)) for run in runs],
        forest=_forest([gain for run in runs for gain in gains(run)]),
        settings=_settings_rows(runs),
        legend=colours,
        curves=safe(_curves(runs)),
        loss_and_reward=safe(_loss_and_reward(runs)),
        histograms=safe(_histograms(runs)),
        best_of_n=safe(_best_of_n(runs)),
        stages=stages,
        longest=max((run.timings[s] for run in runs for s in run.timings), default=0) or 1,
        texts=_texts(runs),
        texts_total=sum(run.generations_total for run in runs),
        missing=lambda *parts: _missing(runs, *parts),
    )


def write_report(run_folders: Sequence[str | Path], output: str | Path) -> None:
    """Write one self-contained HTML page on one run, or on several side by side.

    The page needs no network, holds all its styles, scripts and plots, and is the same bytes for the same runs. Parts
    whose files are missing are left out with a note. Of the before/after texts at most ``MAX_ROWS`` are shown.

    Args:
        run_folders: folders written by ``rrhf run``, finished or not.
        output: the HTML file; replaced whole if it exists.

    Raises:
        UserError: no folder is given, one is no run folder, or a file in it cannot be read.
    """
    folders = [Path(folder) for folder in run_folders]
    if not folders:
        raise UserError("no run folder given: name at least one folder written by `rrhf run`")
    share = max(1, MAX_ROWS // len(folders))
    runs = [load_run(folder, name, share) for folder, name in zip(folders, run_names(folders))]
    write_text(output, render(runs))
