"""Losses of lists, with a reference and over tokens: against naive loops over plain floats, gradients included."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles import losses as oracle
from oracles.list_losses import LOSSES, Plain
from rrhf.losses import RANKING_LOSSES, LossSettings, rrhf_loss

TOLERANCE = 1e-10
OPTIONS: dict[str, Any] = {
    "margin": 0.3, "logprob_scale": 1.5, "length_exponent": 1.0, "dpo_beta": 0.2, "dpo_pairs": "all",
    "score_scale": 1.0, "clip_range": 0.2, "token_kl": 0.0,
}  # fmt: skip


def test_every_loss_has_one_oracle() -> None:
    assert set(RANKING_LOSSES) == set(oracle.RANKING) | set(LOSSES)
    assert not set(oracle.RANKING) & set(LOSSES)


@st.composite
def records(draw: st.DrawFn) -> Plain:
    """One record of 1 to 6 responses; few score values, so that ties are common, and empty and unscored responses."""
    k = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, 5), min_size=k, max_size=k))
    token, near = st.floats(-8, -1e-3), st.floats(-1, 1)
    tokens = [draw(st.lists(token, min_size=n, max_size=n)) for n in lengths]

    def beside() -> list[list[float]]:
        return [[own + draw(near) for own in row] for row in tokens]

    score = st.one_of(st.none(), st.integers(-2, 2).map(float), st.floats(-5, 5))
    scores = draw(st.lists(score, min_size=k, max_size=k))
    sums = [math.fsum(row) for row in tokens]
    reference = [total + 3 * draw(near) for total in sums]
    return Plain(sums, lengths, scores, reference, abs(draw(near)), tokens, beside(), beside())


def ours(name: str, record: Plain, options: dict[str, Any], ties: str = "none") -> tuple[Tensor, Tensor, list[Tensor]]:
    """The ranking loss, and the leaves that it is made of: sums and tokens."""
    sums = torch.tensor(record.sums, dtype=torch.float64, requires_grad=True)
    rows = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in record.tokens]
    loss = rrhf_loss(
        sums,
        torch.tensor(record.lengths),
        torch.tensor([math.nan if score is None else score for score in record.scores], dtype=torch.float64),
        LossSettings(ranking_loss=name, ties=ties, **options),
        reference_sums=torch.tensor(record.reference, dtype=torch.float64),
        batch_kl=torch.tensor(record.kl, dtype=torch.float64),
        token_logprobs=rows,
        old_token_logprobs=[torch.tensor(row, dtype=torch.float64) for row in record.old],
        reference_token_logprobs=[torch.tensor(row, dtype=torch.float64) for row in record.reference_tokens],
    )
    return loss.rank, sums, rows


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None)
@given(
    record=records(),
    scale=st.floats(0, 4),
    beta=st.floats(0.05, 2),
    exponent=st.sampled_from([0.0, 0.5, 1.0]),
    pairs=st.sampled_from(["all", "best"]),
    score_scale=st.floats(0, 3),
    kl=st.sampled_from([0.0, 0.4]),
)
def test_losses_equal_the_naive_loops(
    name: str, record: Plain, scale: float, beta: float, exponent: float, pairs: str, score_scale: float, kl: float
) -> None:
    options = {
        **OPTIONS, "logprob_scale": scale, "dpo_beta": beta, "length_exponent": exponent, "dpo_pairs": pairs,
        "score_scale": score_scale, "token_kl": kl,
    }  # fmt: skip
    naive = LOSSES[name](record, options)
    assert abs(ours(name, record, options)[0].item() - naive) <= TOLERANCE * max(1.0, abs(naive))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(2))
def test_gradients_equal_the_naive_loops_finite_differences(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (5,), generator=generator).tolist()

    def rows(spread: float, around: list[list[float]] | None = None) -> list[list[float]]:
        drawn = [(spread * torch.rand(n, generator=generator, dtype=torch.float64)).tolist() for n in lengths]
        return drawn if around is None else [[a + b for a, b in zip(x, y)] for x, y in zip(drawn, around)]

    tokens = [[value - 3 for value in row] for row in rows(2.0)]
    sums = [math.fsum(row) for row in tokens]
    reference = [total + float(torch.randn((), generator=generator)) for total in sums]
    record = Plain(
        sums, lengths, [0.5, 0.1, None, 0.5, 0.9], reference, 0.3, tokens, rows(0.6, tokens), rows(0.9, tokens)
    )
    options = {**OPTIONS, "token_kl": 0.4}
    loss, leaf, leaves = ours(name, record, options)
    of_sums, *of_tokens = torch.autograd.grad(loss, [leaf, *leaves], materialize_grads=True)
    step = 1e-5

    def difference(up: Plain, down: Plain) -> float:
        return (LOSSES[name](up, options) - LOSSES[name](down, options)) / (2 * step)

    def moved(values: list[float], i: int, by: float) -> list[float]:
        return [*values[:i], values[i] + by, *values[i + 1 :]]

    if name in ("grpo", "rloo"):
        for i, row in enumerate(tokens):
            for t in range(len(row)):
                up, down = (
                    replace(record, tokens=[*tokens[:i], moved(row, t, by), *tokens[i + 1 :]]) for by in (step, -step)
                )
                assert float(of_tokens[i][t]) == pytest.approx(difference(up, down), abs=1e-8)
    else:
        for i in range(len(sums)):
            up, down = (replace(record, sums=moved(sums, i, by)) for by in (step, -step))
            assert float(of_sums[i]) == pytest.approx(difference(up, down), abs=1e-8)
    assert float(of_sums[2]) == 0 and not of_tokens[2].any()  # not scored: no part of any loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scores", [[None, None], [1.0, 1.0], [1.0, None]])
def test_without_an_order_there_is_no_gradient(name: str, scores: list[float | None]) -> None:
    record = Plain([-7.0, -1.0], [2, 1], scores, [-6.0, -2.0], 0.1, [[-3.0, -4.0], [-1.0]], [[-3.0, -4.0], [-1.0]])
    loss, sums, rows = ours(name, replace(record, reference_tokens=record.tokens), OPTIONS)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    for gradient in torch.autograd.grad(loss, [sums, *rows], materialize_grads=True):
        assert gradient.tolist() == pytest.approx([0] * len(gradient), abs=1e-12)


@pytest.mark.parametrize("name", ["cpo", "orpo", "dpo", "dpo-listmle"])
def test_half_pulls_a_tie_together(name: str) -> None:
    record = Plain([-1.0, -2.0], [1, 1], [1.0, 1.0], [-1.5, -1.5], tokens=[[-1.0], [-2.0]])
    loss, sums, _ = ours(name, record, OPTIONS, ties="half")
    higher, lower = torch.autograd.grad(loss, sums)[0].tolist()
    assert higher > 0 > lower


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_raises_the_better_one_against_the_worse(name: str) -> None:
    near = [[-1.1, -1.0], [-0.9, -1.0]]
    record = Plain([-2.1, -1.9], [2, 2], [1.0, 0.0], [-2.1, -1.9], 0.0, near, near, near)
    loss, sums, rows = ours(name, record, OPTIONS)
    of_sums, *of_tokens = torch.autograd.grad(loss, [sums, *rows], materialize_grads=True)
    better, worse = (float(of_sums[i] + of_tokens[i].sum()) for i in (0, 1))
    assert better < 0 < worse
