"""The plots of a reproduction's page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rrhf.common.svg import INK, STYLE, figure_svg
from rrhf.recipes.reproduce.rows import Row
from rrhf.recipes.reproduce.scale import REWARDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], None]

COLOURS = {"proxy": "#2f86c9", "gold": "#c97b0a"}
MARKS = {"proxy": "o", "gold": "D"}


def on_white(draw: Draw, size: tuple[float, float], name: str) -> str:
    """A plot as an SVG file of its own, on white; ``size`` in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        figure: Figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        return figure_svg(figure, name).replace(INK, "#202020")


def gains(rows: Sequence[Row]) -> Draw:
    """Both rewards' gains of every arm."""

    def gain_plot(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            for offset, reward in zip((0.14, -0.14), REWARDS):
                values = row.values(reward, "gain", "mean")
                if not values:
                    continue
                height = place + offset
                axes.plot([min(values), max(values)], [height, height], color=COLOURS[reward], linewidth=1.2)
                axes.plot([sum(values) / len(values)], [height], MARKS[reward], color=COLOURS[reward], markersize=5,
                          label=f"{reward} reward" if place == 0 else None)  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.arm.name for row in reversed(rows)])
        axes.set_xlabel("gain over ρ")
        axes.grid(True, axis="x", color="#808080", alpha=0.25, linewidth=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=1.4)

    return gain_plot


def frontier(rows: Sequence[Row]) -> Draw:
    """The gain of both rewards against KL to ρ, a point an arm."""

    def frontier_plot(figure: Figure) -> None:
        both = figure.subplots(1, 2, sharex=True)
        for axes, reward in zip(both, REWARDS):
            for row in rows:
                kl, gain = row.mean("kl", "mean"), row.mean(reward, "gain", "mean")
                if kl is None or gain is None:
                    continue
                axes.plot([kl], [gain], MARKS[reward], color=COLOURS[reward], markersize=4.5)
                axes.annotate(row.arm.name, (kl, gain), (4, 3), textcoords="offset points", fontsize=7, color=INK)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_xlabel("KL to ρ, nats a response")
            axes.set_title(f"gain, {reward} reward", fontsize=9)
            axes.grid(True, color="#808080", alpha=0.25, linewidth=0.6)

    return frontier_plot
