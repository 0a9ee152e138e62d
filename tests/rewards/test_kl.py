"""KL shaping by numbers worked out by hand, and through `rrhf score`: each model once, its sums kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from rrhf.common.errors import UserError
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards.kl import Shaping, adapted_beta, kl_shaped, log_ratios
from rrhf.rewards.scoring import Rewards
from rrhf.rewards.stage import RewardSettings, ScoringSettings, opened_rewards, score_file
from support.logprobs import flat, naive, records

pytestmark = pytest.mark.usefixtures("one_thread")


def characters(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if len(completion) == 3 else float(len(completion)) for completion in completions]


LENGTH = f"{__name__}:characters"


def test_what_a_policy_has_strayed_is_taken_off() -> None:
    ratios = log_ratios([-3.0, -5.0, None], [-4.0, -2.0, -1.0])
    assert ratios == [1.0, -3.0, None]
    assert kl_shaped([2.0, None, 2.0], ratios, 0.5) == [1.5, None, None]
    assert kl_shaped([2.0, 2.0, 2.0], ratios, 0.5) == [1.5, 3.5, None]
    assert kl_shaped([2.0], [7.0], 0.0) == [2.0]


def test_the_coefficient_follows_the_error_but_not_fast() -> None:
    """Ziegler et al.'s constants: K = 0.1, errors beyond 20 % count as 20 %."""
    assert adapted_beta(0.2, kl=6.0, target=6.0) == 0.2
    assert adapted_beta(0.2, kl=6.6, target=6.0) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted_beta(0.2, kl=60.0, target=6.0) == pytest.approx(0.2 * 1.02)
    assert adapted_beta(0.2, kl=-3.0, target=6.0) == pytest.approx(0.2 * 0.98)


def test_the_controller_brings_kl_to_its_target() -> None:
    """A policy whose KL is 1 / β: the fixed point is β = 1 / target."""
    beta = 1.0
    for _ in range(500):
        beta = adapted_beta(beta, kl=1 / beta, target=4.0)
    assert beta == pytest.approx(0.25, rel=1e-3)


def test_a_record_without_the_sums_is_named() -> None:
    shaping = Shaping(0.1, "logprob-sum:pi#1", "logprob-sum:rho#2")
    rewards = Rewards([LENGTH], shaping=shaping)
    record = Record(query="q", responses=["a"], id="bare", rewards={"logprob-sum:rho#2": [-1.0]})
    with pytest.raises(UserError, match=r"'bare' has no 'logprob-sum:pi#1'.*--reference_model"):
        list(rewards.score([record]))


def test_scores_are_shaped_and_every_sum_is_kept_and_computed_once(
    rho: Path,
    pi: Path,
    tmp_path: Path,
    asked: list[int],
) -> None:
    data, output, again = (tmp_path / f"{name}.jsonl" for name in ("data", "scored", "again"))
    write_records(data, records())
    scoring = ScoringSettings(model=str(pi), reference_model=str(rho), kl_beta=0.1, device="cpu", dtype="float32")
    score_file(data, output, RewardSettings([LENGTH]), scoring)
    scored = list(read_records(output))
    raw = [len(response) if len(response) != 3 else None for record in records() for response in record.responses]
    assert flat([record.rewards[LENGTH] for record in scored]) == raw
    ratios = [s - t for (s, _), (t, _) in zip(flat(naive(pi)), flat(naive(rho)), strict=True)]
    assert flat([record.scores for record in scored]) == pytest.approx(
        [None if score is None else score - 0.1 * ratio for score, ratio in zip(raw, ratios, strict=True)], abs=1e-4
    )
    names = [name for name in scored[0].rewards if name.startswith("logprob-sum:")]
    assert [name.partition("#")[0] for name in names] == ["logprob-sum:rho", "logprob-sum:pi"]
    assert sum(asked) == 2 * len(raw)
    # Another β over what was scored asks no model, and neither does the reward that is π's own log-probability.
    asked.clear()
    stronger = ScoringSettings(model=str(pi), reference_model=str(rho), kl_beta=0.2, device="cpu", dtype="float32")
    score_file(output, again, RewardSettings([LENGTH, f"logprob-sum:{pi}"]), stronger)
    assert asked == []
    found = flat([record.rewards[f"logprob-sum:{pi}"] for record in read_records(again)])
    assert found == pytest.approx(ratios, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_beta": 0.1}, r"needs --model.*\n.*needs --reference_model"),
        ({"kl_beta": -1.0}, "at least 0"),
        ({"reward_normalisation": ["dta"]}, "did you mean 'data'"),
        ({"dtype": "int8", "max_length": 1}, r"--dtype int8.*\n.*--max_length 1"),
    ],
)
def test_unfit_settings_are_refused_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoringSettings(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_found_before_a_run_begins(rho: Path, tmp_path: Path) -> None:
    """By ``opened_rewards``, which `rrhf run` calls before it samples."""
    settings = RewardSettings([LENGTH])
    for options, message in (
        ({"reference_model": str(tmp_path / "no" / "model")}, "no such folder"),
        ({"reward_normalisation": ["query", "query"]}, "give one, or one each"),
    ):
        scoring = ScoringSettings(**options)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            opened_rewards(settings, scoring, scoring.context())
    scoring = ScoringSettings(model=str(rho), reference_model=str(rho), kl_beta=1.0)
    assert opened_rewards(settings, scoring, scoring.context()).combination.shaping is not None
    other = str(rho.parent / "." / ".." / rho.parent.name / rho.name)  # the same folder, spelt otherwise
    scoring = ScoringSettings(model=other, reference_model=str(rho), kl_beta=1.0)
    shaping = opened_rewards(settings, scoring, scoring.context()).combination.shaping
    assert shaping is not None and shaping.policy == shaping.reference in scoring.sums_columns(scoring.context())
