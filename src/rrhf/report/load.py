"""Read what a run folder holds; whatever is missing is named, never fatal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError

RUN_FILES = (
    "config.yaml",
    "queries.jsonl",
    "responses.jsonl",
    "scored.jsonl",
    "model/trainer_state.json",
    "evaluation.json",
    "timings.json",
)


@dataclass(frozen=True)
class Samples:
    """The training samples' rewards, as in Table 6 of the paper (arXiv 2304.05302).

    ``mean`` and ``std`` are over all scored responses, ``mean_max`` is the mean over queries of the best response's
    reward, and ``by_source`` has (source, number, mean) with the numbers of draws ("top-k/0", "top-k/1") put together.
    """

    queries: int
    responses: int
    unscored: int
    cut: int
    no_pairs: int
    fewest: int
    most: int
    mean: float
    std: float
    mean_max: float
    reward: str | None
    by_source: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Generation:
    """What ρ and π wrote for one held-out prompt. ``query`` is a list of (role, text); plain text has the role ""."""

    query: tuple[tuple[str, str], ...]
    rho: str
    pi: str
    rho_rewards: dict[str, float | None]
    pi_rewards: dict[str, float | None]
    rho_finish: str
    pi_finish: str


@dataclass(frozen=True)
class Run:
    """One run folder, read. Empty values stand for missing files; ``missing`` says which and why."""

    name: str
    settings: dict[str, str]
    evaluation: dict[str, Any]
    rewards: dict[str, dict[str, Any]]
    generations: list[Generation]
    generations_total: int
    values: dict[str, dict[str, list[float]]]  # reward name → "rho" | "pi" → one number a held-out prompt
    history: list[dict[str, float]]
    samples: Samples | None
    timings: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def main_reward(self) -> str | None:
        """The name of the reward that the gain is measured with: the first one of ``evaluation.json``."""
        return next(iter(self.rewards), None)


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def clean(text: str) -> str:
    """Replace what no HTML page can hold: lone surrogates and control characters other than tab and newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Parse a small file that must hold a mapping."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}. Remove it and run the stage that writes it again."
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds no mapping of names to values. Remove it and run the stage that writes it again."
        )
    return value


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names and printable values, in the order of the file."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return {clean(prefix): clean(text)}


def setting(settings: Mapping[str, str], *names: str) -> str | None:
    """Find a setting by the first of ``names`` that is there, at the top or in whatever section holds it."""
    for name in names:
        for key, value in settings.items():
            if (key == name or key.endswith(f".{name}")) and value not in ("", "null"):
                return value
        section = {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}
        if section:
            return ", ".join(f"{key} {value}" for key, value in section.items() if value not in ("", "null"))
    return None


def _check_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Refuse an evaluation whose parts are no mappings, with the names of those parts."""
    wrong: list[str] = []

    def inner(name: str, holder: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = holder.get(key)
        if value is not None and not isinstance(value, dict):
            wrong.append(name)
        return value if isinstance(value, dict) else {}

    for part in ("rho", "pi", "reward_gain"):
        inner(part, evaluation, part)
    rewards = inner("rewards", evaluation, "rewards")
    for reward in rewards:
        sides = inner(f"rewards {reward}", {reward: rewards[reward] or 0}, reward)
        for part in ("rho", "pi", "gain"):
            inner(f"rewards {reward} {part}", sides, part)
    if wrong:
        raise UserError(
            f"{path}: no mapping of names to values in {', '.join(wrong)}. Remove it and run the evaluation again."
        )


def _history(folder: Path) -> list[dict[str, float]] | None:
    """Read the log history of the finished training, or of the last checkpoint where it has not finished."""

    def step(path: Path) -> int:
        number = path.parent.name.rpartition("-")[2]
        return int(number) if number.isdigit() else -1

    checkpoints = sorted((folder / "model").glob("checkpoint-*/trainer_state.json"), key=step, reverse=True)
    for path in (folder / "model" / "trainer_state.json", *checkpoints):
        if path.is_file():
            rows = _mapping(path, json.loads).get("log_history") or []
            return [
                {k: v for k, x in row.items() if (v := finite(x)) is not None} for row in rows if isinstance(row, dict)
            ]
    return None


def _base(source: str) -> str:
    """Name the policy of a source: "top-k/3" is the fourth draw of "top-k"."""
    head, _, tail = source.rpartition("/")
    return head if head and tail.isdigit() else source


def _samples(path: Path, reward: str | None) -> Samples | None:
    """Go through the scored records once. Where each names ``reward``, it is used, else ``scores``."""
    import numpy as np

    from rrhf.records.files import read_records
    from rrhf.records.record import Record

    def values(record: Record, name: str | None) -> Sequence[float | None]:
        return record.rewards[name] if name is not None else record.scores

    def measure(name: str | None) -> Samples | None:
        everything: list[float] = []
        maxima: list[float] = []
        sources: dict[str, list[float]] = {}
        responses = unscored = cut = no_pairs = 0
        sizes: list[int] = []
        for record in read_records(path, require="scores"):
            found = values(record, name)
            sizes.append(len(record.responses))
            responses += len(record.responses)
            cut += sum(finish == "length" for finish in record.finish)
            scored = [value for value in found if value is not None]
            unscored += len(found) - len(scored)
            no_pairs += len(set(scored)) < 2
            everything += scored
            if scored:
                maxima.append(max(scored))
            for source, value in zip(record.sources, found):
                if value is not None:
                    sources.setdefault(_base(source), []).append(value)
        if not everything:
            return None
        by_source = tuple((clean(name), len(some), float(np.mean(some))) for name, some in sorted(sources.items()))
        return Samples(
            queries=len(sizes),
            responses=responses,
            unscored=unscored,
            cut=cut,
            no_pairs=no_pairs,
            fewest=min(sizes),
            most=max(sizes),
            mean=float(np.mean(everything)),
            std=float(np.std(everything)),
            mean_max=float(np.mean(maxima)),
            reward=name,
            by_source=by_source,
        )

    if reward is not None:
        try:
            return measure(reward)
        except KeyError:
            pass  # the training samples were scored by something else: `scores` says what training used
    return measure(None)


def _messages(query: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(query, list):
        return tuple((clean(str(m.get("role", ""))), clean(str(m.get("content", "")))) for m in query)
    return (("", clean(str(query))),)


def _generations(path: Path) -> Iterator[Generation]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield Generation(
                    query=_messages(row["query"]),
                    rho=clean(row["rho"]),
                    pi=clean(row["pi"]),
                    rho_rewards={k: finite(v) for k, v in (row.get("rho_rewards") or {}).items()},
                    pi_rewards={k: finite(v) for k, v in (row.get("pi_rewards") or {}).items()},
                    rho_finish=str(row.get("rho_finish", "stop")),
                    pi_finish=str(row.get("pi_finish", "stop")),
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {number}: no generation with query, rho and pi ({type(error).__name__}: {error}). "
                    "Remove the file and evaluation.json and run the evaluation again."
                ) from error


def _rewards(evaluation: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return ρ, π and gain of every reward; an evaluation that names none has the main one under its setting's name."""
    if evaluation.get("rewards"):
        return dict(evaluation["rewards"])
    if not evaluation:
        return {}
    sides = {
        side: {key: (evaluation.get(side) or {}).get(f"reward_{key}") for key in ("mean", "std")}
        for side in ("rho", "pi")
    }
    return {setting(settings, "reward") or "reward": {**sides, "gain": evaluation.get("reward_gain")}}


def load_run(folder: str | Path, name: str | None = None, max_generations: int = 500) -> Run:
    """Read a run folder.

    Args:
        folder: a folder written by ``rrhf run``, finished or not.
        name: what to call it; the folder's own name by default.
        max_generations: how many before/after texts to keep; the numbers are taken from all of them.

    Raises:
        UserError: the folder holds none of a run's files, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any((folder / file).exists() for file in (*RUN_FILES, "model")):
        what = "holds none of a run's files" if folder.is_dir() else "is no folder"
        raise UserError(
            f"{folder}: {what}; expected a run folder written by `rrhf run CONFIG.yaml --output RUN`, with at least "
            f"one of {', '.join(RUN_FILES)}"
        )
    missing: dict[str, str] = {}

    def small(file: str, part: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
        if (folder / file).is_file():
            return _mapping(folder / file, parse)
        missing[part] = f"{file} is missing"
        return {}

    settings_tree = small("config.yaml", "settings", _yaml)
    settings = flatten(settings_tree) if settings_tree else {}
    evaluation = small("evaluation.json", "evaluation")
    _check_evaluation(folder / "evaluation.json", evaluation)
    rewards = _rewards(evaluation, settings)
    timings = {k: v for k, x in small("timings.json", "timings").items() if (v := finite(x)) is not None}

    history = _history(folder)
    if not history:
        missing["training"] = "model/trainer_state.json is missing" if history is None else "nothing was logged yet"

    samples = None
    if (folder / "scored.jsonl").is_file():
        samples = _samples(folder / "scored.jsonl", next(iter(rewards), None))
        if samples is None:
            missing["samples"] = "scored.jsonl has no scored response"
    else:
        missing["samples"] = "scored.jsonl is missing"

    file = str(evaluation.get("generations") or "generations.jsonl")
    kept: list[Generation] = []
    total = 0
    values: dict[str, dict[str, list[float]]] = {}
    if (folder / file).is_file():
        for generation in _generations(folder / file):
            total += 1
            if len(kept) < max_generations:
                kept.append(generation)
            for side, found in (("rho", generation.rho_rewards), ("pi", generation.pi_rewards)):
                for reward, value in found.items():
                    if value is not None:
                        values.setdefault(reward, {"rho": [], "pi": []})[side].append(value)
    if not kept:
        missing["generations"] = f"{file} is {'empty' if (folder / file).is_file() else 'missing'}"
    return Run(
        name=clean(name or folder.resolve().name),
        settings=settings,
        evaluation=evaluation,
        rewards=rewards,
        generations=kept,
        generations_total=total,
        values=values,
        history=history or [],
        samples=samples,
        timings=timings,
        missing=missing,
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest tail of its path that tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, parts))
    for depth in range(1, deepest + 1):
        names = ["/".join(some[-depth:]) for some in parts]
        if len(set(names)) == len(names) and not any(map(str.isdigit, names)):  # "rounds/1", not "1"
            return names
    return [f"{folder.resolve().name} ({number})" for number, folder in enumerate(folders, 1)]
