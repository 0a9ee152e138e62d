"""A run's configuration: YAML sections whose keys are the flags of the stages' commands, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.cluster.settings import ClusterSettings
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError, nearest, too_small
from rrhf.common.flags import Flags, as_arguments
from rrhf.common.yaml_text import load_yaml, read_yaml
from rrhf.evaluation.stage import REFUSED, EvaluationSettings
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.rewards.stage import RewardSettings, ScoringSettings
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from argparse import Action

    from rrhf.training.config import RRHFConfig
    from rrhf.training.watch_settings import WatchSettings


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

    def __post_init__(self) -> None:
        if faults := too_small(self, limit=1, held_out_limit=1):
            raise UserError("\n".join(faults))


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
class RoundSettings:
    """How often a run samples, scores and trains (IP-n)."""

    iterations: int = field(
        default=1, metadata={"help": "rounds of sample → score → train, each from the model of the one before (IP-n)"}
    )
    evaluate_rounds: int = field(
        default=0, metadata={"help": "held-out prompts on which each round before the last is measured; 0: none"}
    )

    def __post_init__(self) -> None:
        if faults := too_small(self, iterations=1, evaluate_rounds=0):
            raise UserError("\n".join(faults))


@dataclass(frozen=True)
class RankedSettings:
    """On what the order that a trained model gives its training samples is measured."""

    ranked_samples: int = field(
        default=100,
        metadata={"help": "training samples on which is measured, after training, whether ρ and π order responses as "
                          "their scores do: for accuracy and the most violated pairs of the report; 0: none"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if faults := too_small(self, ranked_samples=0):
            raise UserError("\n".join(faults))


@dataclass(frozen=True)
class RunConfig:
    """The parsed sections; ``sample`` is ``None`` where only provided responses are ranked (setting P).

    ``cluster`` is no part of the configuration: where the work is done does not change it.
    """

    data: DataSettings
    model: ModelSettings
    text: TextSettings
    rounds: RoundSettings
    sample: SamplingSettings | None
    sources: SourceSettings
    remote: EndpointLimits
    score: RewardSettings
    scoring: ScoringSettings
    score_remote: EndpointLimits
    adapter: AdapterSettings
    train: RRHFConfig
    watch: WatchSettings
    evaluate_rewards: RewardSettings
    evaluate_sampling: SamplingSettings
    evaluate: EvaluationSettings
    evaluate_remote: EndpointLimits
    evaluate_ranked: RankedSettings
    cluster: ClusterSettings = field(default_factory=ClusterSettings)


ABLATIONS = "ablations"  # the file of them
MODEL_FOLDER = "output_dir"  # the flag of transformers that takes it
SECTIONS = ("data", "sample", "score", "train", "evaluate")


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml")) if path.stem != ABLATIONS}


def ablations() -> dict[str, dict[str, Any]]:
    """What is laid over a configuration that is written ``NAME+ABLATION``, by name."""
    return _read_yaml(_folder() / f"{ABLATIONS}.yaml")


def _folder() -> Path:
    return Path(str(resources.files("rrhf"))) / "recipes" / "configs"


def read_config(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a configuration: a file, or the name of one that is shipped. ``extends: NAME`` lays it over another.

    ``NAME+ABLATION`` is a configuration with an ablation laid over it, or with several. ``above`` names those that
    extend it.

    Raises:
        UserError: no such file or ablation, no valid YAML, not a mapping, or one that extends itself.
    """
    if not isinstance(name, str) or name in above:
        raise UserError(f"{' extends '.join([*above, str(name)])}: extends names another configuration, as text")
    base, *overlays = [name] if _exists(Path(name)) else name.split("+")
    path = shipped().get(base, Path(base))
    if not _exists(path):
        raise UserError(f"{base}: no such configuration file; shipped ones: {', '.join(shipped())}")
    config = _read_yaml(path)
    below = config.pop("extends", None)
    config = merge(read_config(below, (*above, name)), config) if below else config
    for overlay in overlays:
        if overlay not in ablations():
            raise UserError(f"{name}: no ablation {overlay!r}: {nearest(overlay, ablations())}")
        config = merge(config, ablations()[overlay])
    return config


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a character that no name has
        return False


def _read_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping with the sections {', '.join(SECTIONS)}")
    return values


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
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"{assignment!r}: give section.key=value, for example train.learning_rate=1e-5")
        try:
            value = load_yaml(text)
        except ValueError as error:
            raise UserError(f"{assignment!r}: the value is not valid YAML: {error}") from error
        section, dot, key = name.partition(".")
        config = merge(config, {section: {key: value}} if dot else {name: value})
    return config


@dataclass(frozen=True)
class Section:
    """A part of the file and its stage's flags: ``fields`` of ``RunConfig`` → the settings class of each.

    ``no_keys``: flags that are none, since the stage refuses them or the run sets them.
    """

    name: str
    fields: dict[str, type]
    no_keys: tuple[str, ...] = ()

    @cached_property
    def flags(self) -> Flags:
        return Flags(list(self.fields.values()), f"run, section {self.name}")

    @cached_property
    def keys(self) -> set[str]:
        return {flag.removeprefix("--") for flag in self.flags.known()} - set(self.no_keys)

    def unknown(self, given: Mapping[str, Any]) -> list[str]:
        """A fault for each key that no flag has."""
        if self.name == "data":  # no command has its flags
            seen = f"(known: {', '.join(sorted(self.keys))})"
        else:
            seen = f"(see `rrhf {self.name} --help`; docs/configuration.md says which of its flags are no keys)"
        faults = []
        for key in given:
            if key not in self.keys:
                close = nearest(key, self.keys).partition("known:")[0].strip()
                cure = _elsewhere(key) or f"{close} {seen}".strip()
                faults.append(f"{self.name}.{key}: unknown key{' ' if cure == seen else ': '}{cure}")
        return faults

    @cached_property
    def declared(self) -> dict[str, tuple[Action, Field[Any]]]:
        """The keys → flag and field of each. ``--no_…``, beside flags that are true by default, is no key."""
        declared = {field.name: field for settings in self.fields.values() for field in fields(settings)}
        actions = {a.dest: a for a in self.flags.parser._actions if f"--{a.dest}" in a.option_strings}
        return {key: (actions[key], declared[key]) for key in sorted(self.keys & set(actions))}

    def parse(self, given: Mapping[str, Any], by_run: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings of each field; ``by_run``: flags that are no keys, and that the run sets.

        Raises ``UserError`` or ``ValueError`` for a value that does not fit.
        """
        known = {key: value for key, value in given.items() if key in self.keys}
        faults = []
        for key, declared in self.declared.items():
            value = known.get(key)
            if isinstance(value, list) and len(value) != 1 and not takes_list(*declared):
                faults.append(f"{key}: takes one value, not a list")
            if isinstance(value, Mapping) and not takes_mapping(*declared):
                faults.append(f"{key}: takes a value, not keys with values")
        if faults:
            raise UserError("; ".join(faults))
        return dict(
            zip(self.fields, self.flags.parse(as_arguments({**known, **(by_run or {})}, self.name)), strict=True)
        )


def _elsewhere(key: str) -> str:
    """Where a key that a section does not have does stand, or ""."""
    if key in shared_section().keys:
        return f"write {key!r} outside the sections, for all stages"
    places = [f"{name}.{key}" for name, section in sections().items() if key in section.keys]
    return f"it is a key of another section: {', '.join(places)}" if places else ""


def takes_list(flag: Action, field: Field[Any]) -> bool:
    """Whether a key's value may be a list."""
    return flag.nargs in ("*", "+")


def takes_mapping(flag: Action, field: Field[Any]) -> bool:
    """Whether a key's value may be keys with values, which its flag takes as JSON."""
    return "dict" in str(field.type).lower() or field.name.endswith("_kwargs")


@cache
def sections() -> dict[str, Section]:
    """The sections of a configuration, by name."""
    from rrhf.training.config import RRHFConfig
    from rrhf.training.watch_settings import WatchSettings

    fields: dict[str, dict[str, type]] = {
        "data": {"data": DataSettings},
        "sample": {"sources": SourceSettings, "remote": EndpointLimits, "sample": SamplingSettings},
        "score": {"score": RewardSettings, "scoring": ScoringSettings, "score_remote": EndpointLimits},
        "train": {"adapter": AdapterSettings, "train": RRHFConfig, "watch": WatchSettings},
        "evaluate": {
            "evaluate_rewards": RewardSettings, "evaluate_sampling": SamplingSettings, "evaluate": EvaluationSettings,
            "evaluate_remote": EndpointLimits, "evaluate_ranked": RankedSettings,
        },
    }  # fmt: skip
    no_keys = {"evaluate": REFUSED, "train": (MODEL_FOLDER,)}
    return {name: Section(name, classes, no_keys.get(name, ())) for name, classes in fields.items()}


@cache
def shared_section() -> Section:
    """The keys outside the sections that belong to none of them."""
    return Section("configuration", {"model": ModelSettings, "text": TextSettings, "rounds": RoundSettings})


def parse_config(config: Mapping[str, Any], model_folder: Path) -> RunConfig:
    """Check every section against its stage's flags.

    A key outside the sections (``model``, ``seed``, ``device`` …) goes to every stage that has such a flag and does not
    set it itself.

    Raises:
        UserError: all unknown keys and unfit values, each with its section, in one message.
    """
    shared = {key: value for key, value in config.items() if key not in SECTIONS}
    parsed: dict[str, Any] = {"sample": None, "sources": SourceSettings(), "remote": EndpointLimits()}
    faults = [
        f"{key}: unknown key: {nearest(key, shared_section().keys | set(SECTIONS))}"
        for key in shared
        if not any(key in section.keys for section in (shared_section(), *sections().values()))
    ]
    for name, section in sections().items():
        if name == "sample" and name in config and config[name] is None:
            continue  # setting P: nothing is sampled
        given = config.get(name) or {}
        if not isinstance(given, Mapping):
            faults.append(f"section {name}: must hold keys and values, not {given!r}")
            continue
        faults += section.unknown(given)
        values = {**{key: value for key, value in shared.items() if key in section.keys}, **given}
        if name == "score" and values.get("kl_beta") and not values.get("reference_model"):
            values["reference_model"] = shared.get("model")  # ρ is what the run begins with
        try:
            parsed |= section.parse(values, {MODEL_FOLDER: str(model_folder)} if name == "train" else {})
        except (UserError, ValueError) as error:
            faults.append(f"section {name}: {str(error).partition('; `rrhf')[0]}")
    try:
        parsed |= shared_section().parse(shared)
    except (UserError, ValueError) as error:
        faults.append(str(error).partition("; `rrhf")[0])
    if faults:
        raise UserError("the configuration has faults:\n  " + "\n  ".join(faults))
    return RunConfig(**parsed)
