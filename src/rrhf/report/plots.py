"""The plots of a run, drawn with matplotlib, and the picture of a run for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rrhf.common.errors import UserError
from rrhf.common.files import replacing
from rrhf.common.svg import INK, STYLE, figure_svg
from rrhf.report.load import load_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid-tones of the Okabe-Ito palette: told apart by colour-blind readers, legible on white and on near-black.
RHO_COLOUR = "#c97b0a"
PI_COLOUR = "#2f86c9"
BEST_COLOUR = "#1d9e77"
RUN_COLOURS = ("#2f86c9", "#c97b0a", "#1d9e77", "#c765a3", "#7f74d6", "#8a8a8a")
RUN_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# series of the log → (title, label of the y axis)
METRICS: dict[str, tuple[str, str]] = {
    "loss": ("Loss (Eq. 5)", "loss"),
    "rank_loss": ("Ranking loss (Eq. 2)", "loss"),
    "sft_loss": ("Fine-tuning loss (Eq. 4)", "nats a response"),
    "rank_accuracy": ("Pairs ranked rightly", "share of pairs"),
    "violated_pairs": ("Violated pairs", "pairs a query"),
    "best_logprob": ("Log-probability of the best response", "nats a token"),
    "tokens_per_second": ("Speed", "tokens a second"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm", "norm"),
    # of PPO and NLPO, a rollout each
    "reward_mean": ("Mean reward of the rollouts", "reward"),
    "kl": ("KL(π, ρ) of the rollouts", "nats a response"),
    "entropy": ("Entropy of the policy", "nats a token"),
    "length_mean": ("Length of the rollouts", "tokens"),
    "value_loss": ("Loss of the value function", "loss"),
    "explained_variance": ("Variance that the value function explains", "share"),
    "clip_fraction": ("Clipped tokens", "share of tokens"),
    "eval_loss": ("Loss on held-out records", "loss"),
    "eval_rank_accuracy": ("Held-out pairs ranked rightly", "share of pairs"),
    "eval_reward_mean": ("Mean reward on held-out prompts", "reward"),
    "eval_perplexity": ("Perplexity on held-out prompts", "perplexity"),
    "eval_length_mean": ("Length of answers to held-out prompts", "tokens"),
    "eval_distinct_2": ("Variety of the answers (distinct-2)", "share of different pairs"),
    "eval_score_length_correlation": ("Reward and length of the answers", "Pearson's r"),
}

Series = tuple[list[float], list[float]]


def series(history: Sequence[Mapping[str, float]], name: str) -> Series:
    """Return the steps and the values of one series of ``log_history``."""
    rows = [(row["step"], row[name]) for row in history if name in row and "step" in row]
    return [step for step, _ in rows], [value for _, value in rows]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred running mean over ``window`` values, shorter at the ends."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def thin(steps: Sequence[float], values: Sequence[float], most: int = 400) -> Series:
    """Take means over blocks, so that a long training does not make a heavy page."""
    block = -(-len(values) // most) if values else 1
    starts = range(0, len(values), block)

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(numbers)

    return [mean(steps[i : i + block]) for i in starts], [mean(values[i : i + block]) for i in starts]


def _grid(axes: Axes, across: Literal["x", "y"] = "y") -> None:
    axes.grid(True, axis=across, color="#808080", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_curves(axes: Axes, lines: Sequence[Series], name: str, colours: Sequence[str] = RUN_COLOURS) -> None:
    """Draw one series of one or several runs: the logged values faintly, a running mean over a twentieth firmly."""
    from matplotlib.ticker import MaxNLocator

    _, unit = METRICS[name]
    for number, (steps, values) in enumerate(lines):
        if not values:
            continue
        colour = colours[number % len(colours)]
        dash = RUN_DASHES[number % len(RUN_DASHES)]
        steps, values = thin(steps, values)
        noisy = len(values) >= 20 and name != "learning_rate"
        if noisy:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        firm = smooth(values, max(3, len(values) // 20)) if noisy else values
        axes.plot(steps, firm, color=colour, linestyle=dash, marker="o" if len(values) < 20 else None, markersize=3)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _grid(axes)


def bin_edges(rho: Sequence[float], pi: Sequence[float]) -> list[float]:
    """The limits of the bins in which the rewards of ρ and π are counted: fewer where there are few."""
    import numpy as np

    bins = max(8, min(24, int(2 * max(len(rho), len(pi)) ** 0.5)))
    edges: list[float] = np.histogram_bin_edges([*rho, *pi], bins=bins).tolist()
    return edges


def draw_histograms(axes: Axes, rho: Sequence[float], pi: Sequence[float]) -> None:
    """Draw the rewards of ρ and π over the same bins, with their means as dashed lines."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    edges = bin_edges(rho, pi)
    for name, values, colour in (("ρ before", rho, RHO_COLOUR), ("π after", pi, PI_COLOUR)):
        if not values:
            continue
        axes.hist(values, bins=edges, histtype="stepfilled", color=colour, alpha=0.28)
        axes.hist(values, bins=edges, histtype="step", color=colour, linewidth=1.4, label=name)
        axes.axvline(float(np.mean(values)), color=colour, linestyle=(0, (4, 2)), linewidth=1.3)
    axes.set_xlabel("reward")
    axes.set_ylabel("held-out prompts")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    # Above the axes, so that no bar can hide it.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4)
    _grid(axes)


def draw_loss_and_reward(axes: Axes, loss: Series, reward: Series) -> None:
    """Draw the loss (left axis) against the mean reward (right axis) through training, as Figure 3 of the paper."""
    draw_curves(axes, [loss], "loss", [RHO_COLOUR])
    axes.yaxis.label.set_color(RHO_COLOUR)
    right = axes.twinx()
    right.plot(*reward, color=PI_COLOUR, marker="o", markersize=3.5)
    right.set_ylabel("mean reward", color=PI_COLOUR)
    right.spines["right"].set_visible(True)


def draw_best_of_n(
    axes: Axes, mean: float, std: float, mean_max: float, rho: float | None, pi: float | None, best_n: str
) -> None:
    """Draw the training samples' mean ± std and mean of maxima beside ρ's and π's mean reward."""
    rows: list[tuple[str, float, str, float | None]] = [
        ("training samples\nmean ± std", mean, "#8a8a8a", std),
        (f"best of {best_n}\nmean of maxima", mean_max, BEST_COLOUR, None),
    ]
    rows += [("ρ, held out", rho, RHO_COLOUR, None)] if rho is not None else []
    rows += [("π, held out", pi, PI_COLOUR, None)] if pi is not None else []
    for height, (_, value, colour, spread) in enumerate(reversed(rows)):
        axes.errorbar([value], [height], xerr=spread, fmt="o", color=colour, markersize=7, capsize=4, linewidth=1.5)
        axes.annotate(
            f"{value:.3f}", (value, height), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    dashes = (0, (4, 2))  # from its point down, past ρ and π, so that it crosses no number
    axes.vlines(mean_max, -0.5, len(rows) - 2, color=BEST_COLOUR, linestyle=dashes, linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("reward")
    _grid(axes, "x")


Line = tuple[str, str, Sequence[Mapping[str, Any]]]  # name, colour, points with n, mean, low and high


def draw_best_curves(axes: Axes, lines: Sequence[Line], levels: Mapping[str, tuple[float, str]]) -> None:
    """Draw the reward of the best of n as a function of n with its interval, and ``levels`` to hold it against.

    Args:
        lines: what ``evaluation.best_of_n`` gives, each with its name and colour.
        levels: name → a reward and its colour, a dashed line each.
    """
    from matplotlib.ticker import MaxNLocator

    longest = max((len(points) for _, _, points in lines), default=1)
    for name, colour, points in lines:
        n = [point["n"] for point in points]
        axes.fill_between(n, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.2, lw=0)
        axes.plot(n, [p["mean"] for p in points], color=colour, marker="o", markersize=3, label=name)
    for name, (value, colour) in levels.items():
        axes.axhline(value, color=colour, linestyle=(0, (4, 2)), linewidth=1.2, label=name)
    axes.set_xlabel("n, responses of a query")
    axes.set_ylabel("reward of the best")
    if longest > 8:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2
    )
    _grid(axes)


def draw_by_length(axes: Axes, bins: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean rewards of ρ and π among texts of about the same length, with intervals."""
    from matplotlib.ticker import MaxNLocator

    for shift, (model, name, colour) in zip(
        (-0.09, 0.09), (("rho", "ρ before", RHO_COLOUR), ("pi", "π after", PI_COLOUR))
    ):
        at = [(place, found) for place, line in enumerate(bins) if (found := line["models"][model]["reward"])]
        means = [found["mean"] for _, found in at]
        # A resampled mean never lies beyond the interval by more than its rounding.
        spread = [
            [max(0.0, m - found["low"]) for m, (_, found) in zip(means, at)],
            [max(0.0, found["high"] - m) for m, (_, found) in zip(means, at)],
        ]
        x = [place + shift for place, _ in at]
        axes.errorbar(x, means, yerr=spread, fmt="o-", color=colour, markersize=4, capsize=2.5, lw=1.2, label=name)
    axes.set_xticks(range(len(bins)), [length_range(line) for line in bins])
    axes.set_xlabel("length in characters")
    axes.set_ylabel("mean reward")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.8)
    _grid(axes)


def length_range(line: Mapping[str, Any]) -> str:
    """``12–40``: the shortest and the longest text of a bin."""
    low, high = round(line["low"]), round(line["high"])
    return f"{low}" if low == high else f"{low}–{high}"


def draw_sources(figure: Figure, rows: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]]) -> None:
    """Draw mean reward and mean length by source side by side, with intervals: (source, reward, length) a row."""
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(1, 2, sharey=True)
    rewards, lengths = [reward for _, reward, _ in rows], [length for _, _, length in rows]
    for panel, values, label in ((panels[0], rewards[::-1], "mean reward"), (panels[1], lengths[::-1], "characters")):
        means = [value["mean"] for value in values]
        ends = [
            [max(0.0, mean - value["low"]) for mean, value in zip(means, values)],
            [max(0.0, value["high"] - mean) for mean, value in zip(means, values)],
        ]
        panel.errorbar(means, range(len(rows)), xerr=ends, fmt="o", color=PI_COLOUR, markersize=4, capsize=2.5, lw=1.2)
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.set_ylim(-0.6, len(rows) - 0.4)
        _grid(panel, "x")
    panels[0].set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    for panel in panels:
        panel.tick_params(axis="y", length=0)


def draw_windows(axes: Axes, steps: Sequence[int], means: Sequence[float], maxima: Sequence[float]) -> None:
    """Draw the mean reward of each window's samples, and the mean of their queries' best, over the steps."""
    from matplotlib.ticker import MaxNLocator

    axes.plot(steps, maxima, color=BEST_COLOUR, marker="o", markersize=3, label="mean of maxima")
    axes.plot(steps, means, color="#8a8a8a", marker="o", markersize=3, label="mean")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("reward of the samples")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.8)
    _grid(axes)


def gain_figure(
    rho: Sequence[float],
    pi: Sequence[float],
    history: Sequence[Mapping[str, float]],
    gain: Mapping[str, float] | None = None,
    curves: Sequence[str] = ("loss", "rank_accuracy"),
) -> Figure:
    """Return a picture of one run for a README: reward histograms of ρ and π, and training curves beside them.

    Args:
        rho: rewards of ρ's responses, one a held-out prompt.
        pi: rewards of π's responses to the same prompts.
        history: ``log_history`` of the trainer.
        gain: ``mean``, ``low`` and ``high`` of the paired difference, for the title.
        curves: the series to draw, each in its own panel where it was logged.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [(name, curve) for name in curves if (curve := series(history, name))[1]]
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure = Figure(figsize=(3.9 + 2.9 * len(drawn), 2.9), layout="constrained", dpi=180)
        widths = [1.3, *(1.0 for _ in drawn)]
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        draw_histograms(panels[0], rho, pi)
        for panel, (name, curve) in zip(panels[1:], drawn):
            draw_curves(panel, [curve], name, [PI_COLOUR])
            panel.set_title(METRICS[name][0], fontsize=9)
        if gain is not None:
            figure.suptitle(
                f"Reward on {len(pi)} held-out prompts: {gain['mean']:+.3f} "
                f"(95 % interval {gain['low']:+.3f} to {gain['high']:+.3f})",
                fontsize=10,
            )
    return figure


def save_picture(run_folder: str | Path, path: str | Path) -> None:
    """Write ``gain_figure`` of a run folder as PNG or SVG, by the suffix of ``path``.

    Raises:
        UserError: the folder is no run folder or holds no generations with rewards, or the suffix is not known.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{path}: give a name that ends in .png or .svg")
    run = load_run(run_folder)
    reward = run.main_reward if run.main_reward in run.held.rewards else next(iter(run.held.rewards), None)
    values = None if reward is None else {model: run.held.values(reward, model) for model in ("rho", "pi")}
    if values is None or not values["pi"]:
        raise UserError(f"{run_folder}: no rewards to draw: {run.missing.get('generations', 'no generation has one')}")
    gain = run.rewards[run.main_reward].get("gain") if run.main_reward else None
    figure = gain_figure(values["rho"], values["pi"], run.history, gain)
    with replacing(path) as temporary:
        if path.suffix == ".svg":
            temporary.write_text(figure_svg(figure, "gain"), encoding="utf-8")
        else:
            figure.savefig(temporary, format="png")
