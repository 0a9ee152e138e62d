"""What a run came to, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rrhf.common.presentation import number, percent, short_name, shorten, text_table
from rrhf.report.tables import MODELS, evaluation_table, models_of, phrases

STAGES = ("data", "sample", "score", "train", "evaluate", "report")


def format_evaluation(evaluation: Mapping[str, Any]) -> str:
    """Rewards, other measures and gains of the models of an ``evaluation.json``, as an aligned table."""
    table = text_table(*evaluation_table(evaluation, short_name))
    n = evaluation[models_of(evaluation)[-1]]["n"]
    under = f"perplexity under {evaluation['perplexity_model']}"
    said = [
        f"“{phrase}” in {percent(pi, 0)} of π's texts, {percent(rho, 0)} of ρ's"
        for phrase, rho, pi in phrases(evaluation)
    ]
    lines = [table, f"{n} held-out prompts; {under}; seed {evaluation['seed']}"]
    return "\n".join(lines + ["said more often: " + "; ".join(said)] * bool(said))


def format_accuracies(accuracies: Mapping[str, Any]) -> str:
    """What ``evaluate_pairs`` gives, as an aligned table: a row a judge, and one for each of its subsets."""
    rows = []
    for judge, block in accuracies.items():
        if judge not in ("file", "gain"):
            name = MODELS.get(judge, short_name(judge))
            rows += [_accuracy(name, block), *(_accuracy(f"  {s}", b) for s, b in block.get("subsets", {}).items())]
    table = text_table(["judge", "records", "ties", "pairs", "best", "every"], rows)
    legend = (
        "pairs: the better response scores higher, ties 1/2; best: one of the best scores highest; every: each of the\n"
        "best scores above all others. Per cent of records, in brackets 95 % bootstrap intervals over them."
    )
    lines = [table, legend]
    if accuracies.get("gain"):
        lines.append(f"π − ρ, pairs: {_interval(accuracies['gain'])} points")
    return "\n".join(lines)


def _accuracy(name: str, block: Mapping[str, Any]) -> list[str]:
    shares = [_interval(block[key]) if key in block else "–" for key in ("accuracy", "best", "every")]
    return [name, str(block["n"]), str(block.get("ties", 0)), *shares]


def _interval(block: Mapping[str, float]) -> str:
    return f"{100 * block['mean']:.1f} [{100 * block['low']:.1f}, {100 * block['high']:.1f}]"


def format_timings(timings: Mapping[str, float]) -> str:
    """Minutes a stage, in one line."""
    known = [name for name in STAGES if name in timings]
    minutes = ", ".join(f"{name} {timings[name] / 60:.1f}" for name in known)
    return f"minutes: {minutes}; {sum(timings[name] for name in known) / 60:.1f} in all"


def format_examples(rows: Sequence[Mapping[str, Any]], count: int = 3, width: int = 110) -> str:
    """At most ``count`` texts before and after, evenly spread over ``rows``: they are not chosen by their result."""
    shown = min(count, len(rows))
    picked = [rows[i * len(rows) // shown] for i in range(shown)]
    blocks = []
    for row in picked:
        query = row["query"] if isinstance(row["query"], str) else row["query"][-1]["content"]
        lines = [f"query     {shorten(query, width)}"]
        for model in models_of(row):
            values = " / ".join(number(value, 2) for value in row[f"{model}_rewards"].values())
            lines.append(f"{MODELS[model]:<8}  [{values}] {shorten(row[model], width)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def format_best_of_n(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each reward of the best of n samples as a function of n, with its interval, beside the bound on KL to ρ."""
    names = list(curves)
    rows = []
    for place, line in enumerate(curves[names[0]]):
        cells = [str(line["n"]), number(line["kl_bound"], 3)]
        for name in names:
            if place < len(curves[name]):
                at = curves[name][place]
                cells.append(f"{number(at['mean'], 3)} ({number(at['low'], 3)} to {number(at['high'], 3)})")
            else:
                cells.append("")
        rows.append(cells)
    return text_table(["n", "KL at most", *map(short_name, names)], rows)
