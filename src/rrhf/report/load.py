"""Read what a run folder holds; whatever is missing is named, never fatal."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import checksum_of_file, inside
from rrhf.common.presentation import clean, finite
from rrhf.common.yaml_text import load_yaml
from rrhf.evaluation.held_out import HeldOut
from rrhf.evaluation.pairs import MEAN, most_violated
from rrhf.evaluation.samples import Samples, measure_records, measure_samples, scored_records
from rrhf.records.files import read_records
from rrhf.report.choice import choose
from rrhf.report.run import Generation, RankedPair, Run, Window
from rrhf.training.folder import SETTINGS, TRAINED
from rrhf.training.windows import FOLDER, Windows

RUN_FILES = (
    "config.yaml",
    "queries.jsonl",
    "responses.jsonl",
    "scored.jsonl",
    "model/trainer_state.json",
    "evaluation.json",
    "timings.json",
)
MODEL_FILES = ("trainer_state.json", TRAINED, SETTINGS)  # of a folder that a training alone wrote

TEXT_LENGTH = 2_000  # characters of a text on the page: a row is no longer than a sheet of paper


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Parse a small file that must hold a mapping."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read: {error}. Remove it and run the stage that writes it again."
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds no mapping of names to values. Remove it and run the stage that writes it again."
        )
    return value


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


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a generations' file, each with its line as ``number``."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield {**json.loads(line), "number": number}
                except (ValueError, TypeError, RecursionError) as error:
                    raise _no_generation(path, number, error) from error


def _no_generation(path: Path, number: int, error: Exception) -> UserError:
    return UserError(
        f"{path}, line {number}: no generation with query, rho and pi ({type(error).__name__}: {error}). "
        "Remove the file and evaluation.json and run the evaluation again."
    )


def _generation(row: Mapping[str, Any]) -> Generation:
    return Generation(
        number=row["number"],
        query=tuple((role, _cut(text)) for role, text in _messages(row["query"])),
        rho=_cut(clean(row.get("rho", ""))),
        pi=_cut(clean(row["pi"])),
        rho_rewards={name: finite(value) for name, value in (row.get("rho_rewards") or {}).items()},
        pi_rewards={name: finite(value) for name, value in (row.get("pi_rewards") or {}).items()},
        rho_finish=str(row.get("rho_finish", "stop")),
        pi_finish=str(row.get("pi_finish", "stop")),
    )


def _cut(text: str) -> str:
    """The text as the page shows it."""
    if len(text) <= TEXT_LENGTH:
        return text
    return f"{text[:TEXT_LENGTH]} … ({len(text) - TEXT_LENGTH:,} more characters in the file)"


def _size(texts: Generation) -> int:
    """Bytes on the page, about."""
    shown = (*(text for _, text in texts.query), texts.rho, texts.pi)
    return 700 + sum(len(html.escape(text).encode()) for text in shown)


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
        inner = folder / "model"
        # `rrhf train` and the baselines write a model's folder alone; what belongs to a run is then missing.
        self.model = folder if not inner.exists() and any((folder / file).exists() for file in MODEL_FILES) else inner

    def small(self, file: str, part: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
        """The mapping in a small file; empty where the file is missing."""
        if (self.folder / file).is_file():
            return _mapping(self.folder / file, parse)
        self.missing[part] = f"{file} is missing"
        return {}

    def of_model(self, file: str) -> dict[str, Any]:
        """The mapping in a small file of the model's folder; empty where there is none."""
        path = self.model / file
        return _mapping(path, json.loads) if path.is_file() else {}

    def settings(self) -> dict[str, str]:
        if self.model == self.folder and not (self.folder / "config.yaml").exists():
            tree = self.of_model(SETTINGS) or self.of_model(TRAINED).get("settings") or {}
        else:
            tree = self.small("config.yaml", "settings", lambda text: load_yaml(text) or {})
        return flatten(tree) if tree else {}

    def evaluation(self) -> dict[str, Any]:
        evaluation = self.small("evaluation.json", "evaluation")
        _check_evaluation(self.folder / "evaluation.json", evaluation)
        return evaluation

    def environments(self, training: Mapping[str, Any]) -> list[dict[str, Any]]:
        """On what the stages were done; of a training alone, on what it ended."""
        path = self.folder / "environment.json"
        noted = (_mapping(path, json.loads).get("environments") or []) if path.is_file() else []
        found = [one for one in noted if isinstance(one, dict)]
        if not found and isinstance(training.get("environment"), dict):
            found = [{**training["environment"], "stages": ["train"]}]
        if not found:
            self.missing["environment"] = "environment.json is missing"
        return found

    def fingerprints(self, training: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """(stage, input, digest) of all that the stages were made of."""
        path = self.folder / "made-of.json"
        noted: dict[str, Any] = _mapping(path, json.loads) if path.is_file() else {}
        if not noted:
            settings = training.get("settings") or self.of_model(SETTINGS)
            names = {"data": "data_checksum", "model": "model_digest", "eval_data": "eval_data_checksum"}
            noted = {
                "train": {Path(str(settings[n])).name: settings[key] for n, key in names.items() if settings.get(key)}
            }
        rows = [
            (clean(stage), clean(_inside(str(name))), clean(str(digest)))
            for stage, inputs in noted.items()
            if isinstance(inputs, dict)
            for name, digest in inputs.items()
            if digest
        ]
        if not rows:
            self.missing["fingerprints"] = "made-of.json is missing"
        return rows

    def timings(self) -> dict[str, float]:
        return _finite_only(self.small("timings.json", "timings"))

    def history(self) -> list[dict[str, float]]:
        """The log history of the finished training, or of the last checkpoint where it has not finished."""

        def step(path: Path) -> int:
            number = path.parent.name.rpartition("-")[2]
            return int(number) if number.isdigit() else -1

        checkpoints = sorted(self.model.glob("checkpoint-*/trainer_state.json"), key=step, reverse=True)
        state = next((path for path in (self.model / "trainer_state.json", *checkpoints) if path.is_file()), None)
        log = (_mapping(state, json.loads).get("log_history") or []) if state else []
        rows = [_finite_only(row) for row in log if isinstance(row, dict)]
        if not rows:
            self.missing["training"] = "nothing was logged yet" if state else "model/trainer_state.json is missing"
        return rows

    def samples(self, reward: str | None, settings: Mapping[str, str], seed: int) -> Samples | None:
        """The rewards of the training samples, by ``reward`` where they were scored by it."""
        windows = self._windows()
        if windows:
            records = [path for _, path in windows]
            for name in dict.fromkeys((reward, None)):
                try:
                    every = chain.from_iterable(scored_records(path) for path in records)
                    return measure_records(every, name, seed)
                except KeyError:
                    continue
        path = self.folder / "scored.jsonl"
        if not path.is_file() and self.model == self.folder and settings.get("data"):
            path = Path(settings["data"])  # of a training alone: what it was trained on, where it still stands
            if not _holds(path, settings.get("data_checksum", "")):  # who sent the folder may name any file of ours
                self.missing["samples"] = f"{path.name} is missing, or holds something else than what was trained on"
                return None
        try:
            samples = measure_samples(path, reward, seed) if path.is_file() else None
        except UserError:
            if path.name == "scored.jsonl":
                raise
            samples = None  # queries without scores, as PPO takes them
        if samples is None:
            what = "has no scored response" if path.is_file() else "is missing"
            self.missing["samples"] = f"{path.name} {what}"
        return samples

    def _windows(self) -> list[tuple[int, Path]]:
        windows = Windows(self.model / FOLDER)
        return [(n, windows.records(n)) for n in windows.numbers() if windows.records(n).is_file()]

    def windows(self, seed: int) -> list[Window]:
        """The samples of each window, by the scores that training used; its step stands behind the records' ids."""
        found = []
        for _, path in self._windows():
            first = next(scored_records(path), None)
            samples = measure_samples(path, None, seed)
            step = (first.id.rpartition("@")[2] if first else "") or "0"
            if samples is not None and step.isdigit():
                found.append(Window(int(step), samples))
        return found

    def generations(self, file: str, reward: str | None, most: int, budget: int) -> tuple[HeldOut, list[Generation]]:
        """The numbers of all generations, and those that stand on the page: ``choose`` by their gain."""
        held, sizes = HeldOut(), []
        path = inside(self.folder, file)
        for row in _rows(path) if path.is_file() else ():
            try:
                held.add(row)
                sizes.append(_size(_generation(row)))
            except (KeyError, TypeError, AttributeError) as error:
                raise _no_generation(path, row["number"], error) from error
        if not sizes:
            self.missing["generations"] = f"{file} is {'empty' if path.is_file() else 'missing'}"
            return held, []
        gains = held.gains(reward) if reward else [None] * len(sizes)
        chosen = set(choose(gains, sizes, most, budget))
        return held, [_generation(row) for place, row in enumerate(_rows(path)) if place in chosen]

    def ranked(self, file: str, most: int) -> list[RankedPair]:
        """The most violated pairs of the training samples that the evaluation looked at, the worst first."""
        path = inside(self.folder, file)
        pairs = []
        for record in read_records(path) if path.is_file() else ():
            logprobs = record.rewards.get(f"{MEAN} pi") or []
            found = most_violated(record.scores, logprobs) if logprobs and record.scores else None
            if found is None:
                continue
            before = record.rewards.get(f"{MEAN} rho") or [None] * len(record.responses)

            def side(index: int, record: Any = record, now: Any = logprobs, rho: Any = before) -> Any:
                text, source = _cut(clean(record.responses[index])), clean(record.sources[index])
                return text, source, record.scores[index], now[index], rho[index]

            query = tuple((role, _cut(text)) for role, text in _messages(record.query))
            pairs.append(RankedPair(query, side(found.better), side(found.worse), found))
        if not pairs:
            self.missing["ranked"] = f"{file} is missing"
        return sorted(pairs, key=lambda pair: -pair.violation.margin)[:most]


def _inside(name: str) -> str:
    """A name without the folders of an absolute path: where something lies on a machine is nobody's business."""
    return Path(name).name if name.startswith("/") else name


def _holds(path: Path, checksum: str) -> bool:
    """Whether ``path`` is a file, and the one that was noted."""
    try:
        return path.is_file() and checksum_of_file(path) == checksum
    except OSError:
        return False


def _finite_only(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: number for name, value in row.items() if (number := finite(value)) is not None}


def load_run(folder: str | Path, name: str | None = None, most: int = 500, budget: int = 3_000_000) -> Run:
    """Read a run folder, or the folder of a model that a training alone wrote.

    Args:
        folder: a folder written by ``rrhf run``, ``rrhf train`` or ``rrhf baseline``, finished or not.
        name: what to call it; the folder's own name by default.
        most: how many before/after texts to keep; the numbers are taken from all of them.
        budget: how many bytes these may take on a page.

    Raises:
        UserError: the folder holds none of a run's files, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any((folder / file).exists() for file in (*RUN_FILES, *MODEL_FILES, "model")):
        what = "holds none of a run's files" if folder.is_dir() else "is no folder"
        raise UserError(
            f"{folder}: {what}; expected a run folder written by `rrhf run CONFIG.yaml --output RUN`, with at least "
            f"one of {', '.join(RUN_FILES)}, or a model's folder written by `rrhf train` or `rrhf baseline`"
        )
    try:
        return _read(folder, clean(name or folder.resolve().name), most, budget)
    except OSError as error:  # a name in one of them may be longer than the file system has names, too
        raise UserError(f"{folder}: {clean(Path(error.filename or '').name)[:80]}: {error.strerror}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: one of its files holds other values than rrhf writes there ({type(error).__name__}: {error}). "
            "Remove it and run the stage that writes it again."
        ) from error


def _read(folder: Path, name: str, most: int, budget: int) -> Run:
    files = _Folder(folder)
    settings, evaluation, training = files.settings(), files.evaluation(), files.of_model(TRAINED)
    rewards = _rewards(evaluation, settings)
    main, seed = next(iter(rewards), None), int(finite(evaluation.get("seed")) or 0)
    generations = Path(str(evaluation.get("generations") or "generations.jsonl")).name
    held, kept = files.generations(generations, main, most, budget)
    ranked = "evaluation.pairs.jsonl"
    return Run(
        name=name,
        settings=settings,
        training=training,
        environments=files.environments(training),
        fingerprints=files.fingerprints(training),
        evaluation=evaluation,
        rewards=rewards,
        history=files.history(),
        samples=files.samples(main, settings, seed),
        windows=files.windows(seed),
        timings=files.timings(),
        held=held,
        generations=kept,
        generations_file=generations,
        # `rrhf evaluate --pairs` writes people's preferences under that name: they are no training samples.
        ranked=files.ranked(ranked, most // 2) if evaluation.get("ranking") else [],
        ranked_file=ranked,
        missing=files.missing,
    )


def with_rounds(folders: Sequence[Path]) -> list[Path]:
    """The folders, and in the place of a run in rounds those of its rounds, in order."""
    found: list[Path] = []
    for folder in folders:
        rounds = [path for path in (folder / "rounds").glob("*") if path.name.isdigit() and path.is_dir()]
        found += sorted(rounds, key=lambda path: int(path.name)) or [folder]
    return found


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest tail of its path that tells it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names) and not any(map(str.isdigit, names)):  # "rounds/1", not "1"
            return names
    return [f"{folder.resolve().name} ({number})" for number, folder in enumerate(folders, 1)]
