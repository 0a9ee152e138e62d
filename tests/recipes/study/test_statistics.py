"""The study's statistics: against closed forms and simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rrhf.recipes.study.statistics import Components, bootstrap, components, holm, standard_error


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
    of_seeds, of_prompts = values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seeds[:, None] - of_prompts + values.mean()
    error = np.sqrt(of_seeds.var(ddof=1) / 10 + of_prompts.var(ddof=1) / 200 - (rest**2).sum() / (9 * 199) / 2000)
    assert standard_error(values) == (pytest.approx(error), 9)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * stats.t(9).ppf(0.975) * error, rel=0.03)
    assert found.p == pytest.approx(2 * stats.t(9).sf(found.mean / error))
    assert (found.seeds, found.prompts) == (10, 200)
    assert bootstrap(values) == found and bootstrap(-values).mean == -found.mean


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = bootstrap(crossed(generator, 10, 60, (0.1, 0.3, 0.3)), samples=1_000)
        covered += found.low <= 0 <= found.high
    assert covered / 200 > 0.93


@pytest.mark.parametrize("deviations", [(0.0, 0.05, 0.16), (0.03, 0.05, 0.2), (0.1, 0.3, 0.3)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_no_more_tests_find_what_is_not_there_than_they_say(seeds: int, deviations: tuple[float, float, float]) -> None:
    """At 5 % and as the first of 44 in Holm's method, where Hillis's degrees of freedom let up to 14 times as many."""
    generator, studies, levels = np.random.default_rng(3), 4_000, np.array([0.05, 0.05 / 44])
    false = np.zeros(2)
    for _ in range(studies):
        values = crossed(generator, seeds, 40, deviations)
        error, freedom = standard_error(values)
        false += 2 * stats.t(freedom).sf(abs(values.mean()) / error) < levels
    assert (false / studies <= levels + 3 * np.sqrt(levels / studies)).all()


def test_numbers_of_seeds_alone_have_the_interval_of_students_t() -> None:
    values = np.array([[0.1], [0.2], [0.4]])
    found, wanted = bootstrap(values), stats.ttest_1samp(values[:, 0], 0)
    assert found.p == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    alone = bootstrap(values[:1])
    assert np.isnan(alone.low) and alone.p == 1.0 and str(alone) == "+0.100"  # of one there is nothing to say
    assert bootstrap(np.zeros((3, 4))).p == 1.0
    for size in ((5, 50), (10, 120)):  # all alike: of these sums leave an error of 1e-18
        alike = bootstrap(np.full(size, 0.1))
        assert alike.low == alike.high == alike.mean == pytest.approx(0.1) and alike.p == 0.0


def test_missing_scores_and_single_seeds() -> None:
    values = np.array([[1.0, 2.0, np.nan, 3.0]])
    found = bootstrap(values)
    assert found.mean == pytest.approx(2.0) and found.low < 1.0 < 3.0 < found.high  # t of three values
    whole = crossed(np.random.default_rng(4), 5, 200, (0.1, 0.3, 0.1))
    missing = whole.copy()
    missing[1, 3] = missing[4, 7] = missing[:, 9] = np.nan
    assert standard_error(missing) == pytest.approx(standard_error(np.delete(whole, 9, axis=1)), rel=0.02)
    with pytest.raises(ValueError, match="needs values"):
        bootstrap(np.full((2, 2), np.nan))


def test_components_are_found_and_say_what_a_study_resolves() -> None:
    found = components(crossed(np.random.default_rng(2), 300, 400, (0.2, 0.4, 0.3)))
    assert [found.seed, found.prompt, found.rest] == pytest.approx([0.04, 0.16, 0.09], rel=0.15)
    error = found.standard_error(10, 200)
    assert error == pytest.approx((0.004 + 0.0008 + 0.000045) ** 0.5, rel=0.1)
    assert found.resolvable(10, 200) > 2.802 * error  # as much as known variances would need
    with pytest.raises(ValueError, match="two seeds"):
        components(np.zeros((1, 5)))


@pytest.mark.parametrize(("seeds", "tests"), [(3, 1), (5, 20), (10, 1)])
def test_a_difference_that_a_study_resolves_is_found_by_most(seeds: int, tests: int) -> None:
    variances = Components(0.0017, 0.00005, 0.03)
    generator, found, size = np.random.default_rng(5), 0, variances.resolvable(seeds, 200, tests)
    deviations = variances.seed**0.5, variances.prompt**0.5, variances.rest**0.5
    for _ in range(1_000):
        values = crossed(generator, seeds, 200, deviations) + size
        error, freedom = standard_error(values)
        found += bool(2 * stats.t(freedom).sf(abs(values.mean()) / error) < 0.05 / tests)
    assert 0.75 < found / 1_000 < 0.85


def test_holm_is_that_of_the_paper_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
