"""What all trainings share of ``TrainingArguments``: where they compute, in which precision, what stays of records."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from rrhf.common.errors import UserError, too_small
from rrhf.common.launch import check_connected, launched_processes
from rrhf.models.devices import native_bfloat16, resolve_device


@dataclass
class PlacedArguments(TrainingArguments):
    """``TrainingArguments`` that can be put on a device; whoever inherits calls ``settle_device`` when checked.

    ``bf16`` may be None: autocast where the hardware has bfloat16. ``bf16_by_default`` remembers that.
    """

    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of metrics"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a non-finite loss stops the run instead"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "records keep their columns"})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast over fp32 weights; default: for fp32 weights, where the hardware has it"},
    )
    hub_token: str | None = field(
        default=None,
        metadata={"help": "refused, since settings are written into files: set HF_TOKEN, or run `hf auth login`"},
    )

    def number_faults(self) -> list[str]:
        """What transformers and torch would refuse once the model is loaded, or take for something else."""
        faults = too_small(
            self, max_length=2, max_tokens_per_forward=1, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            learning_rate=0, num_train_epochs=0, warmup_steps=0, weight_decay=0, logging_steps=0, save_steps=0,
            eval_steps=0, dataloader_num_workers=0,
        )  # fmt: skip
        for name in ("max_steps", "num_train_epochs"):
            if getattr(self, name) == 0:
                faults.append(f"--{name} 0: nothing would be trained: leave it out, or give a number above 0")
        strategy = str(getattr(self.hub_strategy, "value", self.hub_strategy))
        if self.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
            faults.append(f"--hub_strategy {strategy}: checkpoints are not uploaded: leave it out")
        if self.save_only_model:
            faults.append(
                "--save_only_model true: checkpoints would lack the optimiser's state, and a training that goes on "
                "from one would begin it, and the schedule, anew: leave it out (--save_total_limit keeps few of them)"
            )
        if self.hub_token:
            faults.append(
                "--hub_token: settings are written into files, and a key stands in none: leave it out, and set "
                "HF_TOKEN in the environment, or run `hf auth login`"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"--{name} {getattr(self, name)}: must lie in [0, 1)")
        return faults

    def settle_device(self) -> None:
        """Settle device and precision, and check that the processes of a launch are connected.

        Raises:
            UserError: transformers refuses an argument, or the processes are not connected.
        """
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        if not accelerated:
            self.use_cpu = True  # else processes started together on a CPU do not find each other
        self.bf16_by_default = self.bf16 is None
        if self.bf16 is None:
            self.bf16 = not self.fp16 and native_bfloat16(resolve_device("cpu" if self.use_cpu else "auto"))
        processes = launched_processes()
        try:
            TrainingArguments.__post_init__(self)
        except ValueError as error:
            raise UserError(str(error)) from error
        check_connected(processes, self.world_size)

    def place(self, flag: str) -> torch.device:
        """Put the training where ``--device`` says, and return that device.

        transformers parses its arguments without this flag, and has taken the first GPU, or each process its own.

        Raises:
            UserError: the device is not here, or the training cannot be moved to it.
        """
        if flag == "auto":
            return self.device
        wanted = resolve_device(flag)
        distributed = self.parallel_mode == ParallelMode.DISTRIBUTED
        if wanted.type == self.device.type and (distributed or wanted == self.device):
            return self.device
        if distributed:
            cure = "give --use_cpu true as well" if wanted.type == "cpu" else "leave --device out"
            raise UserError(f"--device {flag}: the processes are connected for {self.device.type} already: {cure}")
        if wanted.type == "cpu":
            self._move_to_cpu()
        elif wanted.type == "cuda" and not self.use_cpu:
            self.__dict__["_setup_devices"], self._n_gpu = wanted, 1  # what transformers keeps its choice in
        else:
            raise UserError(f"--device {flag}: the training is set up on {self.device} (--use_cpu): name one device")
        return self.device

    def _move_to_cpu(self) -> None:
        self.use_cpu, self.dataloader_pin_memory = True, False
        if self.bf16_by_default:
            self.bf16 = not self.fp16 and native_bfloat16(torch.device("cpu"))
            if not self.fp16:
                self.mixed_precision = "bf16" if self.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        del self.__dict__["_setup_devices"]  # made anew when next asked for
