"""What a run came to, as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

STAGES = ("data", "sample", "score", "train", "evaluate", "report")


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, rest = (
            row[0].ljust(widths[0]),
            [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)],
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def format_evaluation(result: Mapping[str, Any]) -> str:
    """Reward, perplexity and gain of the models of an ``evaluation.json``, as an aligned table."""
    models = [name for name in ("rho", "pi") if name in result]
    names = {"rho": "ρ before", "pi": "π after"}
    rows = [["", *[names[name] for name in models], *(["gain [95 % interval]"] if len(models) == 2 else [])]]
    for reward, values in result["rewards"].items():
        row = [f"reward {reward.rpartition(':')[2]}", *[_number(values[name]["mean"]) for name in models]]
        if len(models) == 2:
            gain = values["gain"]
            row.append(f"{_number(gain['mean'])} [{_number(gain['low'])}, {_number(gain['high'])}]")
        rows.append(row)
    for key, label, digits in (
        ("perplexity", "perplexity", 2), ("length_mean", "length in tokens", 1), ("distinct_2", "distinct-2", 3)
    ):  # fmt: skip
        rows.append([label, *[_number(result[name][key], digits) for name in models], *[""] * (len(models) == 2)])
    n = result[models[-1]]["n"]
    return f"{_table(rows)}\n{n} held-out prompts; perplexity under {result['perplexity_model']}; seed {result['seed']}"


def format_timings(timings: Mapping[str, float]) -> str:
    """Minutes a stage, in one line."""
    known = [name for name in STAGES if name in timings]
    parts = [f"{name} {timings[name] / 60:.1f}" for name in known]
    return f"minutes: {', '.join(parts)}; {sum(timings[name] for name in known) / 60:.1f} in all"


def format_examples(rows: Sequence[Mapping[str, Any]], count: int = 3, width: int = 110) -> str:
    """``count`` texts before and after, evenly spread over ``rows`` so that they are not chosen by their result."""
    picked = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
    blocks = []
    for row in picked:
        query = row["query"] if isinstance(row["query"], str) else row["query"][-1]["content"]
        lines = [f"query     {_short(query, width)}"]
        for name, label in (("rho", "ρ before"), ("pi", "π after ")):
            if name in row:
                values = " / ".join(_number(value, 2) for value in row[f"{name}_rewards"].values())
                lines.append(f"{label}  [{values}] {_short(row[name], width)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(" ".join(text.split()), width, placeholder=" …")
