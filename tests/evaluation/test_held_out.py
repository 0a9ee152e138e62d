"""What the texts of an evaluation say: gains at equal length, reward by length, agreement of rewards, runs compared."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from rrhf.evaluation.held_out import (
    HeldOut,
    length_correlation,
    matched_length,
    mean_of,
    paired_with,
    rewards_agree,
)
from rrhf.evaluation.lengths import gain_at_equal_length, rewards_by_length
from rrhf.evaluation.metrics import mean_interval, paired_bootstrap, ratio_bootstrap


def row(name: str, rho: str, pi: str, before: Any, after: Any, other: tuple[Any, Any] = (0.0, 0.0)) -> dict[str, Any]:
    rewards = ({"a": before, "b": other[0]}, {"a": after, "b": other[1]})
    return {"id": name, "query": "q", "rho": rho, "pi": pi, "rho_rewards": rewards[0], "pi_rewards": rewards[1]}


def read_held_out(rows: list[dict[str, Any]]) -> HeldOut:
    held = HeldOut()
    for one in rows:
        held.add(one)
    return held


def test_a_ratio_of_equal_parts_is_the_paired_bootstrap() -> None:
    values = [random.Random(i).random() for i in range(50)]
    assert ratio_bootstrap(values, [1.0] * 50, seed=3) == pytest.approx(paired_bootstrap(values, seed=3))
    assert mean_interval([], seed=0) is None
    # By hand: two things, (1 of 1) and (0 of 3): together 1/4, alone 1 or 0.
    found = ratio_bootstrap([1.0, 0.0], [1.0, 3.0], seed=0)
    assert found == {"mean": 0.25, "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="denominators above 0"):
        ratio_bootstrap([1.0], [0.0], seed=0)


def test_a_gain_that_length_alone_makes_is_none_at_equal_length() -> None:
    generator = np.random.default_rng(1)
    longer = generator.normal(30, 20, 400)
    bought = 0.3 * np.tanh(longer / longer.std()) + generator.normal(0, 0.02, 400)
    found = gain_at_equal_length(bought.tolist(), longer.tolist(), seed=0)
    assert bought.mean() > 0.15
    assert abs(found["mean"]) < 0.02 and found["low"] < found["mean"] < found["high"]
    real = gain_at_equal_length((bought + 0.1).tolist(), longer.tolist(), seed=0)
    assert real["mean"] == pytest.approx(found["mean"] + 0.1) and real["low"] > 0.05


def test_the_length_model_is_ridge_regression() -> None:
    generator = np.random.default_rng(2)
    gains, longer = generator.normal(size=12), generator.normal(5, 3, size=12)
    x = np.tanh(longer / longer.std())
    # An observation of 0 at φ alone, with the weight of one prompt, is the penalty.
    rows = np.vstack([np.column_stack([np.ones(12), x]), [0.0, 1.0]])
    theta, phi = np.linalg.lstsq(rows, np.append(gains, 0.0), rcond=None)[0]
    found = gain_at_equal_length(gains.tolist(), longer.tolist(), seed=0)
    assert (found["mean"], found["slope"]) == pytest.approx((theta, phi))


def test_equal_lengths_tell_nothing_apart() -> None:
    found = gain_at_equal_length([0.1, 0.2, 0.6], [7.0, 7.0, 7.0], seed=0)
    assert found["mean"] == pytest.approx(0.3) and found["slope"] == 0.0
    with pytest.raises(ValueError, match="at least one"):
        gain_at_equal_length([], [], seed=0)


def test_every_text_is_in_one_bin_of_its_length() -> None:
    lengths = {"rho": [1.0, 2.0, 3.0, 40.0], "pi": [2.0, 2.0, 50.0, 60.0]}
    rewards = {"rho": [0.0, 0.2, 0.4, 0.6], "pi": [1.0, 0.0, 0.5, 0.7]}
    lines = rewards_by_length(lengths, rewards, seed=0, bins=2)
    assert [(line["low"], line["high"]) for line in lines] == [(1.0, 2.0), (3.0, 60.0)]
    first, second = (line["models"] for line in lines)
    assert (first["rho"]["n"], first["rho"]["reward"]["mean"]) == (2, pytest.approx(0.1))
    assert (second["pi"]["n"], second["pi"]["reward"]["mean"]) == (2, pytest.approx(0.6))
    same = rewards_by_length({"rho": [4.0] * 3, "pi": [4.0] * 3}, {"rho": [0.0] * 3, "pi": [1.0] * 3}, seed=0)
    assert len(same) == 1 and same[0]["models"]["pi"]["reward"]["mean"] == 1.0


def test_texts_without_a_reward_are_in_no_mean() -> None:
    held = read_held_out(
        [
            row("1", "aa", "aaaa", 0.0, 1.0),
            row("2", "a", "a", None, 0.5),
            {"id": "3", "query": "q", "rho": "a", "pi": "a", "rho_rewards": {}, "pi_rewards": {"b": 0.3}},
            row("4", "aaa", "a", 0.5, float("nan")),
        ]
    )
    assert held.values("a", "rho") == [0.0, 0.5] and held.values("a", "pi") == [1.0, 0.5]
    assert held.gains("a") == [1.0, None, None, None]
    assert held.gains("never") == [None] * 4
    matched = matched_length(held, "a", seed=0)
    assert matched is not None and matched["n"] == 1 and matched["lengths"] == {"rho": 2.0, "pi": 4.0}
    assert matched_length(held, "never", seed=0) is None
    mean = mean_of(held, "a", "pi", seed=0)
    assert mean is not None and mean["mean"] == 0.75


def test_rewards_agree_where_they_prefer_the_same_text() -> None:
    held = read_held_out(
        [
            row("1", "x", "y", 0.0, 1.0, (0.0, 0.5)),  # the same
            row("2", "x", "y", 0.0, 1.0, (0.5, 0.0)),  # a contradiction
            row("3", "x", "y", 0.1 + 0.2, 0.3, (0.0, 0.5)),  # equal but for the last bit: a tie against a preference
            row("4", "x", "y", 0.0, -1.0, (0.0, -2.0)),
        ]
    )
    (line,) = rewards_agree(held, seed=0)
    assert line["rewards"] == ("a", "b") and line["n"] == 4
    assert line["same"]["mean"] == 0.5 and line["not_contradicting"]["mean"] == 0.75


def test_runs_are_compared_on_the_prompts_of_both() -> None:
    one = read_held_out([row("1", "x", "y", 0, 0.9), row("2", "x", "y", 0, 0.5), row("3", "x", "y", 0, 0.1)])
    other = read_held_out([row("3", "x", "y", 0, 0.4), row("1", "x", "y", 0, 0.5), row("9", "x", "y", 0, 9.0)])
    apart = paired_with(one, other, "a", seed=0)
    assert apart is not None and apart["n"] == 2 and apart["mean"] == pytest.approx((0.4 - 0.3) / 2)
    assert paired_with(one, read_held_out([row("8", "x", "y", 0, 1)]), "a", seed=0) is None
    elsewhere = {**row("1", "x", "y", 0, 0.1), "query": "of another file, which counts its lines too"}
    assert paired_with(one, read_held_out([elsewhere]), "a", seed=0) is None


def test_correlation_of_reward_and_length() -> None:
    lengths, rewards = [1.0, 2.0, 4.0, 9.0], [0.1, 0.3, None, 0.2]
    known = [(1.0, 0.1), (2.0, 0.3), (9.0, 0.2)]
    assert length_correlation(lengths, rewards) == pytest.approx(np.corrcoef(*zip(*known))[0, 1])
    assert length_correlation([3.0, 3.0], [0.1, 0.2]) is None
