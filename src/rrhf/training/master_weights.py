"""bfloat16 weights with fp32 master weights in the optimiser.

The model's forward and backward passes then move half the bytes and cast nothing; what is added up over steps is
fp32. A step of 2e-5 is below bfloat16's resolution, so without masters most updates would vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rrhf.common.errors import UserError
from rrhf.common.launch import asks_for_fsdp

BUCKET = 1 << 26  # numbers whose gradients are in fp32 at once: 256 MiB


class MasterWeights(torch.optim.Optimizer):
    """Run an optimiser on fp32 copies of low-precision parameters and copy the result back after each step.

    Parameters that are fp32 already are optimised in place. The state holds the masters, so a resumed run is the
    undisturbed one bit for bit.

    Args:
        groups: parameter groups of the model.
        optimiser: the class to run on the masters, such as ``torch.optim.AdamW``.
        options: its arguments.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], optimiser: type[torch.optim.Optimizer], **options: Any
    ) -> None:
        groups = [dict(group, params=list(group["params"])) for group in groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        masters = iter(self.masters)
        own = [dict(group, params=[next(masters) for _ in group["params"]]) for group in groups]
        self.inner = optimiser(own, **options)
        super().__init__(groups, self.inner.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the inner optimiser, with this one's learning rates."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        # A bucket at a time, so that few gradients are in fp32 at once. The inner optimiser passes over parameters
        # without a gradient and treats each by itself, so the result is that of one step.
        gradients = [parameter.grad for parameter in self.parameters]
        for master in self.masters:
            master.grad = None
        for bucket in self._buckets():
            for index in bucket:
                gradient = gradients[index]
                self.masters[index].grad = None if gradient is None else gradient.float()
            self.inner.step()
            for index in bucket:
                parameter, master = self.parameters[index], self.masters[index]
                master.grad = None
                if parameter is not master:
                    parameter.copy_(master)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _buckets(self) -> Iterator[list[int]]:
        """Indices of parameters in order, together at most ``BUCKET`` numbers, or one parameter that is larger."""
        bucket: list[int] = []
        size = 0
        for index, parameter in enumerate(self.parameters):
            if bucket and size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(index)
            size += parameter.numel()
        if bucket:
            yield bucket

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state, and the masters."""
        masters: list[Tensor | None] = [
            None if p is m else m.detach() for p, m in zip(self.parameters, self.masters, strict=True)
        ]
        return {"inner": self.inner.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({name: value for name, value in inner.items() if name != "params"})
        for master, kept in zip(self.masters, state_dict["masters"], strict=True):
            if kept is not None:
                master.copy_(kept)


def has_low_precision(model: nn.Module) -> bool:
    """Whether any trained parameter is bfloat16 or float16."""
    return any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def refuse_float16(model: nn.Module) -> None:
    """Refuse to train float16 weights.

    Raises:
        UserError: the model has such.
    """
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        raise UserError(
            "the model's weights are float16, in which small gradients are 0: load it with dtype=torch.float32 or "
            "torch.bfloat16 (from_pretrained takes the type of the files where none is named); fp16=True then computes "
            "in float16 over float32 weights, with the loss scaled"
        )


def settle_precision(args: Any, model: nn.Module) -> None:
    """Before a ``transformers.Trainer`` is made: nothing is left to cast where weights are bfloat16 already.

    Under FSDP autocast stays as it is: where it is on, accelerate makes the weights fp32. float16, where it was asked
    for, stays too.

    Raises:
        UserError: weights that are trained are float16.
    """
    refuse_float16(model)
    keeps = args.fp16 or args.fsdp or asks_for_fsdp()
    if args.bf16_by_default and has_low_precision(model) and not keeps:
        args.bf16, args.mixed_precision = False, "no"


def refuse_no_masters(trainer: Any) -> None:
    """Refuse low-precision weights that nothing would keep in fp32, once the ``transformers.Trainer`` is made.

    Raises:
        UserError: FSDP shards them, and without mixed precision accelerate leaves them as they are.
    """
    if trainer.is_fsdp_enabled and has_low_precision(trainer.model) and trainer.accelerator.mixed_precision == "no":
        raise UserError(
            "FSDP would train bfloat16 weights without fp32 masters, and most updates would vanish: give "
            "--dtype float32 (in Python: load the model with dtype=torch.float32), or --bf16 true"
        )


def takes_masters(trainer: Any) -> bool:
    """Whether a ``transformers.Trainer`` gets fp32 masters. FSDP exchanges the parameters later, for fp32 ones."""
    return not trainer.is_fsdp_enabled and has_low_precision(trainer.model)


def use_masters(trainer: Any) -> None:
    """Let a ``transformers.Trainer`` make its optimiser of fp32 masters where its model's weights are bfloat16.

    For its ``create_optimizer``, before transformers' own.
    """
    if trainer.optimizer is None and takes_masters(trainer):
        asked: Any = trainer.__dict__.get("optimizer_cls_and_kwargs")
        kind, options = asked or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        trainer.optimizer_cls_and_kwargs = (MasterWeights, {"optimiser": kind, **options})
