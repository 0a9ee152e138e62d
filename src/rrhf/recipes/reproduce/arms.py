"""The table of arms: what each runs, laid over the configuration of its task and scale, and what it stands for.

A new arm is a line in ``ARMS``. ``best-of-N`` and ``loss:NAME`` take any N and any ranking loss; ``NAME+ABLATION`` lays
an ablation of ``configs/ablations.yaml`` over an arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rrhf.common.errors import UserError, nearest
from rrhf.recipes.config import ablations, merge

TASKS = ("imdb", "hh", "wombat")
RUN, SFT, PPO, NLPO, BEST_OF, START = "run", "sft", "ppo", "nlpo", "best-of-n", "start"  # kinds
AFTER_SFT = "after-sft"

# How responses are sampled (Table 1 and Appendix C); 4 of a query in each.
BEAM = {"policy": "beam", "num_beams": 4}
DIVERSE = {"policy": "diverse-beam", "num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0, "temperature": 1.0}
TOP_P = {"policy": "top-p", "top_k": None, "top_p": 1.0, "temperature": 0.8, "num_responses": 4}
TOP_K = {"policy": "top-k", "top_k": 50, "temperature": 1.0, "num_responses": 4}
WHOLE = {**TOP_P, "temperature": 1.0}  # π itself, as ratios of it need

RELATIVE = {"ranking_loss": "dpo"}  # of RRHF-R: docs/relative.md

MARGINS = {"margin": {"margin": 0.01}, "constant-margin": {"margin": 0.1}}  # with 0 they are the hinge; nats a token

ALONE = {"provided": False}  # without the responses of the data set


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        name: as ``--arms`` takes it.
        meaning: what is done, in a sentence.
        paper: the paper's cell that it stands for; empty where it has none.
        kind: what carries it out: a run, or a baseline.
        config: laid over the configuration of the run.
        rounds: IP-n's n; each round gets an n-th of the optimiser steps.
        online: whether responses are sampled while training (OP-k).
        resample_steps: k of OP-k; None: the scale's.
        kl: whether the policy is kept near ρ by the scale's β.
        number: best-of-n's n.
    """

    name: str
    meaning: str
    paper: str = ""
    kind: str = RUN
    config: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1
    online: bool = False
    resample_steps: int | None = None
    kl: bool = False
    number: int = 1

    @property
    def has_rate(self) -> bool:
        """Whether it trains, so that a learning rate has to be chosen."""
        return self.kind not in (BEST_OF, START)

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return self.name.replace(":", "-")

    @property
    def trainings(self) -> int:
        """How often it takes all the steps of the scale."""
        return 2 if self.kind == AFTER_SFT else 1

    def with_ablation(self, name: str) -> Arm:
        return replace(
            self, name=f"{self.name}+{name}", meaning=f"{self.meaning}; {name}", paper="",
            config=merge(self.config, ablations()[name]),
        )  # fmt: skip


def rounds(number: int, paper: str) -> Arm:
    meaning = f"RRHF-DP in {number} rounds, each from the last one's model" if number > 1 else "RRHF-DP: one round"
    return Arm(f"IP-{number}", meaning, paper, config={"sample": DIVERSE}, rounds=number)


def of_loss(name: str, label: str | None = None) -> Arm:
    """The arm of a ranking loss: on the samples of RRHF-DP, or, of policy gradients, on what π draws for a step."""
    train: dict[str, Any] = {"train": {"ranking_loss": name} | MARGINS.get(name, {})}
    if name in ("grpo", "rloo"):
        meaning = f"loss {name} on samples that π draws for each step, without the data set's responses"
        config = {"data": ALONE, "sample": WHOLE, **train}
        return Arm(label or f"loss:{name}", meaning, config=config, online=True, resample_steps=1)
    meaning = f"loss {name} on the samples of RRHF-DP"
    meaning += "".join(f", {key} {value:g}" for key, value in MARGINS.get(name, {}).items())
    return Arm(label or f"loss:{name}", meaning, config={"sample": DIVERSE, **train})


COMMON = [
    Arm("start", "ρ itself, from which every arm begins", "SFT, or the starting model", START),
    Arm("SFT", "fine-tuning on the data set's response", "SFT on the good responses", SFT,
        config={"train": {"ranking_loss": "none"}}),
    Arm("best-of-4", "the best of 4 samples of ρ by the reward", "best-of-n (Table 8)", BEST_OF, number=4),
    Arm("RAFT", "fine-tuning on the best of 4 samples from the whole of π, in 3 rounds",
        config={"data": ALONE, "sample": WHOLE, "train": {"ranking_loss": "none"}}, rounds=3),
    of_loss("dpo", "DPO"),
    of_loss("simpo", "SimPO"),
    of_loss("kto", "KTO"),
    of_loss("grpo", "GRPO"),
    of_loss("rloo", "RLOO"),
]  # fmt: skip

ARMS: dict[str, list[Arm]] = {
    "imdb": [
        *COMMON,
        Arm("RRHF-BP", "4 top-k samples of ρ and the review's own continuation", "Table 10, BP",
            config={"sample": TOP_K}),
        Arm("RRHF-B", "4 top-k samples of ρ alone", "Table 10, B", config={"data": ALONE, "sample": TOP_K}),
        Arm("RRHF-DP", "diverse beam search by ρ and the review's own continuation", "Table 2's DP, on IMDB",
            config={"sample": DIVERSE}),
        Arm("RRHF-SP", "4 top-p samples of ρ and the review's own continuation", "Table 2's SP, on IMDB",
            config={"sample": TOP_P}),
        Arm("RRHF-D", "diverse beam search by ρ alone", "Table 6's D, on IMDB",
            config={"data": ALONE, "sample": DIVERSE}),
        *(rounds(number, f"Table 6's IP-{number}, on IMDB") for number in (1, 2, 3)),
        Arm("OP", "top-k samples of π while it trains, and the review's own continuation", "Table 10, OP-128, β 0",
            config={"sample": TOP_K}, online=True),
        Arm("OP+KL", "OP with the reward less β (log π − log ρ)", "Table 10, OP-128, β 0.1",
            config={"sample": TOP_K}, online=True, kl=True),
        Arm("RRHF-R", "as OP, ranking log π/ρ by DPO over all pairs",
            config={"sample": TOP_K, "train": RELATIVE}, online=True),
        Arm("PPO", "PPO without a KL penalty", "Table 10, PPO, β 0", PPO),
        Arm("PPO+KL", "PPO with a KL penalty a token", "Table 10, PPO, β 0.1", PPO, kl=True),
        Arm("NLPO", "NLPO without a KL penalty", "Table 10, NLPO, β 0", NLPO),
        Arm("NLPO+KL", "NLPO with a KL penalty a token", "Table 10, NLPO, β 0.1", NLPO, kl=True),
    ],
    "hh": [
        *COMMON,
        Arm("RRHF-BP", "beam search by ρ and both provided responses", "Table 2, BP", config={"sample": BEAM}),
        Arm("RRHF-SP", "4 top-p samples of ρ and both provided responses", "Table 2, SP", config={"sample": TOP_P}),
        Arm("RRHF-DP", "diverse beam search by ρ and both provided responses", "Table 2, DP",
            config={"sample": DIVERSE}),
        Arm("RRHF-D", "diverse beam search by ρ alone", "Table 6, D", config={"data": ALONE, "sample": DIVERSE}),
        Arm("RRHF-P", "both provided responses alone", "Table 6, P", config={"sample": None}),
        Arm("RRHF-P-after-SFT", "RRHF-P from what SFT came to, with as many steps again", "Table 6, P from Alpaca-sft",
            AFTER_SFT, config={"sample": None}),
        Arm("RRHF-BP-no-rank", "RRHF-BP without L_rank", "Table 7, without L_rank",
            config={"sample": BEAM, "train": {"ranking_loss": "none"}}),
        *(rounds(number, f"Table 6, IP-{number}") for number in (1, 2, 3)),
        Arm("OP", "diverse beam search by π while it trains, and both provided responses", "Table 6, OP-32",
            config={"sample": DIVERSE}, online=True),
        Arm("OP+KL", "OP with the reward less β (log π − log ρ)", "Table 6, OP-32 + KL",
            config={"sample": DIVERSE}, online=True, kl=True),
        Arm("RRHF-R", "as OP, ranking log π/ρ by DPO over all pairs",
            config={"sample": DIVERSE, "train": RELATIVE}, online=True),
        Arm("PPO", "PPO with a KL penalty a token", "Table 2, PPO", PPO, kl=True),
    ],
    "wombat": [
        Arm("start", "ρ itself, from which every arm begins", "LLaMA", START),
        Arm("SFT", "fine-tuning on the data set's response", "Alpaca", SFT,
            config={"train": {"ranking_loss": "none"}}),
        Arm("Wombat", "the responses of five systems, in the data, and the scores given there", "Wombat",
            config={"sample": None}),
    ],
}  # fmt: skip


def arms_named(task: str, names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in their order.

    Raises:
        UserError: a name is none of the task's.
    """
    return [arm_named(task, name) for name in names]


def arm_named(task: str, name: str) -> Arm:
    from rrhf.losses import RANKING_LOSSES

    known = {arm.name: arm for arm in ARMS[task]}
    if name in known:
        return known[name]
    if name.startswith("best-of-") and name.removeprefix("best-of-").isdecimal() and int(name.split("-")[-1]) > 1:
        number = int(name.removeprefix("best-of-"))
        return Arm(name, f"the best of {number} samples of ρ by the reward", "best-of-n", BEST_OF, number=number)
    loss = name.removeprefix("loss:")
    if name.startswith("loss:") and (loss in RANKING_LOSSES or ":" in loss):
        return of_loss(loss)
    base, _, ablation = name.rpartition("+")
    if base and ablation in ablations():
        return arm_named(task, base).with_ablation(ablation)
    names = [*known, *(f"loss:{loss}" for loss in RANKING_LOSSES)]
    raise UserError(f"--arms {name}: {nearest(name, names)}; and best-of-N, and NAME+ABLATION")
