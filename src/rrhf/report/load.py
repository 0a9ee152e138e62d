"""Read what a run folder holds; whatever is missing is named, never fatal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import inside
from rrhf.common.presentation import clean, finite
from rrhf.report.samples import Samples, measure_samples

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


def _messages(query: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(query, list):
        return tuple((clean(str(m.get("role", ""))), clean(str(m.get("content", "")))) for m in query)
    return (("", clean(str(query))),)


def _read_generations(path: Path) -> Iterator[Generation]:
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
                    rho_rewards={name: finite(value) for name, value in (row.get("rho_rewards") or {}).items()},
                    pi_rewards={name: finite(value) for name, value in (row.get("pi_rewards") or {}).items()},
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


class _Folder:
    """The files of one run folder, and which of them are missing: part of the report → why it must be left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: dict[str, str] = {}

    def small(self, file: str, part: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
        """The mapping in a small file; empty where the file is missing."""
        if (self.folder / file).is_file():
            return _mapping(self.folder / file, parse)
        self.missing[part] = f"{file} is missing"
        return {}

    def settings(self) -> dict[str, str]:
        tree = self.small("config.yaml", "settings", _yaml)
        return flatten(tree) if tree else {}

    def evaluation(self) -> dict[str, Any]:
        evaluation = self.small("evaluation.json", "evaluation")
        _check_evaluation(self.folder / "evaluation.json", evaluation)
        return evaluation

    def timings(self) -> dict[str, float]:
        return _finite_only(self.small("timings.json", "timings"))

    def history(self) -> list[dict[str, float]]:
        """The log history of the finished training, or of the last checkpoint where it has not finished."""

        def step(path: Path) -> int:
            number = path.parent.name.rpartition("-")[2]
            return int(number) if number.isdigit() else -1

        model = self.folder / "model"
        checkpoints = sorted(model.glob("checkpoint-*/trainer_state.json"), key=step, reverse=True)
        state = next((path for path in (model / "trainer_state.json", *checkpoints) if path.is_file()), None)
        log = (_mapping(state, json.loads).get("log_history") or []) if state else []
        rows = [_finite_only(row) for row in log if isinstance(row, dict)]
        if not rows:
            self.missing["training"] = "nothing was logged yet" if state else "model/trainer_state.json is missing"
        return rows

    def samples(self, reward: str | None) -> Samples | None:
        """The rewards of the training samples, by ``reward`` where they were scored by it."""
        path = self.folder / "scored.jsonl"
        samples = measure_samples(path, reward) if path.is_file() else None
        if samples is None:
            self.missing["samples"] = f"scored.jsonl {'has no scored response' if path.is_file() else 'is missing'}"
        return samples

    def generations(self, file: str, most: int) -> tuple[list[Generation], int, dict[str, dict[str, list[float]]]]:
        """The first ``most`` generations, the number of all, and the rewards of all (as ``Run.values``)."""
        kept: list[Generation] = []
        total = 0
        values: dict[str, dict[str, list[float]]] = {}
        path = inside(self.folder, file)
        for generation in _read_generations(path) if path.is_file() else ():
            total += 1
            if len(kept) < most:
                kept.append(generation)
            for side, rewards in (("rho", generation.rho_rewards), ("pi", generation.pi_rewards)):
                for reward, value in rewards.items():
                    if value is not None:
                        values.setdefault(reward, {"rho": [], "pi": []})[side].append(value)
        if not kept:
            self.missing["generations"] = f"{file} is {'empty' if path.is_file() else 'missing'}"
        return kept, total, values


def _finite_only(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: number for name, value in row.items() if (number := finite(value)) is not None}


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
    files = _Folder(folder)
    settings, evaluation = files.settings(), files.evaluation()
    rewards = _rewards(evaluation, settings)
    kept, total, values = files.generations(str(evaluation.get("generations") or "generations.jsonl"), max_generations)
    return Run(
        name=clean(name or folder.resolve().name),
        settings=settings,
        evaluation=evaluation,
        rewards=rewards,
        history=files.history(),
        samples=files.samples(next(iter(rewards), None)),
        timings=files.timings(),
        generations=kept,
        generations_total=total,
        values=values,
        missing=files.missing,
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest tail of its path that tells it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names) and not any(map(str.isdigit, names)):  # "rounds/1", not "1"
            return names
    return [f"{folder.resolve().name} ({number})" for number, folder in enumerate(folders, 1)]
