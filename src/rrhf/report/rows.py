"""The tables of the page, row by row: what was run, Tables 2 and 6, gains, gains at equal length, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf.common.presentation import NONE, clean, finite, short_name, typeset_number
from rrhf.evaluation.held_out import matched_length, mean_of, paired_with, rewards_agree
from rrhf.evaluation.pairs import IMPLICIT
from rrhf.report.charts import HINGE, Chart, by_length
from rrhf.report.load import setting
from rrhf.report.results import Accuracy, Results, accuracies, accuracies_of_file, interval
from rrhf.report.run import Run
from rrhf.report.tables import MODELS, interval_side, model_names

SIDES = {1: "above 0", 0: "includes 0", -1: "below 0"}


# --- what was run ------------------------------------------------------------------------------------------------


def facts(run: Run) -> dict[str, str]:
    """What was run, from the settings and the evaluation."""
    named = {
        "Model (ρ)": _rho(run) or setting(run.settings, "model"),
        "Data": setting(run.settings, "data"),
        "Setting": setting_name(run),
        "Reward": " · ".join(run.rewards) or setting(run.settings, "reward"),
        "Perplexity by": run.evaluation.get("perplexity_model"),
        "Seed": run.evaluation.get("seed", setting(run.settings, "seed")),
    }
    return {name: str(value) for name, value in named.items() if value not in (None, "", NONE)}


def _rho(run: Run) -> str | None:
    """ρ by the evaluation: a round's configuration names what the round begins with, which is ρ in the first alone."""
    rho = model_names(run.evaluation).get("rho")
    return clean(rho) if isinstance(rho, str) else None


def setting_name(run: Run) -> str:
    """What a row of Table 2 calls a run: ``RRHF · top-k, 4 a query``, ``RRHF with dpo``, ``best of 8``, ``PPO``."""
    baseline, settings = run.settings.get("baseline"), run.settings
    number = settings.get("sample.num_responses")
    if baseline == "best-of-n":
        return f"best of {number or 'n'}"
    if baseline:
        return baseline.upper()
    loss = setting(settings, "ranking_loss")
    method = "SFT" if loss == "none" else "RRHF"
    folder, _, number_of_round = run.name.rpartition("/")
    if folder.rpartition("/")[2] == "rounds" and number_of_round.isdigit():
        method += f" IP-{number_of_round}"
    if loss not in (None, HINGE, "none"):
        method += f" with {short_name(loss)}"
    if settings.get("sample") == "null":
        return f"{method} · provided responses"
    drawn = settings.get("sample.source") or settings.get("sample.policy") or settings.get("sample.method")
    parts = [short_name(drawn) if drawn and not drawn.startswith("[") else drawn, number and f"{number} a query"]
    said = ", ".join(part for part in parts if part)
    every = setting(settings, "resample_steps")
    online = f" · again every {every} steps" if every not in (None, "0") else ""
    return f"{method}{f' · {said}' if said else ''}{online}" if settings else NONE


def settings_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """The settings as (name, value in each run, whether runs differ), those that differ first."""
    return _aligned([run.settings for run in runs])


def _aligned(of_runs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str], bool]]:
    names = list(dict.fromkeys(name for one in of_runs for name in one))
    rows = [(name, [one.get(name, NONE) for one in of_runs]) for name in names]
    return sorted(((n, v, len(set(v)) > 1) for n, v in rows), key=lambda row: not row[2])


def environment_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Versions and machine as (name, value in each run, whether runs differ); a value by stages where they differ."""
    return _aligned([_environment(run) for run in runs])


def _environment(run: Run) -> dict[str, str]:
    flat: dict[str, dict[str, list[str]]] = {}
    for one in run.environments:
        stages = [clean(str(stage)) for stage in one.get("stages") or ["?"]]
        machine = dict(one.get("machine") or {})
        memory = finite(machine.pop("memory_bytes", None))
        if memory is not None:
            machine["memory"] = f"{memory / 1e9:.0f} GB"
        values = {**machine, **{f"{name}\u00a0": value for name, value in (one.get("versions") or {}).items()}}
        for name, value in values.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            flat.setdefault(clean(str(name)), {}).setdefault(clean(shown), []).extend(stages)
    return {
        name: next(iter(values))
        if len(values) == 1
        else "; ".join(f"{value} ({', '.join(stages)})" for value, stages in values.items())
        for name, values in flat.items()
    }


def fingerprint_rows(runs: Sequence[Run]) -> list[tuple[str, str, list[str], bool]]:
    """(stage, input, its digest in each run, whether runs differ)."""
    of_runs = [{f"{stage}\0{name}": digest for stage, name, digest in run.fingerprints} for run in runs]
    return [(*name.split("\0", 1), values, differs) for name, values, differs in _aligned(of_runs)]  # type: ignore[misc]


# --- Tables 2 and 6 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultRow:
    """A row of Tables 2 and 6 of the paper; ``samples`` stand only beside what was trained on them."""

    run: str
    model: str
    setting: str
    perplexity: dict[str, float] | None
    reward: dict[str, float] | None
    samples: Any


def result_rows(runs: Sequence[Run]) -> list[ResultRow]:
    """ρ and π of every evaluated run; a ρ that several share, with the same numbers, stands once."""
    rows: list[ResultRow] = []
    for run in runs:
        for model in MODELS:
            numbers = run.evaluation.get(model) or {}
            if not numbers:
                continue
            row = ResultRow(
                run.name,
                model,
                "no tuning" if model == "rho" else setting_name(run),
                _perplexity(numbers),
                _reward(run, model),
                run.samples if model == "pi" else None,
            )
            same = [
                r
                for r in rows
                if model == "rho" == r.model and (r.perplexity, r.reward) == (row.perplexity, row.reward)
            ]
            if not same:
                rows.append(row)
    return rows


def _perplexity(numbers: Mapping[str, Any]) -> dict[str, float] | None:
    value = finite(numbers.get("perplexity"))
    return None if value is None else interval({**(numbers.get("perplexity_interval") or {}), "mean": value})


def _reward(run: Run, model: str) -> dict[str, float] | None:
    """The mean of ``evaluation.json``, with the interval of the texts' rewards where they stand there."""
    mean = finite((run.evaluation.get(model) or {}).get("reward_mean"))
    found = mean_of(run.held, run.main_reward or "", model, run.seed)
    return None if mean is None else interval({**(found or {}), "mean": mean})


@dataclass(frozen=True)
class Gain:
    """One reward's gain in one run; ``side`` is +1, 0 or −1 as the interval lies above, around or below 0.

    ``n``: the prompts on which both texts have a reward, where it is known.
    """

    run: str
    reward: str
    rho: Mapping[str, Any]
    pi: Mapping[str, Any]
    mean: float
    low: float
    high: float
    n: float | None = None

    @property
    def side(self) -> int:
        return interval_side(self.low, self.high)

    @property
    def reading(self) -> str:
        return SIDES[self.side]

    @property
    def long_reading(self) -> str:
        return {1: "lies above 0", 0: "includes 0", -1: "lies below 0"}[self.side]

    @property
    def text(self) -> str:
        low, high = typeset_number(self.low, sign=True), typeset_number(self.high, sign=True)
        return f"{typeset_number(self.mean, sign=True)} (95\u00a0% interval {low} to {high})"


def gains(run: Run) -> list[Gain]:
    """The gains of a run's rewards, the main one first; rewards without an interval are left out."""
    measured = []
    for reward, sides in run.rewards.items():
        gain = sides.get("gain") or (run.evaluation.get("reward_gain") if reward == run.main_reward else None) or {}
        mean, low, high = (finite(gain.get(key)) for key in ("mean", "low", "high"))
        if mean is not None and low is not None and high is not None:
            rho, pi, n = sides.get("rho") or {}, sides.get("pi") or {}, finite(gain.get("n"))
            measured.append(Gain(run.name, reward, rho, pi, mean, low, high, n))
    return measured


def forest(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Place every gain (``mean``, ``low``, ``high``) on one scale that has 0 in it, in per cent of its width."""
    ends = [0.0, *(end for gain in rows for end in (gain.low, gain.high))]
    low, width = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(6 + 88 * (value - low) / width, 2)

    return [
        {"gain": g, "low": place(g.low), "mean": place(g.mean), "high": place(g.high), "zero": place(0)} for g in rows
    ]


def versus(runs: Sequence[Run]) -> list[Gain]:
    """π of each run against π of the first, on the prompts of both, by each reward that both were measured with."""
    found = []
    first, *others = runs
    for run in others:
        for reward in run.rewards:
            apart = paired_with(run.held, first.held, reward, run.seed)
            if apart is not None and reward in first.rewards:
                theirs, own = ({"mean": finite((r.rewards[reward].get("pi") or {}).get("mean"))} for r in (first, run))
                found.append(Gain(run.name, reward, theirs, own, apart["mean"], apart["low"], apart["high"]))
    return found


# --- lengths -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """A reward's gain, raw and at equal length, with the chart of reward by length."""

    run: str
    reward: str
    numbers: Mapping[str, Any]
    chart: Chart | None

    @property
    def side(self) -> int:
        return interval_side(self.numbers["equal"]["low"], self.numbers["equal"]["high"])

    @property
    def reading(self) -> str:
        return SIDES[self.side]


def matched(runs: Sequence[Run]) -> list[Matched]:
    """Every run's and reward's gain at equal length."""
    found = []
    for run in runs:
        for reward in run.rewards:
            numbers = matched_length(run.held, reward, run.seed)
            if numbers is not None:
                found.append(Matched(run.name, reward, numbers, by_length(run, reward, numbers)))
    return found


# --- accuracy and agreement --------------------------------------------------------------------------------------


def accuracy_rows(runs: Sequence[Run], results: Results) -> list[Accuracy]:
    """Table 5, and how π orders its training samples: of the runs, and of files that were given beside them."""
    rows: list[Accuracy] = []
    for run in runs:
        ranking, accuracy = (run.evaluation.get(key) for key in ("ranking", "accuracy"))
        if isinstance(ranking, Mapping):
            rows += accuracies(ranking, run.name, "training samples, by their scores", ("gain", IMPLICIT))
        if isinstance(accuracy, Mapping):
            rows += accuracies(accuracy, run.name, clean(Path(str(accuracy.get("file", "pairs"))).name))
    for name, value in results.accuracy:
        rows += accuracies_of_file(name, value)
    return rows


def agreement_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How far each two rewards of a run agree on ρ's and π's texts."""
    return [{"run": run.name, **line} for run in runs for line in rewards_agree(run.held, run.seed)]
