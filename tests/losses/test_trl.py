"""Our losses against what TRL's own code made of the same numbers (tests/oracles/record_trl_losses.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.losses import LossSettings, grpo_advantages, rloo_advantages, rrhf_loss

FOUND: dict[str, Any] = json.loads((Path(__file__).parent.parent / "oracles" / "trl_losses.json").read_text())
CHOSEN, REJECTED = FOUND["numbers"]["chosen"], FOUND["numbers"]["rejected"]
PAIRS = range(len(CHOSEN["tokens"]))


def pair(i: int, name: str, kl: float | None = None, **options: Any) -> float:
    """The ranking loss of the pair i, chosen before rejected."""
    rows = [CHOSEN["tokens"][i], REJECTED["tokens"][i]]
    return rrhf_loss(
        torch.tensor([sum(row) for row in rows]),
        torch.tensor([len(row) for row in rows]),
        torch.tensor([1.0, 0.0]),
        LossSettings(ranking_loss=name, **options),
        reference_sums=torch.tensor([CHOSEN["reference"][i], REJECTED["reference"][i]]),
        batch_kl=None if kl is None else torch.tensor(kl),
    ).rank.item()


@pytest.mark.parametrize("beta", FOUND["losses"])
@pytest.mark.parametrize("name", ["dpo", "ipo", "cpo", "simpo", "orpo"])
def test_losses_of_pairs(name: str, beta: str) -> None:
    options = {"dpo_beta": float(beta)}
    if name == "simpo":
        options = {"logprob_scale": float(beta), "margin": FOUND["simpo_gamma"]}
    ours = [pair(i, name, **options) for i in PAIRS]
    assert ours == pytest.approx(FOUND["losses"][beta][name], abs=1e-5)


@pytest.mark.parametrize("beta", FOUND["losses"])
def test_kto_under_the_same_kl(beta: str) -> None:
    theirs = FOUND["losses"][beta]["kto"]
    assert theirs["kl"] > 0.1
    ours = [pair(i, "kto", theirs["kl"], dpo_beta=float(beta)) for i in PAIRS]
    assert sum(ours) / len(ours) == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_policy_gradients_over_two_updates_on_one_batch(name: str) -> None:
    """TRL deals a batch out in another order than its rewards: rows are found again by their advantages."""
    recorded = FOUND[name]
    advantages = {"grpo": grpo_advantages, "rloo": rloo_advantages}[name]
    options = {"clip_range": recorded["epsilon"], "token_kl": recorded.get("beta", 0.0)}
    first = recorded["steps"][0]
    clipped = 0
    for step in recorded["steps"]:
        losses = []
        for start in (0, 4):  # two queries with four responses each
            scores = torch.tensor(step["rewards"][start : start + 4])
            found = torch.tensor(step["advantages"])
            rows = [int((found - own).abs().argmin()) for own in advantages(scores)]
            assert len(set(rows)) == 4
            assert advantages(scores).tolist() == pytest.approx(found[rows].tolist(), abs=1e-5)
            now, old = ([torch.tensor(table[row]) for row in rows] for table in (step["now"], first["now"]))
            reference = [torch.tensor(step["reference"][row]) for row in rows] if "reference" in step else None
            clipped += sum(int(((a - b).exp() - 1).abs().gt(recorded["epsilon"]).sum()) for a, b in zip(now, old))
            losses.append(
                rrhf_loss(
                    torch.stack([row.sum() for row in now]),
                    torch.tensor([len(row) for row in now]),
                    scores,
                    LossSettings(ranking_loss=name, **options),
                    token_logprobs=now,
                    old_token_logprobs=old,
                    reference_token_logprobs=reference,
                ).rank.item()
            )
        assert sum(losses) / 2 == pytest.approx(step["loss"], abs=1e-5)
    assert clipped > 0  # the second update was far enough from the first
