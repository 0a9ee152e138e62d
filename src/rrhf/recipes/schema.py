"""The JSON schema of a run's configuration, for editors: made of the flags that read it.

``python -m rrhf.recipes.schema`` prints it; ``make schema`` writes it to ``SCHEMA``, beside this module.
"""

from __future__ import annotations

import json
from argparse import Action
from dataclasses import MISSING, Field
from enum import Enum
from pathlib import Path
from typing import Any

from rrhf.recipes.config import Section, sections, shared_section, takes_list, takes_mapping

SCHEMA = Path(__file__).with_name("schema.json")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
# PyYAML reads 1e-5, which YAML 1.2 calls a number, as text.
NUMBER = {"type": ["number", "string"], "pattern": r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"}


def config_schema() -> dict[str, Any]:
    """The schema. Each section's keys, and at the top every key that goes to all stages that have it.

    It refuses unknown keys and values of the wrong type; what else is wrong, and how keys go together, ``rrhf run``
    says before any work.
    """
    from transformers import __version__

    defined = {section.name: _section(section) for section in (shared_section(), *sections().values())}
    shared: dict[str, Any] = {"extends": {"type": "string", "description": "the configuration that this one lies over"}}
    for name, section in defined.items():
        for key in section["properties"]:
            shared.setdefault(key, {"$ref": f"#/$defs/{name}/properties/{key}"})
    # None: at its defaults; of sample, that nothing is sampled.
    stages = {name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]} for name in sections()}
    return {
        "$schema": DIALECT,
        "$comment": f"Written by `make schema`, with transformers {__version__}.",
        "title": "A run of rrhf",
        "type": "object",
        "additionalProperties": False,
        "properties": {**stages, **{key: shared[key] for key in sorted(shared)}},
        "$defs": defined,
    }


def _section(section: Section) -> dict[str, Any]:
    properties = {key: _key(*declared) for key, declared in section.declared.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _key(action: Action, field: Field[Any]) -> dict[str, Any]:
    """What a key may hold: what its flag takes, or null, which leaves it at its default."""
    value = _value(action)
    kinds = [value, {"type": "null"}]
    if takes_list(action, field):
        kinds.insert(1, {"type": "array", "items": value})
    if takes_mapping(action, field):
        kinds.insert(1, {"type": "object"})
    found: dict[str, Any] = {"anyOf": kinds}
    if text := " ".join((action.help or "").split()):
        found["description"] = text.replace("%%", "%")
    default = field.default.value if isinstance(field.default, Enum) else field.default
    if default is not MISSING and isinstance(default, str | int | float):
        found["default"] = default
    return found


def _value(action: Action) -> dict[str, Any]:
    if action.choices is not None:
        return {"enum": list(action.choices)}
    named: dict[str, dict[str, Any]] = {
        "int": {"type": "integer"}, "float": NUMBER, "str": {"type": "string"}, "boolean": {"type": "boolean"},
    }  # fmt: skip
    return named.get(getattr(action.type, "__name__", ""), {"type": ["string", "number", "boolean"]})


if __name__ == "__main__":
    print(json.dumps(config_schema(), indent=1, ensure_ascii=False))
