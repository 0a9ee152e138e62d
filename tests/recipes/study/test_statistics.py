"""The study's statistics: against closed forms and simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from rrhf.recipes.study.statistics import bootstrap, components, holm


def crossed(
    generator: np.random.Generator, seeds: int, prompts: int, deviations: tuple[float, float, float]
) -> np.ndarray:
    of_seed, of_prompt, rest = deviations
    return np.asarray(
        generator.normal(0, of_seed, (seeds, 1))
        + generator.normal(0, of_prompt, (1, prompts))
        + generator.normal(0, rest, (seeds, prompts))
    )


def test_the_interval_is_that_of_both_draws() -> None:
    values = crossed(np.random.default_rng(0), 10, 200, (0.1, 0.3, 0.3)) + 0.2
    found = bootstrap(values)
    expected = np.sqrt(values.mean(axis=1).var() / 10 + values.mean(axis=0).var() / 200)
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 3.92 == pytest.approx(expected, rel=0.1)
    assert found.p < 0.01 and (found.seeds, found.prompts) == (10, 200)
    assert bootstrap(values) == found and bootstrap(-values).mean == -found.mean


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = bootstrap(crossed(generator, 10, 60, (0.1, 0.3, 0.3)), samples=1_000)
        covered += found.low <= 0 <= found.high
    assert 0.87 < covered / 200 < 0.99  # ten seeds: a little short of 0.95


def test_missing_scores_and_single_seeds() -> None:
    values = np.array([[1.0, 2.0, np.nan, 3.0]])
    found = bootstrap(values)
    assert found.mean == pytest.approx(2.0) and 1.0 <= found.low < found.high <= 3.0
    with pytest.raises(ValueError, match="needs values"):
        bootstrap(np.full((2, 2), np.nan))


def test_components_are_found_and_say_what_a_study_resolves() -> None:
    found = components(crossed(np.random.default_rng(2), 300, 400, (0.2, 0.4, 0.3)))
    assert [found.seed, found.prompt, found.rest] == pytest.approx([0.04, 0.16, 0.09], rel=0.15)
    assert found.standard_error(10, 200) == pytest.approx((0.004 + 0.0008 + 0.000045) ** 0.5, rel=0.1)
    assert found.resolvable(10, 200) == pytest.approx(2.802 * found.standard_error(10, 200))
    with pytest.raises(ValueError, match="two seeds"):
        components(np.zeros((1, 5)))


def test_holm_is_that_of_the_paper_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
