"""``RRHFConfig``: every setting of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

from rrhf.common.errors import UserError, too_small
from rrhf.losses import LossSettings
from rrhf.models.tokenization import TextSettings
from rrhf.training.placement import PlacedArguments
from rrhf.training.selection import SelectionSettings

LEARNING_RATE = 2e-5  # the paper's


ADAPTER_LEARNING_RATE = 2e-4  # ten times as much: docs/adapters.md


@dataclass
class RRHFConfig(PlacedArguments, LossSettings, SelectionSettings):
    """Every argument of ``transformers.TrainingArguments``, with the paper's values as defaults, and those of RRHF.

    ``per_device_train_batch_size`` counts queries, each with all its responses.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate; default: 2e-5, and 2e-4 where --peft trains an adapter"}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "steps of warm-up, or below 1 their share of all steps"}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "passes over the records"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "queries a device and micro-batch"})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "micro-batches an optimiser step"})
    max_length: int = field(
        default=192, metadata={"help": "most tokens of query and response together; the response is cut from the right"}
    )
    max_query_length: int | None = field(
        default=None, metadata={"help": "most tokens of a query; longer ones are cut from the left and counted"}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "put before queries that are messages"})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "arguments of the chat template, as JSON"})
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "the reference of dpo, ipo, kto, dpo-listmle, lambda and swepo, with the same tokenizer; it is in "
            "memory before training only; default: the model that training starts from"
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "rows of one forward pass; a record with more is computed in two passes, slice by slice; default: "
            "2048 on a CPU, up to 16384 on a GPU, as many as its free memory takes"
        },
    )
    resample_steps: int = field(
        default=0,
        metadata={
            "help": "OP-k: every so many optimiser steps, responses to the queries of the next so many are sampled "
            "from the policy as it is, and scored; 0: never, the data's responses are trained on"
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "with --resample_steps and --kl_beta: β is adapted, an update an optimiser step, so that the KL of "
            "sampled responses stays near so many nats each (arXiv 1909.08593); default: β is fixed"
        },
    )
    interpolation: float = field(
        default=1.0,
        metadata={
            "help": "what is saved at the end lies at this share of the straight line from the weights that training "
            "began with to those it came to: below 1 nearer to the start, with less of the reward (arXiv 2406.16768; "
            "docs/relative.md); 1: the trained ones"
        },
    )
    keep_logits: bool = field(
        default=True,
        metadata={
            "help": "keep a forward's logits for its backward pass: faster, for memory of (response tokens) x "
            "(vocabulary) numbers; false: compute them twice, as is done anyway where they are very large"
        },
    )

    def __post_init__(self) -> None:
        given = self._values()
        self.settle()
        faults = self.number_faults() + too_small(self, resample_steps=0)
        if self.kl_target is not None and not (self.kl_target > 0 and self.resample_steps):
            faults.append(f"--kl_target {self.kl_target}: must be above 0, and needs --resample_steps")
        if not 0 < self.interpolation <= 1:
            faults.append(f"--interpolation {self.interpolation}: must be above 0 and at most 1")
        faults += self.faults() + self.selection_faults()
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            faults.append(
                "DeepSpeed (--deepspeed, or accelerate's configuration): it would make an optimiser step of every "
                "forward pass. For sharded weights use FSDP2: accelerate launch --config_file fsdp2.yaml "
                "(docs/distributed.md)"
            )
        try:
            _ = self.text
        except UserError as error:
            faults.append(str(error))
        if faults:
            raise UserError("\n".join(faults))
        self.learning_rate_by_default = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE
        self.output_dir: str | None = self.output_dir or "rrhf-model"
        self.settle_device()
        self._given, self._settled = given, self._values()

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def as_given(self) -> dict[str, Any]:
        """The arguments that make these settings anew: another machine may settle device and precision otherwise."""
        now = self._values()
        return {name: now[name] if now[name] != self._settled[name] else given for name, given in self._given.items()}

    @property
    def text(self) -> TextSettings:
        return TextSettings(self.system_prompt, self.chat_template_kwargs, self.max_query_length)

    @property
    def loss(self) -> LossSettings:
        return LossSettings(**{f.name: getattr(self, f.name) for f in fields(LossSettings)})
