"""The schema that editors read: that of the settings' classes, and every shipped configuration keeps to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from rrhf.common.errors import UserError
from rrhf.recipes.config import SECTIONS, ablations, merge, parse_config, read_config, shipped
from rrhf.recipes.schema import SCHEMA, config_schema

WRITTEN: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(WRITTEN)


def faults(config: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(config)]


def test_the_written_schema_is_that_of_the_settings() -> None:
    made = config_schema()
    Draft202012Validator.check_schema(made)
    if made["$comment"] != WRITTEN["$comment"]:
        pytest.skip(f"transformers has other training arguments here: {WRITTEN['$comment']}")
    assert made == WRITTEN, "run `make schema`"


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_keep_to_it(name: str) -> None:
    assert faults(yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))) == []
    assert faults(read_config(name)) == []  # with what it extends


def test_ablations_keep_to_it() -> None:
    assert len(ablations()) > 3
    assert {name: faults(laid) for name, laid in ablations().items() if faults(laid)} == {}


WRONG: dict[str, dict[str, Any]] = {
    "a section that is none": {"training": {"max_steps": 3}},
    "a shared key that is none": {"modle": "m"},
    "a key that is none": {"train": {"learning_rates": 1e-5}},
    "a key of another section": {"score": {"learning_rate": 1e-5}},
    "a list for a section": {"sample": ["top-p"]},
    "text for an integer": {"sample": {"num_responses": "four"}},
    "a fraction for an integer": {"sample": {"num_responses": 1.5}},
    "text for a number": {"train": {"learning_rate": "fast"}},
    "text for a boolean": {"train": {"bf16": "maybe"}},
    "none of the choices": {"train": {"lr_scheduler_type": "linaer"}},
    "an integer in a shared key": {"seed": "x"},
}
RIGHT: dict[str, dict[str, Any]] = {
    "a number as PyYAML reads it": {"train": {"learning_rate": yaml.safe_load("1e-5")}},
    "nothing is sampled": {"sample": None},
    "a key at its default": {"train": {"max_steps": None}},
    "one value of a list": {"score": {"reward": "pkg.module:f"}},
    "a list": {"score": {"reward": ["a.b:f", "c.d:g"], "reward_weights": [1, -0.4]}},
    "a mapping": {"chat_template_kwargs": {"enable_thinking": False}},
    "over another": {"extends": "hh", "model": "m", "iterations": 3},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_schema_refuses_the_run_refuses(case: str, tmp_path: Any) -> None:
    assert len(faults(WRONG[case])) == 1
    with pytest.raises(UserError):
        parse_config(merge(read_config("demo"), WRONG[case]), tmp_path)


@pytest.mark.parametrize("case", RIGHT)
def test_what_the_schema_takes_the_run_takes(case: str, tmp_path: Any) -> None:
    assert faults(RIGHT[case]) == []
    config = merge(read_config("demo"), {key: value for key, value in RIGHT[case].items() if key != "extends"})
    parse_config(config, tmp_path)


def test_every_section_is_in_it_with_words() -> None:
    assert set(SECTIONS) <= set(WRITTEN["properties"])
    described = WRITTEN["$defs"]["sample"]["properties"]["num_beam_groups"]
    assert described["description"] and {"type": "integer"} in described["anyOf"]
