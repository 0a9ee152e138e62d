"""``RewardModelConfig``: every setting of the training of a reward model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rrhf.common.errors import UserError
from rrhf.losses import tie_rule
from rrhf.training.placement import PlacedArguments


@dataclass
class RewardModelConfig(PlacedArguments):
    """Every argument of ``transformers.TrainingArguments``, and those of ranking by scores.

    ``per_device_train_batch_size`` counts queries, each with all its scored responses.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "steps of warm-up, or below 1 their share of all steps"}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the records"})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "queries a device and micro-batch"})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "micro-batches an optimiser step"})
    max_length: int = field(
        default=512,
        metadata={
            "help": "most tokens of query and response together; longer rows are cut from the left, a causal model's "
            "together with the other rows of their query"
        },
    )
    max_tokens_per_forward: int = field(
        default=2048, metadata={"help": "rows of similar length are computed together up to so many tokens"}
    )
    ties: str = field(
        default="none",
        metadata={"help": "what equal scores do, as in `rrhf train`: none (no pair), half (a pair won by halves), "
                  "margin:E (scores nearer than E are equal)"},
    )  # fmt: skip
    center_rewards: float = field(
        default=0.0,
        metadata={"help": "weight of (r_i + r_j)^2 of each pair, which holds rewards near 0; TRL advises 0.01"},
    )

    def __post_init__(self) -> None:
        faults = self.number_faults()
        try:
            tie_rule(self.ties)
        except UserError as error:
            faults.append(f"--ties {self.ties}: {error}")
        if not (math.isfinite(self.center_rewards) and self.center_rewards >= 0):
            faults.append(f"--center_rewards {self.center_rewards}: must be a number from 0")
        if self.deepspeed:
            faults.append("--deepspeed: is not supported here")
        if self.resume_from_checkpoint:
            faults.append("--resume_from_checkpoint: leave it out: the same command goes on from the last checkpoint")
        if faults:
            raise UserError("\n".join(faults))
        self.output_dir: str | None = self.output_dir or "reward-model"
        self.settle_device()
