"""The study's figures, drawn from the same lines as its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rrhf.common.svg import INK
from rrhf.recipes.reproduce.plots import COLOURS, MARKS, Draw
from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.recipes.study.claims import SOURCES, WATCHED, best_of_n_curve, series
from rrhf.recipes.study.losses import SAMPLES, losses
from rrhf.recipes.study.results import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Losses in colours; the others are thin and grey.
DRAWN = {"RRHF-DP": ("#c43c39", 1.6), "SimPO": ("#2f86c9", 1.6), "DPO": ("#2a9d4e", 1.6)}
# Ranking losses with the cross-entropy and without it; each pair on the same samples.
WITH = ["RRHF-DP", "loss:logistic", "DPO+sft-weight-1"]
WITHOUT = ["RRHF-DP+no-sft", "loss:logistic+no-sft", "DPO", "SimPO"]


POINT = (
    "a point a learning rate (the mean of the seeds that were run at all of the arm's, which may be one), with its "
    "name where there is room"
)
Picture = tuple[str, str, Draw, tuple[float, float]]
WIDE = (8.5, 4.6)


def figures(study: Study) -> list[Picture]:
    """Name, caption, drawing and size in inches of each figure that the results can fill."""
    found: list[Picture] = []
    if study.seeds(WATCHED):
        (rate, *_) = {line["learning_rate"] for line in study.seeds(WATCHED).values()}
        caption = (
            f"Loss and reward over an RRHF-DP training at the rate {rate:g}: mean and range over seeds (Figure 3 of "
            "the paper)"
        )
        found.append(("training", caption, training(study), (7.0, 3.0)))
        caption = f"Proxy and gold reward over an RRHF-DP training at the rate {rate:g}"
        found.append(("over-optimisation", caption, over_optimisation(study), (5.0, 3.0)))
    if len([name for name in SOURCES if study.numbers(name, "training_scores", "mean").size]) > 1:
        caption = "π's reward against the mean and the mean maximum of its training samples"
        found.append(
            ("sources", f"{caption}, an arm a point, with its name where there is room", sources(study), (7.0, 3.2))
        )
    arms = f"an arm a point{_apart(study)}, with its name where there is room"
    caption = (
        f"Reward against KL to ρ on a scale of its root (of best-of-n a bound), {arms}. Higher at equal KL is better"
    )
    found.append(("frontier", caption, against(study, ("kl", "mean"), "KL to ρ, nats a response"), WIDE))
    caption = f"Reward against perplexity under ρ on a logarithmic scale, {arms}"
    found.append(("perplexity", caption, against(study, ("perplexity",), "perplexity under ρ"), WIDE))
    found += _of_losses(study)
    if best_of_n_curve(study):
        caption = "Reward of the best of n samples of ρ, and what trained arms reach with one"
        found.append(("best-of-n", caption, best_of_n(study), (5.0, 3.4)))
    return found


def _apart(study: Study) -> str:
    """Which arms are in the pictures of losses alone."""
    found = [str(k) for k, ending in SAMPLES.items() if ending and any(name.endswith(ending) for name in study.names)]
    return f" but for those of {' and '.join(found)} samples a query" if found else ""


def _of_losses(study: Study) -> list[Picture]:
    found: list[Picture] = []
    for k in SAMPLES:
        names = losses(study, k)
        if len(names) > 2:
            caption = f"Losses on the same {k} samples of ρ a query: gain against KL to ρ, {POINT}"
            found.append((f"losses-{k}", caption, frontiers(study, names, ending=SAMPLES[k]), WIDE))
    both = [name for name in (*WITH, *WITHOUT) if study.seeds(name)]
    if set(both) & {"RRHF-DP+no-sft", "DPO+sft-weight-1"}:
        caption = f"Ranking losses with Eq. 5's cross-entropy and, dashed, without it: gain against KL to ρ, {POINT}"
        found.append(("cross-entropy", caption, frontiers(study, both, dashed=WITHOUT), WIDE))
    return found


def _panels(figure: Figure, study: Study) -> list[tuple[Axes, str]]:
    """A pair of axes for each reward that the results have."""
    known = study.known_rewards
    return list(zip(np.atleast_1d(figure.subplots(1, len(known))), known, strict=True))


def _grid(axes: Axes) -> None:
    axes.grid(True, color="#808080", alpha=0.25, linewidth=0.6)


def training(study: Study) -> Draw:
    def training_plot(figure: Figure) -> None:
        for axes, key, label in zip(figure.subplots(1, 2), ("loss", "eval_reward_mean"), ("loss", "proxy reward")):
            _band(axes, [series(line, key) for line in study.seeds(WATCHED).values()], COLOURS["proxy"], label)
            axes.set_xlabel("optimiser step")
            axes.set_title(label, fontsize=9)
            _grid(axes)

    return training_plot


def over_optimisation(study: Study) -> Draw:
    def over_optimisation_plot(figure: Figure) -> None:
        axes = figure.subplots()
        lines = list(study.seeds(WATCHED).values())
        gold = sorted({key for line in lines for entry in line["history"] for key in entry if "reward_mean_" in key})
        for reward, key in zip(REWARDS, ("eval_reward_mean", *gold[:1])):
            _band(axes, [series(line, key) for line in lines], COLOURS[reward], f"{reward} reward")
        axes.set_xlabel("optimiser step")
        axes.legend()
        _grid(axes)

    return over_optimisation_plot


def _band(axes: Axes, each: Sequence[dict[int, float]], colour: str, label: str) -> None:
    """The mean of several series and their range."""
    steps = sorted(set.intersection(*(set(one) for one in each)))
    values = np.array([[one[step] for step in steps] for one in each])
    axes.plot(steps, values.mean(axis=0), color=colour, linewidth=1.6, label=label)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def sources(study: Study) -> Draw:
    def sources_plot(figure: Figure) -> None:
        for axes, which in zip(figure.subplots(1, 2, sharey=True), ("mean", "max")):
            points: dict[str, tuple[float, float]] = {}
            for name in SOURCES:
                scores = study.numbers(name, "training_scores", which)
                if scores.size:
                    points[name] = float(scores.mean()), float(np.nanmean(study.rewards(name, "proxy")))
                    axes.plot(
                        *([value] for value in points[name]), MARKS["proxy"], color=COLOURS["proxy"], markersize=4
                    )
            axes.axline((0.5, 0.5), slope=1, color=INK, linewidth=0.6, linestyle=":")
            _name(axes, points)
            axes.set_xlabel(f"training samples: {'mean' if which == 'mean' else 'mean maximum'}")
            _grid(axes)
        figure.axes[0].set_ylabel("π's proxy reward")

    return sources_plot


def against(study: Study, path: tuple[str, ...], label: str) -> Draw:
    from matplotlib.ticker import AutoLocator, LogLocator

    def against_plot(figure: Figure) -> None:
        for axes, reward in _panels(figure, study):
            points: dict[str, tuple[float, float]] = {}
            for name in study.names:
                if name.endswith(tuple(filter(None, SAMPLES.values()))):
                    continue  # in the pictures of losses
                across = study.numbers(name, *path)
                if across.size:
                    points[name] = float(across.mean()), float(np.nanmean(study.rewards(name, reward)))
                    axes.plot(*([value] for value in points[name]), MARKS[reward], color=COLOURS[reward], markersize=4)
            if path[0] == "kl":
                axes.set_xscale("function", functions=(np.sqrt, np.square))  # what reward is taken to be linear in
                furthest = max((kl for kl, _ in points.values()), default=1.0)
                axes.set_xlim(0, 1.1 * furthest)
                axes.set_xticks([0, *(tick for tick in (2, 10, 25, 50, 100, 200) if tick <= furthest)])
            else:
                axes.set_xscale("log")
                values = [value for value, _ in points.values()] or [1.0]
                axes.xaxis.set_major_locator(AutoLocator() if max(values) < 100 * min(values) else LogLocator())
                axes.xaxis.set_major_formatter("{x:,g}")
                axes.xaxis.set_minor_formatter("")
            _name(axes, points)
            axes.set_xlabel(label)
            axes.set_title(f"{reward} reward", fontsize=9)
            _grid(axes)

    return against_plot


def frontiers(study: Study, names: Sequence[str], dashed: Sequence[str] = (), ending: str = "") -> Draw:
    """Each arm's gain over its KL to ρ, a line through its learning rates; names are written without ``ending``."""

    def frontiers_plot(figure: Figure) -> None:
        for axes, reward in _panels(figure, study):
            ends: dict[str, tuple[float, float]] = {}
            for name in names:
                points = [mean_point(study, name, rate, reward) for rate in study.rates(name)]
                known = sorted(point for point in points if point is not None)
                if known:
                    colour, width = DRAWN.get(name.split("+")[0], ("#909090", 0.8))
                    style = "--" if name in dashed else "-"
                    axes.plot(*zip(*known), color=colour, linewidth=width, linestyle=style, marker=MARKS[reward],
                              markersize=3)  # fmt: skip
                    ends[name.removeprefix("loss:").removesuffix(ending)] = known[-1]
            _name(axes, ends)
            axes.set_xlabel("KL to ρ, nats a response")
            axes.set_title(f"gain in {reward} reward", fontsize=9)
            _grid(axes)

    return frontiers_plot


def mean_point(study: Study, name: str, rate: float, reward: str) -> tuple[float, float] | None:
    """KL and gain of an arm at a rate, means over the seeds that were run at all its rates; None where none has both.

    The best rate has more seeds: with them it would lie apart from the others by who was drawn.
    """
    runs = {
        (int(line["seed"]), line["learning_rate"]): (float(line["kl"]["mean"]), float(line[reward]["gain"]["mean"]))
        for line in study.lines
        if line["arm"] == name and reward in line and line.get("kl")
    }
    rates = {rate, *study.rates(name)}
    seeds = {seed for seed, _ in runs if all((seed, each) in runs for each in rates)}
    if not seeds:
        return None
    kl, gain = np.mean([runs[seed, rate] for seed in sorted(seeds)], axis=0)
    return float(kl), float(gain)


def _name(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write names beside points; one that would lie on another's is left out: the table has every arm."""
    size, scale = 6, axes.figure.dpi / 72  # points, pixels a point
    axes.autoscale_view()
    taken: list[tuple[float, float, float]] = []  # where names begin and how long they are, in pixels
    for name, point in points.items():
        x, y = axes.transData.transform(point)
        width, height = 0.6 * size * len(name) * scale, size * scale
        if any(abs(y - y0) < height and x < x0 + w0 and x0 < x + width for x0, y0, w0 in taken):
            continue
        taken.append((float(x), float(y), width))
        axes.annotate(name, point, (3, 2), textcoords="offset points", fontsize=size, color=INK)


def best_of_n(study: Study) -> Draw:
    def best_of_n_plot(figure: Figure) -> None:
        axes = figure.subplots()
        curve = best_of_n_curve(study)
        axes.plot(list(curve), list(curve.values()), color=COLOURS["proxy"], marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("n")
        axes.set_ylabel("proxy reward")
        for name in ("RRHF-BP", "RRHF-DP", "PPO", "SFT"):
            if study.seeds(name):
                height = float(np.nanmean(study.rewards(name, "proxy")))
                axes.axhline(height, color=INK, linewidth=0.7, linestyle="--")
                axes.annotate(name, (max(curve), height), (0, 2), textcoords="offset points", fontsize=7, ha="right")
        _grid(axes)

    return best_of_n_plot
