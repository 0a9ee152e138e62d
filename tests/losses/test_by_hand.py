"""Losses of lists, with a reference and over tokens: numbers worked out by hand; and what a loss's name presets."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.common.errors import UserError
from rrhf.losses import (
    PRESETS,
    RANKING_LOSSES,
    Loss,
    LossSettings,
    RecordTensors,
    beside_the_mean,
    grpo_advantages,
    needed_by,
    needs,
    rloo_advantages,
    rrhf_loss,
    soft_sort,
)
from rrhf.losses.settings import READERS

LOG2_3 = math.log2(3)


def loss_of(
    sums: list[float],
    lengths: list[int],
    scores: list[float | None],
    reference: list[float] | None = None,
    **options: Any,
) -> Loss:
    rows = {
        name: [torch.tensor(row, dtype=torch.float64) for row in options.pop(name)]
        for name in ("token_logprobs", "old_token_logprobs", "reference_token_logprobs")
        if name in options
    }
    kl = options.pop("batch_kl", None)
    return rrhf_loss(
        torch.tensor(sums, dtype=torch.float64), torch.tensor(lengths),
        torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64),
        LossSettings(**options),
        reference_sums=None if reference is None else torch.tensor(reference, dtype=torch.float64),
        batch_kl=None if kl is None else torch.tensor(kl), **rows,
    )  # fmt: skip


def rank(*record: Any, **options: Any) -> float:
    return loss_of(*record, **options).rank.item()


# h = log π/ρ = (1, −1, 0), in the order of scores (2, 1, 0)
RECORD = ([-2.0, -4.0, -3.0], [1, 2, 1], [2.0, 1.0, 0.0], [-3.0, -3.0, -3.0])


def test_hand_dpo() -> None:
    # β = 1: the pairs (1, 0), (2, 0), (2, 1) have h_j − h_i = 2, 1, −1
    first_two = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))
    assert rank(*RECORD, ranking_loss="dpo", dpo_beta=1.0) == pytest.approx(first_two + math.log1p(math.e))
    assert rank(*RECORD, ranking_loss="dpo", dpo_beta=1.0, dpo_pairs="best") == pytest.approx(first_two)
    # where π = ρ every pair costs log 2
    assert rank(*RECORD[:3], RECORD[0], ranking_loss="dpo") == pytest.approx(3 * math.log(2))


def test_hand_ipo() -> None:
    # h / length = (1, −1/2, 0), 1/(2β) = 1: (3/2 − 1)² + (1 − 1)² + (−1/2 − 1)² = 1/4 + 0 + 9/4
    assert rank(*RECORD, ranking_loss="ipo", dpo_beta=0.5) == pytest.approx(2.5)
    # the formula of the paper, sums: (2 − 1)² + (1 − 1)² + (−1 − 1)² = 5
    assert rank(*RECORD, ranking_loss="ipo", dpo_beta=0.5, length_exponent=0.0) == pytest.approx(5.0)


def test_hand_kto() -> None:
    # the mean score is 1: y_0 is desirable, y_2 is not, y_1 stands at the mean. β = 1, z = 1/2:
    # 1 − σ(1 − 1/2) and 1 − σ(1/2 − 0); their mean is σ(−1/2)
    expected = 1 / (1 + math.exp(0.5))
    assert rank(*RECORD, ranking_loss="kto", dpo_beta=1.0, batch_kl=0.5) == pytest.approx(expected)


def test_a_score_at_a_mean_of_nothing_but_rounding_is_at_it() -> None:
    # their mean is 0; summed as doubles it is 4e-18, of which no score is a share
    scores = torch.tensor([0.1, 0.2, -0.3, 0.0], dtype=torch.float64)
    assert scores.mean() != 0
    assert beside_the_mean(scores).tolist() == [1, 1, -1, 0]


def test_hand_dpo_listmle() -> None:
    # β h = (1, −1, 0): log(e + 1/e + 1) − 1, then log(1/e + 1) + 1, then 0
    expected = math.log(math.e + 1 / math.e + 1) + math.log(1 / math.e + 1)
    assert rank(*RECORD, ranking_loss="dpo-listmle", dpo_beta=1.0) == pytest.approx(expected)


def test_hand_lambda() -> None:
    # scores far apart: ψ = (1, 0), G = (1, 0). s = (0, 1): the worse one has rank 1.
    # Δ = |1/log 3 − 1/log 2|; the loss is Δ·log(1 + e)
    found = rank([0.0, 1.0], [1, 1], [1000.0, 0.0], [0.0, 0.0], ranking_loss="lambda", dpo_beta=1.0)
    assert found == pytest.approx((1 / math.log(2) - 1 / math.log(3)) * math.log1p(math.e))
    # scores that are near have labels that are: ψ = σ(±1), G = 2^ψ − 1
    near = rank([0.0, 1.0], [1, 1], [1.0, 0.0], [0.0, 0.0], ranking_loss="lambda", dpo_beta=1.0)
    psi = 1 / (1 + math.exp(-1))
    assert near == pytest.approx((2**psi - 2 ** (1 - psi)) * found)


def test_hand_swepo() -> None:
    # r = (3, 1, 2), mean 2: y_0 alone is above; w = (e, e, 1), s = 0: −log(e / (e + e + 1)) = log(2 + 1/e)
    found = rank([-1.0] * 3, [1] * 3, [3.0, 1.0, 2.0], [-1.0] * 3, ranking_loss="swepo")
    assert found == pytest.approx(math.log(2 + 1 / math.e))
    # α = 0: plain InfoNCE of equals, log 3
    found = rank([-1.0] * 3, [1] * 3, [3.0, 1.0, 2.0], [-1.0] * 3, ranking_loss="swepo", score_scale=0.0)
    assert found == pytest.approx(math.log(3))


def test_hand_ndcg() -> None:
    # gains (1, 0). p_0 − p_1 = 1: stays with 1/2 + arctan(1)/π = 3/4, so that place 1 has 3/4 and place 2 has 1/4
    found = rank([-1.0, -2.0], [1, 1], [1000.0, 0.0], ranking_loss="ndcg")
    assert found == pytest.approx(1 - 0.75 - 0.25 / LOG2_3)
    # far apart and in order it is 0; the other way round the best one stands second
    right, wrong = (rank(p, [1, 1], [1000.0, 0.0], ranking_loss="ndcg") for p in ([-1.0, -1e9], [-1e9, -1.0]))
    assert right == pytest.approx(0, abs=1e-6)
    assert wrong == pytest.approx(1 - 1 / LOG2_3, abs=1e-6)


def test_a_soft_sort_is_doubly_stochastic_and_sorts_what_is_far_apart() -> None:
    values = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.25], dtype=torch.float64)
    soft = soft_sort(values)
    assert torch.allclose(soft.sum(0), torch.ones(5).double()) and torch.allclose(soft.sum(1), torch.ones(5).double())
    assert float(soft.min()) >= 0
    hard = soft_sort(values * 1e9).round()
    assert (hard @ values).tolist() == sorted(values.tolist(), reverse=True)


def test_hand_lire() -> None:
    # P = (3/4, 1/4), R = (3/4, 1/4): −(3/4·1/4 − 1/4·1/4) = −1/8
    log3 = math.log(3)
    assert rank([-1.0, -1.0 - log3], [1, 1], [log3, 0.0], ranking_loss="lire") == pytest.approx(-1 / 8)
    assert rank([-1.0, -1.0], [1, 1], [log3, 0.0], ranking_loss="lire") == pytest.approx(0)


# The four losses of lists that no other library has, on three responses and one without a score, which changes nothing.
# h = log π/ρ = (1, −1, 0); p = (−2, −4, −3); scores (2, 1, 0), or the tie (2, 2, 0).
THREE = ([-2.0, -4.0, -3.0, -9.0], [1, 1, 1, 1], [2.0, 1.0, 0.0, None], [-3.0, -3.0, -3.0, -1.0])
TIED = (*THREE[:2], [2.0, 2.0, 0.0, None], THREE[3])


def test_three_responses_lambda() -> None:
    # places by s = h: y_0, y_2, y_1, so 1/D = 1/log 2, 1/log 4, 1/log 3 of (y_0, y_1, y_2); σ(1) = .7311, σ(2) = .8808
    one, two, three = 1 / math.log(2), 1 / math.log(4), 1 / math.log(3)
    g = [2 ** ((0.7310586 + 0.8807971) / 2) - 1, 2**0.5 - 1, 2 ** ((0.1192029 + 0.2689414) / 2) - 1]
    expected = (
        (g[0] - g[1]) * (one - two) * math.log(1 + math.exp(-2))  # y_1 below y_0: s_0 − s_1 = 2
        + (g[0] - g[2]) * (one - three) * math.log(1 + math.exp(-1))  # y_2 below y_0: s_0 − s_2 = 1
        + (g[1] - g[2]) * (three - two) * math.log(1 + math.exp(1))  # y_2 below y_1: s_1 − s_2 = −1
    )
    assert rank(*THREE, ranking_loss="lambda", dpo_beta=1.0) == pytest.approx(expected, rel=1e-6)
    # y_0 and y_1 are no pair, and have one label: (1/2 + σ(2))/2
    gap = 2 ** ((0.5 + 0.8807971) / 2) - 2**0.1192029
    tied = gap * ((one - three) * math.log(1 + math.exp(-1)) + (three - two) * math.log(1 + math.exp(1)))
    assert rank(*TIED, ranking_loss="lambda", dpo_beta=1.0) == pytest.approx(tied, rel=1e-6)


def test_three_responses_swepo() -> None:
    # r̄ = 1: y_0 alone stands above it, y_1 at it with w = 1, the others have w = e; w e^s = (e², e^−1, e)
    expected = -math.log(math.e**2 / (math.e**2 + 1 / math.e + math.e))
    assert rank(*THREE, ranking_loss="swepo", dpo_beta=1.0) == pytest.approx(expected)
    # r̄ = 4/3: y_0 and y_1 above it by 2/3, y_2 below by 4/3
    w = math.exp(2 / 3)
    above = w * math.e + w / math.e
    tied = -math.log(above / (above + math.exp(4 / 3)))
    assert rank(*TIED, ranking_loss="swepo", dpo_beta=1.0) == pytest.approx(tied)
    assert rank(*THREE[:2], [1.0, 1.0, 1.0, None], THREE[3], ranking_loss="swepo") == 0  # nobody is above


def test_three_responses_lire() -> None:
    # P = (e, 1/e, 1)/4.086161, R = (e², e, 1)/11.107338: −Σ P_j R_j + 1/3
    e, chances, rewards = math.e, 4.0861613, 11.1073379
    expected = 1 / 3 - (e * e**2 + e / e + 1) / (chances * rewards)
    assert rank(*THREE, ranking_loss="lire") == pytest.approx(expected, rel=1e-6)
    tied = 1 / 3 - (e * e**2 + e**2 / e + 1) / (chances * (2 * e**2 + 1))
    assert rank(*TIED, ranking_loss="lire") == pytest.approx(tied, rel=1e-6)


def test_three_responses_ndcg() -> None:
    def stays(distance: float) -> float:
        return 0.5 + math.atan(distance) / math.pi

    # three layers swap places 1 and 2, then 2 and 3, then 1 and 2, of p and with it of the gains g
    for record, g in (
        (THREE, [2 ** ((0.7310586 + 0.8807971) / 2) - 1, 2**0.5 - 1, 2 ** ((0.1192029 + 0.2689414) / 2) - 1]),
        (TIED, [2 ** ((0.5 + 0.8807971) / 2) - 1] * 2 + [2**0.1192029 - 1]),
    ):
        a = stays(-2 + 4)
        p1, p2 = -2 * a - 4 * (1 - a), -4 * a - 2 * (1 - a)
        g1, g2 = g[0] * a + g[1] * (1 - a), g[1] * a + g[0] * (1 - a)
        b = stays(p2 + 3)
        p2 = p2 * b - 3 * (1 - b)
        g2, g3 = g2 * b + g[2] * (1 - b), g[2] * b + g2 * (1 - b)
        c = stays(p1 - p2)
        g1, g2 = g1 * c + g2 * (1 - c), g2 * c + g1 * (1 - c)
        best = g[0] + g[1] / LOG2_3 + g[2] / 2
        expected = 1 - (g1 + g2 / LOG2_3 + g3 / 2) / best
        assert rank(*record, ranking_loss="ndcg") == pytest.approx(expected, rel=1e-6)


def test_hand_orpo() -> None:
    # probabilities 1/2 and 1/5 a token have the odds 1 and 1/4: −log σ(log 4) = log(5/4); λ = 0.1, L_ft = log 2 a token
    loss = loss_of([2 * math.log(0.5), 3 * math.log(0.2)], [2, 3], [1.0, 0.0], ranking_loss="orpo")
    assert loss.rank.item() == pytest.approx(math.log(1.25))
    assert loss.total.item() == pytest.approx(0.1 * math.log(1.25) + math.log(2))


def test_hand_cpo() -> None:
    # sums 2 apart, β = 1/2: log(1 + 1/e); the likelihood term is −(−2/2) = 1
    loss = loss_of([-2.0, -4.0], [2, 2], [1.0, 0.0], ranking_loss="cpo", dpo_beta=0.5)
    assert loss.total.item() == pytest.approx(math.log1p(1 / math.e) + 1)


def test_simpo_is_logistic_with_its_papers_numbers() -> None:
    # β (p_j − p_i) − γ = 2·(1/2) − 1 = 0: log 2, and no cross-entropy
    case: Any = ([-2.0, -3.0], [2, 2], [1.0, 0.0])
    assert loss_of(*case, ranking_loss="simpo").total.item() == pytest.approx(math.log(2))
    asked = {"logprob_scale": 4.0, "margin": 0.5, "sft_weight": 0.25}
    simpo, logistic = (loss_of(*case, ranking_loss=name, **asked) for name in ("simpo", "logistic"))
    assert simpo.total.item() == logistic.total.item()


TOKENS = {
    "token_logprobs": [[-1.0 + math.log(1.5)], [-2.0 + math.log(0.5)]],
    "old_token_logprobs": [[-1.0], [-2.0]],
}


def test_hand_grpo() -> None:
    # r = (1, −1): A = ±1/(√2 + 1e-4). Ratios 1.5 and 0.5 are clipped to 1.2 and 0.8 where that lowers the objective:
    # min(1.5 a, 1.2 a) = 1.2 a and min(−0.5 a, −0.8 a) = −0.8 a; the mean of −1.2 a and 0.8 a is −a/5
    a = 1 / (math.sqrt(2) + 1e-4)
    case: Any = ([-0.6, -2.7], [1, 1], [1.0, -1.0])
    assert rank(*case, ranking_loss="grpo", **TOKENS) == pytest.approx(-a / 5)
    # k3 at ρ = 2π: 2 − log 2 − 1 a token, beside it
    near = [[value + math.log(2) for value in row] for row in TOKENS["token_logprobs"]]
    with_kl = rank(*case, ranking_loss="grpo", token_kl=0.5, reference_token_logprobs=near, **TOKENS)
    assert with_kl == pytest.approx(-a / 5 + 0.5 * (1 - math.log(2)))
    assert rank(*case, ranking_loss="grpo", clip_range=0.9, **TOKENS) == pytest.approx(-a * (1.5 - 0.5) / 2)


def test_hand_rloo() -> None:
    # A = (2, −2); the ratios are those of the responses: −(1.2·2 − 0.8·2)/2 = −2/5
    case: Any = ([-0.6, -2.7], [1, 1], [1.0, -1.0])
    assert rank(*case, ranking_loss="rloo", **TOKENS) == pytest.approx(-0.4)
    # over two tokens: log ratio 0.3 − 0.1 = 0.2, e^0.2 > 1.2 is clipped; the other one did not move
    two = {"token_logprobs": [[-1.0, -1.0], [-2.0]], "old_token_logprobs": [[-1.3, -0.9], [-2.0]]}
    assert rank([-2.0, -2.0], [2, 1], [1.0, -1.0], ranking_loss="rloo", **two) == pytest.approx(-(1.2 * 2 - 2) / 2)


def test_advantages() -> None:
    scores = torch.tensor([1.0, math.nan, 4.0, -2.0], dtype=torch.float64)
    assert rloo_advantages(scores).tolist() == [0.0, 0.0, 4.5, -4.5]
    assert grpo_advantages(scores).tolist() == pytest.approx([0.0, 0.0, 3 / 3.0001, -3 / 3.0001])
    for advantages in (grpo_advantages, rloo_advantages):
        assert advantages(torch.tensor([math.nan, 3.0])).tolist() == [0.0, 0.0]
        assert advantages(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_a_name_presets_what_was_left_out_and_nothing_else() -> None:
    def kept(**given: Any) -> tuple[Any, ...]:
        made = LossSettings(**given)
        return made.rank_weight, made.sft_weight, made.sft_reduction, made.margin, made.logprob_scale

    assert kept() == (1.0, 1.0, "sum", 0.0, 1.0)  # Eq. 5
    assert kept(ranking_loss="dpo") == (1.0, 0.0, "sum", 0.0, 1.0)
    assert kept(ranking_loss="dpo", sft_weight=1.0) == (1.0, 1.0, "sum", 0.0, 1.0)
    assert kept(ranking_loss="orpo") == (0.1, 1.0, "mean", 0.0, 1.0)
    assert kept(ranking_loss="simpo", margin=0.0) == (1.0, 0.0, "sum", 0.0, 2.0)


def test_the_page_has_a_row_for_every_loss() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "losses.md").read_text(encoding="utf-8")
    table = page.partition("| name |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.M) == list(RANKING_LOSSES)
    assert set(PRESETS) <= set(RANKING_LOSSES)
    for name, preset in PRESETS.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert ("`--sft_weight` 0" in row or "the same |" in row) is (preset.get("sft_weight") == 0.0)


def test_what_a_loss_needs() -> None:
    plain, with_kl = LossSettings(), LossSettings(token_kl=0.1)
    found = {name: sorted(needed_by(loss, plain)) for name, loss in RANKING_LOSSES.items() if needed_by(loss, plain)}
    reference = ["reference_sums"]
    assert found == {
        "dpo": reference, "ipo": reference, "dpo-listmle": reference, "lambda": reference, "swepo": reference,
        "kto": ["batch_kl", "reference_sums"],
        "grpo": ["old_token_logprobs", "token_logprobs"], "rloo": ["old_token_logprobs", "token_logprobs"],
    }  # fmt: skip
    assert "reference_token_logprobs" in needed_by(RANKING_LOSSES["grpo"], with_kl)
    with pytest.raises(ValueError, match="the ranking loss kto needs reference_sums and batch_kl"):
        rank([-1.0], [1], [1.0], ranking_loss="kto")
    with pytest.raises(ValueError, match=r"needs\(old_tokens\): did you mean 'old_token_logprobs'"):
        needs(token_kl="old_tokens")


def test_bad_settings_are_named() -> None:
    with pytest.raises(UserError) as caught:
        LossSettings(dpo_beta=0.0, dpo_pairs="worst", score_scale=-1.0, clip_range=math.nan, token_kl=-1.0)
    for name in ("dpo_beta 0.0", "dpo_pairs worst", "score_scale", "clip_range", "token_kl"):
        assert f"--{name}" in str(caught.value)


class _Touched:
    """Settings that note which of ``READERS`` are read."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings, self.names = settings, set[str]()

    def __getattr__(self, name: str) -> object:
        self.names.add(name)
        return getattr(self.settings, name)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_which_loss_reads_which_setting(name: str) -> None:
    touched = _Touched(LossSettings(ranking_loss=name, token_kl=0.1))
    sums, tokens = torch.tensor([-2.0, -4.0, -3.0]), [torch.tensor([-2.0]), torch.tensor([-4.0]), torch.tensor([-3.0])]
    scores = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    lengths, others = torch.tensor([1, 1, 1]), (sums, tokens, torch.tensor(0.0), tokens, tokens)
    RANKING_LOSSES[name](RecordTensors(sums, lengths, scores, sums, *others), touched)
    assert touched.names & set(READERS) == {setting for setting, readers in READERS.items() if name in readers}


def test_a_setting_that_the_loss_does_not_read_is_told() -> None:
    (said,) = LossSettings(margin=0.1).unread()
    assert (
        said == "--margin 0.1: the ranking loss hinge does not read it, but margin, constant-margin, logistic, simpo do"
    )
    assert not LossSettings(ranking_loss="simpo", margin=0.1).unread() and not LossSettings().unread()
    assert not LossSettings(ranking_loss="simpo").unread() and not LossSettings(ranking_loss="orpo").unread()
