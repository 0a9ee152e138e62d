"""The folder of a run: its files, its configuration, what each stage's result was made of, and how long it took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.environment import environment
from rrhf.common.errors import UserError
from rrhf.common.files import read_object, write_text
from rrhf.common.launch import is_first
from rrhf.common.locks import only_process
from rrhf.common.settings import differences, refuse_other_settings
from rrhf.common.yaml_text import read_yaml
from rrhf.training.folder import FREE as TRAINING_FREE

# What these set changes no result: a run may go on with others. Those that end in "_" are beginnings of names.
FREE = (
    "iterations",  # more rounds go on from the last
    "evaluate_rounds",
    "hub_token",  # as train.hub_token: folders of before may have it
    "train.watch_",
    "train.alarm",
    "train.alarm_",
    *(f"train.{name}" for name in sorted(TRAINING_FREE)),
    # At the top they go to all three.
    *(f"{stage}{limit.name}" for stage in ("", "sample.", "score.", "evaluate.") for limit in fields(EndpointLimits)),
)


class RunFolder:
    """The files of a run; they mirror the data flow."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.root = folder
        self.config = folder / "config.yaml"
        self.queries = folder / "queries.jsonl"
        self.held_out = folder / "held_out.jsonl"
        self.responses = folder / "responses.jsonl"
        self.scored = folder / "scored.jsonl"
        self.model = folder / "model"
        self.evaluation = folder / "evaluation.json"
        self.report = folder / "report.html"
        self.timings = folder / "timings.json"
        self.made_of = folder / "made-of.json"
        self.environment = folder / "environment.json"
        self.log = folder / "log.txt"
        self.rounds = folder / "rounds"

    def round(self, number: int) -> RunFolder:
        """The folder of a round; queries and held-out prompts are the run's."""
        inner = RunFolder(self.rounds / str(number))
        inner.root, inner.queries, inner.held_out = self.root, self.queries, self.held_out
        return inner

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder for as long as this lasts.

        Raises:
            UserError: another run is in it; the message names its process and machine.
        """
        if not is_first():  # who holds it for all
            return nullcontext()
        refusal = f"{self.folder}: another run is in this folder: {{who}}. Wait for it, or choose another --output"
        return only_process(self.folder, refusal)

    def show(self, inner: RunFolder) -> None:
        """Let this folder's results be those of ``inner``, by links: a run's are its last round's."""
        if not is_first():
            return
        found = sorted(inner.folder.glob(f"{inner.evaluation.stem}.*"))
        for path in (inner.responses, inner.scored, inner.model, *found):
            link, temporary = self.folder / path.name, self.folder / f".{path.name}.link"
            target = path.relative_to(self.folder)
            if link.is_symlink() and link.readlink() == target:
                continue
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.replace(link)

    def remember_config(self, config: dict[str, Any]) -> None:
        """Write the configuration into the folder; refuse to go on with a run that had another.

        One of which nothing came, since it was refused itself, makes way.

        Raises:
            UserError: the folder holds a run of another configuration; the message says where they differ.
        """
        import yaml

        begun = self._is_begun()
        if begun and self.config.exists():
            before, now = _flat(read_yaml(self.config)), _flat(config)
            refuse_other_settings(
                _bound(before),
                _bound(now),
                f"{self.folder} holds a run of another configuration",
                f"go on with `rrhf run {self.config} --output {self.folder}`, or choose another --output",
            )
            if before == now:
                return
        elif begun:
            raise UserError(f"{self.folder} has a run's files but no config.yaml: choose another --output")
        write_text(self.config, yaml.safe_dump(config, allow_unicode=True, sort_keys=False))

    def _is_begun(self) -> bool:
        """Whether a stage, or a round, has left anything here."""
        results = (self.queries, self.held_out, self.responses, self.scored, self.model, self.evaluation, self.rounds)
        return any(path.exists() for path in results) or any(self.folder.glob("*.parts"))

    def remember_inputs(self, stage: str, result: Path, inputs: Mapping[str, str], kept: bool) -> None:
        """Note what a stage's result is made of: names of its inputs → their digests, empty where they are not known.

        Where the result, or a part of it, is ``kept`` from before, refuse to go on if it was made of something else.

        Raises:
            UserError: an input has changed since the stage began; the message names it.
        """
        noted, inside = read_object(self.made_of), f"{self.root}{os.sep}"  # the run's own files move with its folder
        inputs = {name.removeprefix(inside): digest for name, digest in inputs.items()}
        before = noted.get(stage)
        if before is not None:
            before = {name.removeprefix(inside): digest for name, digest in before.items()}
        changed = [name for name in differences(before or {}, inputs) if inputs.get(name)]  # of the others nobody knows
        if kept and before is not None and changed:
            raise UserError(
                f"{result} was made before {' and '.join(changed)} changed: put back what it was made of, remove "
                f"{result} to make it anew, or choose another --output"
            )
        if is_first() and (changed or before is None):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.made_of, json.dumps({**noted, stage: inputs}, indent=1) + "\n")

    def remember_environment(self, stage: str) -> None:
        """Note on what a stage is done: ``environments``, each with its stages; a run may go on on another machine."""
        if not is_first():
            return
        here = environment()
        noted = read_object(self.environment).get("environments", [])
        if not noted or {name: noted[-1].get(name) for name in here} != here:
            noted.append({**here, "stages": []})
        if stage not in noted[-1]["stages"]:
            noted[-1]["stages"].append(stage)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.environment, json.dumps({"environments": noted}, indent=1) + "\n")

    def split_time(self, stage: str, parts: Mapping[str, float]) -> None:
        """Count ``parts``, seconds by stage, as theirs and no more as those of ``stage``, in which they passed."""
        if not is_first():
            return
        timings = read_object(self.timings)
        for name, seconds in {**parts, stage: -sum(parts.values())}.items():
            timings[name] = round(max(timings.get(name, 0.0) + seconds, 0.0), 2)
        write_text(self.timings, json.dumps(timings, indent=1) + "\n")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of what is inside to the stage's in timings.json, also where it is stopped."""
        begin = time.monotonic()
        try:
            yield
        finally:
            if is_first():  # of several processes, whose time passes at once
                self._add(stage, time.monotonic() - begin)

    def _add(self, stage: str, seconds: float) -> None:
        timings = read_object(self.timings)
        timings[stage] = round(timings.get(stage, 0.0) + seconds, 2)
        write_text(self.timings, json.dumps(timings, indent=1) + "\n")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's settings by name (``train.max_steps``), without those that change no result."""
    return _bound(_flat(dict(config)))


def _bound(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Without the settings that change no result."""
    beginnings = tuple(name for name in FREE if name.endswith("_"))
    return {key: value for key, value in flat.items() if key not in FREE and not key.startswith(beginnings)}
