"""Eq. 1-5 and the other ranking losses: against naive loops, and against numbers worked out by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import losses as oracle
from rrhf.common.errors import UserError
from rrhf.common.scores import score_levels as common_levels
from rrhf.losses import (
    RANKING_LOSSES,
    SFT_REDUCTIONS,
    LossSettings,
    RecordTensors,
    best_response,
    describe,
    needs,
    normalised_logprobs,
    ordered_pairs,
    pair_weights,
    ranking_loss,
    ranks,
    rrhf_loss,
    score_levels,
    sft,
)

Case = tuple[list[float], list[int], list[float | None]]
TOLERANCE = 1e-10


@st.composite
def responses(draw: st.DrawFn) -> Case:
    """(sums, lengths, scores) of one record of 1 to 7 responses; few score values, so that ties are common."""
    k = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, 40), min_size=k, max_size=k))
    token = st.floats(-12, -1e-3)
    sums = [length * draw(token) for length in lengths]
    last_bits = st.sampled_from([0.3, 0.1 + 0.2, 0.3 * (1 + 0.8e-9), 0.3 * (1 + 1.6e-9)])
    score = st.one_of(st.none(), st.integers(-2, 2).map(float), st.floats(-5, 5), last_bits)
    return sums, lengths, draw(st.lists(score, min_size=k, max_size=k))


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums, lengths, scores = case
    return (
        torch.tensor(sums, dtype=torch.float64, requires_grad=True),
        torch.tensor(lengths),
        torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64),
    )


def close(ours: torch.Tensor, naive: float) -> bool:
    return abs(ours.item() - naive) <= TOLERANCE * max(1.0, abs(naive))


@pytest.mark.parametrize("name", oracle.RANKING)
@settings(max_examples=100, deadline=None)
@given(case=responses(), margin=st.floats(0, 2), scale=st.floats(0, 5), exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@example(case=([-3.0], [2], [1.0]), margin=0.5, scale=2.0, exponent=1.0)  # k = 1
@example(case=([-3.0, -1.0, -7.0], [2, 1, 3], [1.0, 1.0, 1.0]), margin=0.5, scale=2.0, exponent=1.0)  # all equal
@example(case=([-3.0, -1.0], [2, 1], [None, None]), margin=0.5, scale=2.0, exponent=1.0)  # nothing scored
@example(case=([-3.0, 0.0], [2, 0], [0.0, 1.0]), margin=0.5, scale=2.0, exponent=1.0)  # an empty response
def test_ranking_losses_equal_the_naive_loops(
    name: str, case: Case, margin: float, scale: float, exponent: float
) -> None:
    sums, lengths, scores = tensors(case)
    p = normalised_logprobs(sums, lengths, exponent)
    naive_p = oracle.logprobs(case[0], case[1], exponent)
    assert all(close(a, b) for a, b in zip(p, naive_p, strict=True))
    chosen = LossSettings(ranking_loss=name, margin=margin, logprob_scale=scale)
    ours = RANKING_LOSSES[name](RecordTensors(sums, lengths, scores, p), chosen)
    # e^z near an overflow is no matter of the loss: the oracle's p feeds both
    assert close(ours, oracle.RANKING[name](naive_p, case[2], margin, scale))


@settings(max_examples=100, deadline=None)
@given(case=responses(), reduction=st.sampled_from(sorted(SFT_REDUCTIONS)))
def test_the_fit_equals_the_naive_loop(case: Case, reduction: str) -> None:
    sums, lengths, scores = tensors(case)
    assert close(sft(sums, lengths, scores, reduction), oracle.sft(*case, reduction))
    assert best_response(scores) == oracle.best(case[2])
    assert list(zip(*[index.tolist() for index in ordered_pairs(scores)], strict=True)) == oracle.pairs(case[2])


@settings(max_examples=100, deadline=None)
@given(case=responses(), rank_weight=st.floats(0, 100), sft_weight=st.floats(0, 100))
def test_eq_5_equals_the_naive_loop(case: Case, rank_weight: float, sft_weight: float) -> None:
    sums, lengths, scores = tensors(case)
    loss = rrhf_loss(sums, lengths, scores, LossSettings())
    for ours, naive in zip(loss[:3], oracle.rrhf(*case), strict=True):
        assert close(ours, naive)
    weighted = rrhf_loss(sums, lengths, scores, LossSettings(rank_weight=rank_weight, sft_weight=sft_weight))
    _, rank, fit = oracle.rrhf(*case)
    assert close(weighted.total, rank_weight * rank + sft_weight * fit)


@settings(max_examples=100, deadline=None)
@given(case=responses(), padded_length=st.integers(1, 90))
def test_released_compat_equals_the_naive_loop(case: Case, padded_length: int) -> None:
    sums, lengths, scores = tensors(case)
    loss = rrhf_loss(sums, lengths, scores, LossSettings(released_compat=True), padded_length)
    for ours, naive in zip(loss[:3], oracle.released(case[0], padded_length, case[2]), strict=True):
        assert close(ours, naive)


@pytest.mark.parametrize("name", oracle.RANKING)
@pytest.mark.parametrize("seed", range(5))
def test_gradients_equal_the_naive_loops_finite_differences(name: str, seed: int) -> None:
    """Central differences of the oracle in plain floats; random values lie far from the kinks of the hinges."""
    generator = torch.Generator().manual_seed(seed)
    k = 6
    lengths = torch.randint(1, 30, (k,), generator=generator)
    sums = -lengths * (0.5 + 3 * torch.rand(k, generator=generator, dtype=torch.float64))
    scores: list[float | None] = [0.5, 0.1, None, 0.5, 0.9, 0.3]
    margin, scale = 0.2, 1.5
    leaf = sums.clone().requires_grad_()
    chosen = LossSettings(ranking_loss=name, margin=margin, logprob_scale=scale)
    tensor_scores = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(rrhf_loss(leaf, lengths, tensor_scores, chosen).total, leaf)

    def naive(values: list[float]) -> float:
        p = oracle.logprobs(values, lengths.tolist())
        return oracle.RANKING[name](p, scores, margin, scale) + oracle.sft(values, lengths.tolist(), scores)

    step = 1e-5
    for i in range(k):
        up, down = sums.tolist(), sums.tolist()
        up[i] += step
        down[i] -= step
        assert float(gradient[i]) == pytest.approx((naive(up) - naive(down)) / (2 * step), abs=1e-8)
    assert float(gradient[2]) == 0  # not scored: no part of any loss


# --- worked by hand ---------------------------------------------------------------------------------------------


def hand(sums: list[float], lengths: list[int], scores: list[float | None], **options: Any) -> tuple[float, ...]:
    padded_length = options.pop("padded_length", None)
    case = tensors((sums, lengths, scores))
    return tuple(x.item() for x in rrhf_loss(*case, LossSettings(**options), padded_length)[:3])


def test_hand_three_responses() -> None:
    # p = (−6/3, −4/4, −9/3) = (−2, −1, −3); r = (0.9, 0.1, 0.5)
    # r1 < r0: max(0, p1 − p0) = max(0, −1 + 2) = 1
    # r1 < r2: max(0, p1 − p2) = max(0, −1 + 3) = 2
    # r2 < r0: max(0, p2 − p0) = max(0, −3 + 2) = 0
    # L_rank = 3; the best is y_0, L_ft = 6; L = 9
    assert hand([-6, -4, -9], [3, 4, 3], [0.9, 0.1, 0.5]) == (9.0, 3.0, 6.0)


def test_hand_ties_and_an_unscored_response() -> None:
    # p = (−1, −2, −4, −0.5); r = (1, 1, 0, null): the pairs are (2, 0) and (2, 1), both in order: −4 − (−1) < 0,
    # −4 − (−2) < 0, so L_rank = 0; y_0 is the first of the best: L_ft = 2; L = 2
    assert hand([-2, -6, -4, -5], [2, 3, 1, 10], [1.0, 1.0, 0.0, None]) == (2.0, 0.0, 2.0)


def test_hand_rank_margin() -> None:
    # p = (−1, −1, −1), r = (3, 2, 1): ranks 1, 2, 3; λ = 0.25
    # (1, 0): 0.25·1, (2, 0): 0.25·2, (2, 1): 0.25·1; L_rank = 1; L_ft = 2
    assert hand([-2, -3, -1], [2, 3, 1], [3.0, 2.0, 1.0], ranking_loss="margin", margin=0.25) == (3.0, 1.0, 2.0)
    # a tie shares a rank and the next rank is 2: r = (3, 3, 1): (2, 0) and (2, 1), each 0.25·(2 − 1); L_rank = 0.5
    assert hand([-2, -3, -1], [2, 3, 1], [3.0, 3.0, 1.0], ranking_loss="margin", margin=0.25) == (2.5, 0.5, 2.0)
    assert ranks(torch.tensor([3.0, math.nan, 3.0, 1.0]))[[0, 2, 3]].tolist() == [1, 1, 2]


def test_hand_constant_margin() -> None:
    # p = (−1, −1.5), r = (1, 0): max(0, −1.5 + 1 + 0.75) = 0.25; weights 4 and 0.5: 4·0.25 + 0.5·2 = 2
    options = {"ranking_loss": "constant-margin", "margin": 0.75, "rank_weight": 4.0, "sft_weight": 0.5}
    assert hand([-2, -3], [2, 2], [1.0, 0.0], **options) == (2.0, 0.25, 2.0)


def test_hand_logistic() -> None:
    # scale·(p_j − p_i) − margin = 2·(−1 + 1.5) − 1 = 0: −log σ(0) = log 2; mean reduction: L_ft = 2/2 = 1
    options = {"ranking_loss": "logistic", "margin": 1.0, "logprob_scale": 2.0, "sft_reduction": "mean"}
    assert hand([-2, -3], [2, 2], [1.0, 0.0], **options) == pytest.approx((1 + math.log(2), math.log(2), 1.0))


def test_hand_listmle() -> None:
    # all p equal, no ties: −log(1/3) − log(1/2) − log(1/1) = log 6; L_ft = 2
    options = {"ranking_loss": "listmle"}
    assert hand([-2, -4, -6], [1, 2, 3], [2.0, 1.0, 0.0], **options) == pytest.approx((2 + math.log(6), math.log(6), 2))
    # two share the best score: each stands against the third alone: 2 log 2
    assert hand([-2, -4, -6], [1, 2, 3], [2.0, 2.0, 0.0], **options)[1] == pytest.approx(2 * math.log(2))


def test_hand_released_code() -> None:
    # query of 4 tokens, responses of 2 and 4: rows are padded to 8. r = (0, 1).
    # Eq. 1: p = (−4/2, −12/4) = (−2, −3), the pair is violated by 1, L_ft = 12: L = 13.
    # Released: p = (−4/8, −12/8) = (−0.5, −1.5), also violated by 1, but L_ft = 12/8 = 1.5: L = 2.5.
    assert hand([-4, -12], [2, 4], [0.0, 1.0]) == (13.0, 1.0, 12.0)
    assert hand([-4, -12], [2, 4], [0.0, 1.0], released_compat=True, padded_length=8) == (2.5, 1.0, 1.5)
    # The order itself can turn: sums (−6, −8), lengths (2, 4): Eq. 1 has p = (−3, −2), in order, L_rank = 0;
    # released has p = (−0.75, −1), violated by 0.25; L_ft = 8 against 1.
    assert hand([-6, -8], [2, 4], [0.0, 1.0]) == (8.0, 0.0, 8.0)
    assert hand([-6, -8], [2, 4], [0.0, 1.0], released_compat=True, padded_length=8) == (1.25, 0.25, 1.0)


# --- equal scores -----------------------------------------------------------------------------------------------

PAIRWISE = ["hinge", "margin", "constant-margin", "logistic"]


@pytest.mark.parametrize("name", PAIRWISE)
@settings(max_examples=50, deadline=None)
@given(case=responses(), ties=st.sampled_from(["none", "half", "margin:0.7", "margin:2"]))
@example(case=([-3.0, -2.0], [1, 1], [-2.0, -1.2e-172]), ties="margin:2")  # E but for the last bit
def test_ties_equal_the_naive_loops(name: str, case: Case, ties: str) -> None:
    sums, lengths, scores = tensors(case)
    p = normalised_logprobs(sums, lengths)
    chosen = LossSettings(ranking_loss=name, margin=0.3, logprob_scale=1.5, ties=ties)
    ours = RANKING_LOSSES[name](RecordTensors(sums, lengths, scores, p), chosen)
    naive = oracle.with_ties(name, oracle.logprobs(case[0], case[1]), case[2], 0.3, 1.5, ties)
    assert close(ours, naive)


def test_hand_half_a_tie() -> None:
    # p = (−1, −2, −4), r = (1, 1, 0). Both pairs with y_2 are in order. The tie (0, 1):
    # (max(0, −1 + 2) + max(0, −2 + 1)) / 2 = 1/2; L_ft = 2 on y_0
    case = [-2, -6, -4], [2, 3, 1], [1.0, 1.0, 0.0]
    assert hand(*case, ties="half") == (2.5, 0.5, 2.0)
    assert hand(*case)[1] == 0
    # Bradley-Terry, alone: −(log σ(1) + log σ(−1)) / 2 = log(1 + e^−1) + 1/2
    alone = hand([-2, -6], [2, 3], [1.0, 1.0], ranking_loss="logistic", ties="half")
    assert alone[1] == pytest.approx(math.log1p(math.exp(-1)) + 0.5)
    # with a margin of 2 the hinge of a tie is flat where |p_i − p_j| ≤ 2: (max(0, 1 + 2) + max(0, −1 + 2)) / 2 = 2
    assert hand([-2, -6], [2, 3], [1.0, 1.0], ranking_loss="constant-margin", margin=2.0, ties="half")[1] == 2.0
    # Plackett-Luce: half a rival each: −log(1 / (1 + e^−1/2)) − log(1 / (1 + e/2))
    alone = hand([-2, -6], [2, 3], [1.0, 1.0], ranking_loss="listmle", ties="half")
    assert alone[1] == pytest.approx(math.log(1 + math.exp(-1) / 2) + math.log(1 + math.e / 2))


def test_hand_a_margin_between_scores() -> None:
    # E = 0.5, r = (0, 0.4, 0.8, null): only (0, 2) is a pair, 0.4 is equal to both; p = (−1, −2, −4, −1)
    case = [-1, -2, -4, -1], [1, 1, 1, 1], [0.0, 0.4, 0.8, None]
    assert hand(*case, ties="margin:0.5")[1] == 3.0  # −1 + 4
    assert hand(*case)[1] == 6.0  # (0, 1): 1, (1, 2): 2, (0, 2): 3
    scores = torch.tensor(case[2][:3], dtype=torch.float64)
    assert [index.tolist() for index in ordered_pairs(scores, "margin:0.5")] == [[0], [2]]
    assert [index.tolist() for index in ordered_pairs(scores, "margin:0.4")] == [
        [0, 0, 1],
        [1, 2, 2],
    ]  # E itself is far
    assert torch.equal(pair_weights(scores, "margin:0"), pair_weights(scores))


@pytest.mark.parametrize("name", [*PAIRWISE, "listmle"])
def test_half_pulls_a_tie_together(name: str) -> None:
    leaf = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    chosen = LossSettings(ranking_loss=name, ties="half")
    record = RecordTensors(leaf, torch.ones(2), torch.ones(2, dtype=torch.float64), leaf)
    higher, lower = torch.autograd.grad(RANKING_LOSSES[name](record, chosen), leaf)[0].tolist()
    assert higher > 0 > lower


@pytest.mark.parametrize("ties", ["halves", "margin", "margin:x", "margin:-1", "margin:nan", "half:2"])
def test_a_rule_for_ties_that_is_none(ties: str) -> None:
    with pytest.raises(UserError, match=f"--ties {ties}: "):
        LossSettings(ties=ties)


def test_k_1_is_supervised_fine_tuning() -> None:
    assert hand([-7], [3], [0.2]) == (7.0, 0.0, 7.0)


def test_all_equal_fits_the_first_and_ranks_nothing() -> None:
    assert hand([-7, -1, -2], [3, 1, 1], [0.2, 0.2, 0.2]) == (7.0, 0.0, 7.0)


@pytest.mark.parametrize("name", oracle.RANKING)
def test_nothing_scored_is_a_zero_with_a_graph(name: str) -> None:
    sums, lengths, scores = tensors(([-7.0, -1.0], [3, 1], [None, None]))
    loss = rrhf_loss(sums, lengths, scores, LossSettings(ranking_loss=name)).total
    (gradient,) = torch.autograd.grad(loss, sums)
    assert float(loss) == 0
    assert gradient.tolist() == [0, 0]


def test_inputs_are_left_as_they_are() -> None:
    sums, lengths, scores = tensors(([-7.0, -1.0], [3, 1], [1.0, None]))
    before = [t.detach().clone() for t in (sums, lengths, scores)]
    rrhf_loss(sums, lengths, scores, LossSettings(released_compat=True), 9)
    for tensor, copy in zip((sums, lengths, scores), before, strict=True):
        assert torch.equal(tensor.nan_to_num(-1), copy.nan_to_num(-1))


def test_released_compat_needs_the_padded_length() -> None:
    with pytest.raises(ValueError, match="padded_length"):
        rrhf_loss(*tensors(([-7.0], [3], [1.0])), LossSettings(released_compat=True))


def test_bad_settings_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        LossSettings(
            ranking_loss="hinges", sft_reduction="avg", rank_weight=-1, sft_weight=math.nan, margin=math.inf,
            logprob_scale=-0.5,
        )  # fmt: skip
    message = str(caught.value)
    for name in ("ranking_loss", "sft_reduction", "rank_weight", "sft_weight", "margin", "logprob_scale"):
        assert f"--{name} " in message
    assert "did you mean 'hinge'" in message
    assert "listmle" in message  # the known ones are listed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_length_exponent_must_be_finite(value: float) -> None:
    with pytest.raises(UserError, match="--length_exponent"):
        LossSettings(length_exponent=value)


# --- losses from elsewhere --------------------------------------------------------------------------------------


@pytest.fixture
def own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a user, in the folder where the command is given."""
    (tmp_path / "own_losses.py").write_text(
        "from rrhf.losses import needs\n\n"
        "def squared(record, settings):\n"
        '    """The square of every sum."""\n'
        "    return settings.margin * (record.sums**2 / record.lengths).sum()\n\n"
        "def vector(record, settings):\n    return record.logprobs\n\n"
        "def number(record, settings):\n    return 1.0\n\n"
        "def fails(record, settings):\n    return 1 / 0\n\n"
        '@needs("reference_sums")\n'
        "def against_reference(record, settings):\n    return (record.sums - record.reference_sums).sum()\n\n"
        "Loss = type('Loss', (), {})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)
    ranking_loss.cache_clear()
    return tmp_path


@pytest.mark.usefixtures("own_losses")
def test_a_ranking_loss_from_elsewhere() -> None:
    # 0.5·(4/2 + 9/3) = 2.5; the best is y_0: L_ft = 2
    assert hand([-2, -3], [2, 3], [1.0, 0.0], ranking_loss="own_losses:squared", margin=0.5) == (4.5, 2.5, 2.0)
    for name, returned in (("vector", r"shape \(2,\)"), ("number", "float")):
        with pytest.raises(UserError, match=f"--ranking_loss own_losses:{name}: it must return a scalar.*{returned}"):
            hand([-2, -3], [2, 3], [1.0, 0.0], ranking_loss=f"own_losses:{name}")
    with pytest.raises(UserError, match=r"--ranking_loss own_losses:fails failed: ZeroDivisionError: .* \(in fails, "):
        hand([-2, -3], [2, 3], [1.0, 0.0], ranking_loss="own_losses:fails")


@pytest.mark.usefixtures("own_losses")
def test_a_loss_gets_what_it_declares() -> None:
    chosen = LossSettings(ranking_loss="own_losses:against_reference")
    sums, lengths, scores = tensors(([-2.0, -3.0], [2, 3], [1.0, 0.0]))
    with pytest.raises(ValueError, match="own_losses:against_reference needs reference_sums"):
        rrhf_loss(sums, lengths, scores, chosen)
    loss = rrhf_loss(sums, lengths, scores, chosen, reference_sums=torch.tensor([-4.0, -4.0]))
    assert loss.rank.item() == 3.0
    with pytest.raises(ValueError, match="needs\\(reference_sum\\): did you mean 'reference_sums'"):
        needs("reference_sum")


@pytest.mark.usefixtures("own_losses")
@pytest.mark.parametrize(
    "name, said",
    [("own_losses:squere", "did you mean 'squared'"), ("own_lossess:f", "no module"), ("own_losses:Loss", "a class")],
)
def test_a_loss_from_elsewhere_that_is_none(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"--ranking_loss {name}: ranking loss .*{said}"):
        LossSettings(ranking_loss=name)


def test_help_describes_every_loss() -> None:
    (setting,) = [f for f in fields(LossSettings) if f.name == "ranking_loss"]
    for name, loss in RANKING_LOSSES.items():
        assert describe(loss)
        assert f"{name}: {describe(loss)}" in setting.metadata["help"]


def test_scores_that_differ_in_the_last_bit_of_a_sum_are_equal() -> None:
    scores = torch.tensor([0.3, 0.1 + 0.2, 0.3000001, math.nan], dtype=torch.float64)
    assert scores[0] < scores[1]
    assert score_levels(scores).tolist() == [0, 0, 1, -1]
    assert [pair.tolist() for pair in ordered_pairs(scores)] == [[0, 1], [2, 2]]
    assert ranks(scores)[:3].tolist() == [2, 2, 1]
    assert best_response(scores[:2]) == 0


@given(scores=responses().map(lambda case: [score for score in case[2] if score is not None]))
def test_levels_with_and_without_torch_are_the_same(scores: list[float]) -> None:
    assert score_levels(torch.tensor(scores, dtype=torch.float64)).tolist() == common_levels(scores)
    infinite = [*scores, math.inf, -math.inf, math.inf]
    assert score_levels(torch.tensor(infinite, dtype=torch.float64)).tolist() == common_levels(infinite)
