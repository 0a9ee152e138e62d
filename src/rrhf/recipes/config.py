"""A run's configuration: YAML sections whose keys are the flags of the stages' commands, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.flags import Flags, as_arguments
from rrhf.evaluation.stage import EvaluationSettings
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.remote import RemoteSettings

if TYPE_CHECKING:
    from rrhf.training.alarms import WatchSettings
    from rrhf.training.config import RRHFConfig


@dataclass(frozen=True)
class DataSettings:
    """Where the queries come from."""

    source: str = field(
        metadata={"help": "a file, a data set's id, or pkg.module:function that returns records, given limit and seed"}
    )
    format: str | None = field(default=None, metadata={"help": "how the source's rows become records (see convert)"})
    split: str = field(default="train", metadata={"help": "split of a hub data set"})
    limit: int | None = field(default=None, metadata={"help": "at most this many training queries"})
    held_out: str | None = field(
        default=None, metadata={"help": "held-out prompts, like source; default: taken from the front of the source"}
    )
    held_out_limit: int = field(default=128, metadata={"help": "how many held-out prompts"})
    provided: bool = field(default=True, metadata={"help": "false drops the responses that the data set provides"})
    seed: int = field(default=0, metadata={"help": "given to a source that is a function"})


@dataclass(frozen=True)
class SourceSettings:
    """Where responses come from, where it is not the one model."""

    source: list[str] = field(
        default_factory=list,
        metadata={"help": "MODEL@POLICY:N, URL@chat:N, URL@completions:N, vllm:MODEL@POLICY:N, "
                          "openvino:FOLDER@POLICY:N or a file; repeatable",
                  "nargs": "+", "action": "extend"},
    )  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """The parsed sections; ``sample`` is ``None`` where only provided responses are ranked (setting P)."""

    data: DataSettings
    model: ModelSettings
    text: TextSettings
    sample: SamplingSettings | None
    sources: list[str]
    remote: RemoteSettings
    score: RewardSettings
    adapter: AdapterSettings
    train: RRHFConfig
    watch: WatchSettings
    evaluate_rewards: RewardSettings
    evaluate_sampling: SamplingSettings
    evaluate: EvaluationSettings


SECTIONS = ("data", "sample", "score", "train", "evaluate")


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files("rrhf"))) / "recipes" / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_config(name: str) -> dict[str, Any]:
    """Read a configuration: a file, or the name of one that is shipped. ``extends: NAME`` lays it over another.

    Raises:
        UserError: no such file, no valid YAML, or not a mapping.
    """
    import yaml

    path = shipped().get(name, Path(name))
    if not path.exists():
        raise UserError(f"{name}: no such configuration file; shipped ones: {', '.join(shipped())}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: a configuration is a mapping with the sections {', '.join(SECTIONS)}")
    base = found.pop("extends", None)
    return merge(read_config(base), found) if base else found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = merge(base[key], value) if both else value
    return merged


def override(config: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``section.key=value`` (or ``key=value`` for a shared key); values are YAML.

    Raises:
        UserError: not an assignment, or a value that is no YAML.
    """
    import yaml

    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"{assignment!r}: give section.key=value, for example train.learning_rate=1e-5")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{assignment!r}: the value is not valid YAML: {error}") from error
        section, dot, key = name.partition(".")
        config = merge(config, {section: {key: value}} if dot else {name: value})
    return config


def parse_config(config: Mapping[str, Any], model_folder: Path) -> RunConfig:
    """Check every section against its stage's flags.

    A key outside the sections (``model``, ``seed``, ``device`` …) goes to every stage that has such a flag and does not
    set it itself.

    Raises:
        UserError: all unknown keys and unfit values, each with its section, in one message.
    """
    from rrhf.training.alarms import WatchSettings
    from rrhf.training.config import RRHFConfig

    classes: dict[str, list[type]] = {
        "data": [DataSettings],
        "sample": [SourceSettings, RemoteSettings, SamplingSettings],
        "score": [RewardSettings],
        "train": [AdapterSettings, RRHFConfig, WatchSettings],
        "evaluate": [RewardSettings, SamplingSettings, EvaluationSettings],
    }
    shared_classes: list[type] = [ModelSettings, TextSettings]
    flags = {name: Flags(kinds, f"run, section {name}", "") for name, kinds in classes.items()}
    shared_flags = Flags(shared_classes, "run", "")
    shared = {key: value for key, value in config.items() if key not in SECTIONS}
    known = {name: {flag.removeprefix("--") for flag in parser.known()} for name, parser in flags.items()}
    known_shared = {flag.removeprefix("--") for flag in shared_flags.known()}
    faults = []
    for key in shared:
        if key not in known_shared and not any(key in keys for keys in known.values()):
            faults.append(f"{key}: unknown key: {nearest(key, known_shared | set(SECTIONS))}")
    parsed: dict[str, tuple[Any, ...]] = {}
    for name in SECTIONS:
        section = config.get(name)
        if name == "sample" and name in config and section is None:
            continue  # setting P: nothing is sampled
        section = dict(section or {})
        for key in list(section):
            if key not in known[name]:
                close = nearest(key, known[name]).partition("known:")[0].strip()
                faults.append(f"{name}.{key}: unknown key{': ' + close if close else ''} (see `rrhf {name} --help`)")
                section.pop(key)
        section = {**{key: value for key, value in shared.items() if key in known[name]}, **section}
        if name == "train":
            section["output_dir"] = str(model_folder)
        try:
            parsed[name] = flags[name].parse(as_arguments(section, name))
        except (UserError, ValueError) as error:
            faults.append(f"section {name}: {str(error).partition('; `rrhf')[0]}")
    try:
        common = {key: value for key, value in shared.items() if key in known_shared}
        model, text = shared_flags.parse(as_arguments(common, "configuration"))
    except (UserError, ValueError) as error:
        faults.append(str(error).partition("; `rrhf")[0])
    if faults:
        raise UserError("the configuration has faults:\n  " + "\n  ".join(faults))
    return RunConfig(
        data=parsed["data"][0],
        model=model,
        text=text,
        sample=parsed["sample"][2] if "sample" in parsed else None,
        sources=parsed["sample"][0].source if "sample" in parsed else [],
        remote=parsed["sample"][1] if "sample" in parsed else RemoteSettings(),
        score=parsed["score"][0],
        adapter=parsed["train"][0],
        train=parsed["train"][1],
        watch=parsed["train"][2],
        evaluate_rewards=parsed["evaluate"][0],
        evaluate_sampling=parsed["evaluate"][1],
        evaluate=parsed["evaluate"][2],
    )
