"""The charts of the page: inline SVG, each with the table of what it shows behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from rrhf.common.presentation import finite, typeset_number
from rrhf.common.svg import inline_svg
from rrhf.report import plots
from rrhf.report.load import setting
from rrhf.report.run import Run
from rrhf.report.tables import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL, WIDE = (3.6, 2.4), (4.3, 2.7)  # inches
HINGE = "hinge"  # the ranking loss that is Eq. 2
LINES = 40  # of the table behind a curve


@dataclass(frozen=True)
class Chart:
    """``svg`` shows ``rows``; ``run`` is its run where it shows one alone, ``code`` a name to print as code."""

    title: str
    svg: Markup
    header: list[str]
    rows: list[list[str]]
    run: str = ""
    code: str = ""
    note: str = ""


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], label: str) -> Markup:
    return Markup(inline_svg(draw, size, label))  # nosec B704 # our own SVG, its label escaped


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Every series that some run logged, all runs in one chart."""
    drawn = []
    others = any(setting(run.settings, "ranking_loss") not in (None, HINGE) for run in runs)
    for name, (title, unit) in plots.METRICS.items():
        title = title.removesuffix(" (Eq. 2)") if others else title
        lines = [plots.series(run.history, name) for run in runs]
        if not any(values for _, values in lines):
            continue
        svg = _svg(lambda f, n=name, s=lines: plots.draw_curves(f.subplots(), s, n), SMALL, title)  # type: ignore[misc]
        header, rows = _curve_table(runs, lines, unit)
        longest = max(len(values) for _, values in lines)
        note = f"means over {-(-longest // LINES)} logged values" if longest > LINES else ""
        drawn.append(Chart(title, svg, header, rows, note=note))
    return drawn


def _curve_table(runs: Sequence[Run], lines: Sequence[plots.Series], unit: str) -> tuple[list[str], list[list[str]]]:
    thinned = [plots.thin(*line, most=LINES) for line in lines]
    steps = sorted({step for line, _ in thinned for step in line})
    values = [dict(zip(*line, strict=True)) for line in thinned]
    header = ["step", *([run.name for run in runs] if len(runs) > 1 else [unit])]
    return header, [[f"{step:g}", *(_significant(of_run.get(step)) for of_run in values)] for step in steps]


def _significant(value: float | None) -> str:
    """Four significant digits, with a true minus sign."""
    return typeset_number(None) if value is None else f"{value:.4g}".replace("-", "−")


def loss_and_reward(runs: Sequence[Run]) -> list[Chart]:
    """Loss and mean reward on two axes (Figure 3), for runs that measured the reward while they trained."""
    drawn = []
    for run in runs:
        loss, reward = plots.series(run.history, "loss"), plots.series(run.history, "eval_reward_mean")
        if loss[1] and reward[1]:
            label = f"Loss and mean reward through training, {run.name}"
            draw = lambda f, a=loss, b=reward: plots.draw_loss_and_reward(f.subplots(), a, b)  # noqa: E731
            near = [_before(loss, step) for step in reward[0]]
            rows = [
                [f"{step:g}", _significant(at), typeset_number(value)]
                for step, at, value in zip(reward[0], near, reward[1], strict=True)
            ]
            title = "Loss against mean reward on held-out prompts (Figure 3 of the paper)"
            header = ["step", "loss, mean since the last", "mean reward"]
            drawn.append(Chart(title, _svg(draw, WIDE, label), header, rows, run.name))
    return drawn


def _before(loss: plots.Series, step: float) -> float | None:
    """The mean of the last twentieth of the losses that were logged up to ``step``."""
    known = [value for at, value in zip(*loss, strict=True) if at <= step]
    last = known[-max(1, len(loss[1]) // 20) :]
    return sum(last) / len(last) if last else None


def histograms(runs: Sequence[Run]) -> list[Chart]:
    """The rewards of ρ and π, a chart a run and reward."""
    drawn = []
    for run in runs:
        for reward in sorted(run.held.rewards, key=lambda name: name != run.main_reward):
            rho, pi = (run.held.values(reward, model) for model in MODELS)
            if not rho and not pi:
                continue
            label = f"Rewards of ρ and π by {reward}, {run.name}"
            draw = lambda f, a=rho, b=pi: plots.draw_histograms(f.subplots(), a, b)  # noqa: E731
            edges = plots.bin_edges(rho, pi)
            counts = [_counts(values, edges) for values in (rho, pi)]
            rows = [
                [f"{typeset_number(low)} to {typeset_number(high)}", str(before), str(after)]
                for low, high, before, after in zip(edges, edges[1:], *counts)
            ]
            header = ["reward", *MODELS.values()]
            drawn.append(Chart("", _svg(draw, WIDE, label), header, rows, run.name, reward))
    return drawn


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    import numpy as np

    return [int(count) for count in np.histogram(values, edges)[0]]


def best_of_n(runs: Sequence[Run]) -> list[Chart]:
    """The training samples' mean, std and mean of maxima beside ρ's and π's mean reward."""
    drawn = []
    for run in runs:
        samples = run.samples
        if samples is None:
            continue
        main = run.rewards.get(run.main_reward or "", {})
        rho, pi = (finite((main.get(side) or {}).get("mean")) for side in ("rho", "pi"))
        count = str(samples.most) if samples.fewest == samples.most else f"{samples.fewest}–{samples.most}"
        draw = lambda f, s=samples, r=rho, p=pi, n=count: plots.draw_best_of_n(  # noqa: E731
            f.subplots(), s.mean["mean"], s.std, s.mean_max["mean"], r, p, n
        )
        rows = [
            ["training samples, mean", typeset_number(samples.mean["mean"])],
            ["training samples, std", typeset_number(samples.std)],
            [f"best of {count}, mean of maxima", typeset_number(samples.mean_max["mean"])],
            *([["ρ, held out", typeset_number(rho)]] if rho is not None else []),
            *([["π, held out", typeset_number(pi)]] if pi is not None else []),
        ]
        svg = _svg(draw, WIDE, f"Best-of-n picture, {run.name}")
        drawn.append(Chart("Training samples beside ρ and π", svg, ["", "reward"], rows, run.name))
    return drawn


def best_curves(runs: Sequence[Run]) -> list[Chart]:
    """The best of n as a function of n: of the training samples, and of the baseline best-of-n where it is one."""
    drawn = []
    for run in runs:
        baseline = run.evaluation.get("best_of_n")
        if isinstance(baseline, Mapping):
            named = [(name, points) for name, points in baseline.items() if points and name != "score"]
            title, levels = "Best of n on held-out prompts, by each reward", {}
        elif run.samples is not None and len(run.samples.curve) > 1:
            named, title = [("training samples", run.samples.curve)], "Best of n training samples, as n grows"
            levels = _levels(run)
        else:
            continue
        colours = (plots.BEST_COLOUR, *plots.RUN_COLOURS)
        lines = [(_short(name), colours[i % len(colours)], points) for i, (name, points) in enumerate(named)]
        draw = lambda f, a=lines, b=levels: plots.draw_best_curves(f.subplots(), a, b)  # noqa: E731
        svg = _svg(draw, WIDE, f"{title}, {run.name}")
        drawn.append(Chart(title, svg, *_best_table(lines), run.name))
    return drawn


def _short(name: str) -> str:
    from rrhf.common.presentation import short_name

    return short_name(name)


def _levels(run: Run) -> dict[str, tuple[float, str]]:
    main = run.rewards.get(run.main_reward or "", {})
    known = {
        "ρ, held out": (finite((main.get("rho") or {}).get("mean")), plots.RHO_COLOUR),
        "π, held out": (finite((main.get("pi") or {}).get("mean")), plots.PI_COLOUR),
    }
    return {name: (value, colour) for name, (value, colour) in known.items() if value is not None}


def _best_table(lines: Sequence[plots.Line]) -> tuple[list[str], list[list[str]]]:
    rows: dict[int, list[str]] = {}
    for column, (_, _, points) in enumerate(lines):
        for point in points:
            row = rows.setdefault(
                point["n"], [str(point["n"]), typeset_number(point.get("kl_bound")), *[""] * len(lines)]
            )
            low, high = typeset_number(point["low"]), typeset_number(point["high"])
            row[2 + column] = f"{typeset_number(point['mean'])} ({low} to {high})"
    return ["n", "KL to ρ at most, nats", *(name for name, _, _ in lines)], [rows[n] for n in sorted(rows)]


def by_length(run: Run, reward: str, matched: Mapping[str, Any]) -> Chart | None:
    """Mean rewards among texts of about the same length."""
    bins = matched["bins"]
    if len(bins) < 2:
        return None
    label = f"Reward at matched length by {reward}, {run.name}"
    rows = [
        [
            plots.length_range(line),
            *(str(line["models"][model]["n"]) for model in MODELS),
            *(_with_interval(line["models"][model]["reward"]) for model in MODELS),
        ]
        for line in bins
    ]
    header = ["characters", "texts of ρ", "texts of π", "reward of ρ", "reward of π"]
    svg = _svg(lambda f: plots.draw_by_length(f.subplots(), bins), WIDE, label)
    return Chart("", svg, header, rows, run.name, reward)


def _with_interval(value: Mapping[str, float] | None) -> str:
    if value is None:
        return typeset_number(None)
    return f"{typeset_number(value['mean'])} ({typeset_number(value['low'])} to {typeset_number(value['high'])})"


def sources(runs: Sequence[Run]) -> list[Chart]:
    """Reward and length by source, for runs that have several."""
    drawn = []
    for run in runs:
        found = run.samples.by_source if run.samples is not None else ()
        if len(found) < 2:
            continue
        shown = [
            (source.name if len(source.name) < 24 else f"{source.name[:22]}…", source.mean, source.length)
            for source in found
        ]
        height = min(6.0, 1.1 + 0.28 * len(found))
        svg = _svg(lambda f, r=shown: plots.draw_sources(f, r), (4.6, height), f"Sources, {run.name}")  # type: ignore[misc]
        rows = [[source.name, _with_interval(source.mean), _with_interval(source.length)] for source in found]
        drawn.append(Chart("", svg, ["source", "mean reward", "characters"], rows, run.name))
    return drawn


def windows(runs: Sequence[Run]) -> list[Chart]:
    """The samples' rewards window by window, for runs that sampled in training."""
    drawn = []
    for run in runs:
        if not run.windows:
            continue
        steps = [window.step for window in run.windows]
        means = [window.samples.mean["mean"] for window in run.windows]
        maxima = [window.samples.mean_max["mean"] for window in run.windows]
        draw = lambda f, s=steps, a=means, b=maxima: plots.draw_windows(f.subplots(), s, a, b)  # noqa: E731
        rows = [
            [
                str(window.step),
                _with_interval(window.samples.mean),
                typeset_number(window.samples.std),
                _with_interval(window.samples.mean_max),
            ]
            for window in run.windows
        ]
        title = "Rewards of the samples, by the window they were drawn in"
        svg = _svg(draw, WIDE, f"{title}, {run.name}")
        drawn.append(Chart(title, svg, ["from step", "mean", "std", "mean of maxima"], rows, run.name))
    return drawn
