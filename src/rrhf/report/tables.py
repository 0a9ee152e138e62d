"""What an ``evaluation.json`` says, as rows that terminal, model card and page print in their own ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rrhf.common.presentation import finite, number

MODELS = {"rho": "ρ before", "pi": "π after"}


@dataclass(frozen=True)
class Measure:
    """One number an evaluation gives of each model."""

    key: str
    name: str
    unit: str | None
    digits: int

    @property
    def label(self) -> str:
        return f"{self.name} in {self.unit}" if self.unit else self.name


MEASURES = (
    Measure("perplexity", "perplexity", None, 2),
    Measure("length_mean", "length", "tokens", 1),
    Measure("distinct_2", "distinct-2", None, 3),
)


def model_names(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The folders or hub ids of the models that were evaluated: ``rho`` and ``pi``; empty where none is noted."""
    settings = evaluation.get("settings")
    models = settings.get("models") if isinstance(settings, Mapping) else None
    return models if isinstance(models, Mapping) else {}


def models_of(evaluation: Mapping[str, Any]) -> list[str]:
    """Which of ``rho`` and ``pi`` were evaluated."""
    return [model for model in MODELS if model in evaluation]


def evaluation_table(
    evaluation: Mapping[str, Any], reward_name: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a reward and a measure, a column a model, and the gain where there are both.

    Args:
        evaluation: what an ``evaluation.json`` holds.
        reward_name: how a reward is called in its row.
    """
    models = models_of(evaluation)
    both = len(models) == 2
    rows = []
    for reward, values in evaluation.get("rewards", {}).items():
        gain = [gain_text(values["gain"])] if both else []
        rows.append([f"reward {reward_name(reward)}", *(number(values[model]["mean"]) for model in models), *gain])
    for measure in MEASURES:
        cells = [number(evaluation[model].get(measure.key), measure.digits) for model in models]
        rows.append([measure.label, *cells, *[""] * both])
    return ["", *(MODELS[model] for model in models), *["gain [95 % interval]"] * both], rows


def phrases(evaluation: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """The phrases that π came to say: each with the shares of ρ's and of π's texts that have it."""
    rows = evaluation.get("phrases")
    if not isinstance(rows, list):  # of an older version, or by hand
        return []
    known = [
        (row.get("phrase"), finite(row.get("rho")), finite(row.get("pi"))) for row in rows if isinstance(row, dict)
    ]
    return [(str(phrase), rho, pi) for phrase, rho, pi in known if phrase and rho is not None and pi is not None]


def gain_text(gain: Mapping[str, Any]) -> str:
    """``0.145 [0.105, 0.185]``: a gain and its interval."""
    return f"{number(gain['mean'])} [{number(gain['low'])}, {number(gain['high'])}]"


def interval_side(low: float, high: float) -> int:
    """+1, 0 or −1 as an interval lies above, around or below 0; one that ends at 0 includes it."""
    return (low > 0) - (high < 0)
