"""``PPOConfig`` and ``NLPOSettings``: every setting of ``rrhf.training.ppo``, checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rrhf.common.errors import UserError, nearest, too_small

# Those of transformers that need no more than a warm-up and a number of steps.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass(frozen=True)
class PPOConfig:
    """How PPO samples, rewards and updates. Names that ``rrhf train`` has too mean what they mean there."""

    learning_rate: float = field(default=1e-5, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": f"how the learning rate falls: {', '.join(SCHEDULES)}"}
    )
    warmup_steps: float = field(default=0.0, metadata={"help": "steps of warm-up, or below 1 their share of all steps"})
    weight_decay: float = field(default=0.0, metadata={"help": "pull of the weights towards 0"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "ε of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "longer gradients are cut to this norm"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the queries"})
    max_steps: int = field(
        default=-1,
        metadata={"help": "optimiser steps in place of --num_train_epochs, rounded up to whole rollouts"},
    )
    rollout_queries: int = field(
        default=64, metadata={"help": "queries of a rollout: sampled and scored, then trained on --ppo_epochs times"}
    )
    num_responses: int = field(default=1, metadata={"help": "responses a query and rollout"})
    max_new_tokens: int = field(default=48, metadata={"help": "most tokens of a response, its end token counted"})
    batch_size: int = field(default=32, metadata={"help": "queries that are decoded together"})
    ppo_epochs: int = field(default=4, metadata={"help": "passes over a rollout"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "queries of an optimiser step"})
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={"help": "rows of one forward pass; default: 2048 on a CPU, 8192 elsewhere. It changes no gradient "
                  "but by rounding"},
    )  # fmt: skip
    clip_range: float = field(default=0.2, metadata={"help": "ε of Eq. 6: how far a token's ratio may pull"})
    value_clip_range: float = field(
        default=0.2, metadata={"help": "how far a value may pull from where it was when the rollout was sampled"}
    )
    value_coefficient: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of the advantages"})
    gamma: float = field(default=1.0, metadata={"help": "discount a token"})
    kl_beta: float = field(default=0.05, metadata={"help": "β of the penalty a token, β (log π − log ρ)"})
    kl_target: float | None = field(
        default=None, metadata={"help": "adapt β so that KL(π, ρ) a response comes to this (Ziegler et al. 2019)"}
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "ρ; default: the model before training (with --peft the model without its adapter: no copy)"},
    )
    value_model: str | None = field(
        default=None,
        metadata={"help": "a model to train as value model (of the policy's tokenizer); default: none, the values are "
                  "a linear function of the policy's own last hidden states"},
    )  # fmt: skip
    whiten_rewards: bool = field(default=False, metadata={"help": "scale a rollout's rewards a token to variance 1"})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "shift and scale a rollout's advantages to mean 0 and variance 1"}
    )
    save_steps: int = field(
        default=100, metadata={"help": "optimiser steps between two checkpoints, rounded up to whole rollouts"}
    )
    save_total_limit: int = field(default=2, metadata={"help": "older checkpoints than so many are deleted"})
    seed: int = field(default=42, metadata={"help": "seed of every random choice"})

    def __post_init__(self) -> None:
        faults = too_small(
            self, rollout_queries=1, num_responses=1, max_new_tokens=1, batch_size=1, ppo_epochs=1,
            per_device_train_batch_size=1, max_tokens_per_forward=1, save_steps=1, save_total_limit=1,
        )  # fmt: skip
        if self.lr_scheduler_type not in SCHEDULES:
            faults.append(f"--lr_scheduler_type {self.lr_scheduler_type}: {nearest(self.lr_scheduler_type, SCHEDULES)}")
        if self.max_steps == 0:
            faults.append("--max_steps 0: nothing would be trained: leave it out, or give a number above 0")
        if self.num_train_epochs == math.inf:
            faults.append(f"--num_train_epochs {self.num_train_epochs}: must be a finite number")
        above = ("learning_rate", "clip_range", "value_clip_range", "max_grad_norm", "kl_target", "num_train_epochs")
        faults += [
            f"--{name} {getattr(self, name)}: must be above 0"
            for name in above
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        faults += [
            f"--{name} {getattr(self, name)}: must lie in [0, 1]"
            for name in ("gamma", "gae_lambda")
            if not 0 <= getattr(self, name) <= 1
        ]
        faults += [
            f"--{name} {getattr(self, name)}: must not be negative"
            for name in ("kl_beta", "value_coefficient", "warmup_steps", "weight_decay")
            if not getattr(self, name) >= 0
        ]
        if self.kl_target is not None and not self.kl_beta > 0:
            faults.append(f"--kl_target {self.kl_target} scales --kl_beta, which is {self.kl_beta}: give one above 0")
        if faults:
            raise UserError("\n".join(faults))

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps of a rollout of which no response is left out."""
        return self.ppo_epochs * -(-self.rollout_queries // self.per_device_train_batch_size)

    def rollouts(self, queries: int) -> int:
        """Rollouts in all, of so many queries."""
        if self.max_steps > 0:
            return -(-self.max_steps // self.steps_per_rollout)
        return max(1, round(self.num_train_epochs * queries / self.rollout_queries))


@dataclass(frozen=True)
class NLPOSettings:
    """The mask of NLPO; the defaults are those of RL4LMs for IMDB, of which neither is in the paper."""

    nlpo_top_p: float = field(
        default=0.9,
        metadata={"help": "only the likeliest tokens with this probability under a lagged policy are drawn"},
    )
    nlpo_refresh_steps: int = field(default=5, metadata={"help": "rollouts after which the lagged policy is renewed"})

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.nlpo_top_p <= 1:
            faults.append(f"--nlpo_top_p {self.nlpo_top_p}: must lie in (0, 1]")
        faults += too_small(self, nlpo_refresh_steps=1)
        if faults:
            raise UserError("\n".join(faults))
