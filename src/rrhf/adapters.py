"""Train a low-rank adapter instead of all weights (PEFT)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rrhf.errors import UserError, nearest

KINDS = ("lora", "qlora")


@dataclass(frozen=True)
class AdapterSettings:
    """``--peft`` and its sizes."""

    peft: str | None = field(
        default=None, metadata={"help": "lora, or qlora (4-bit base weights; needs bitsandbytes and a GPU)"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: float = field(default=32.0, metadata={"help": "the adapter is scaled by this over its rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "layers that get one", "nargs": "+"}
    )
    merge_adapter: bool = field(
        default=True, metadata={"help": "save merged weights; --merge_adapter false saves the adapter alone"}
    )

    def __post_init__(self) -> None:
        if self.peft is not None and self.peft not in KINDS:
            raise UserError(f"--peft {self.peft}: {nearest(self.peft, KINDS)}")
        if self.lora_r < 1:
            raise UserError(f"--lora_r {self.lora_r}: must be at least 1")


def peft_config(settings: AdapterSettings) -> Any:
    """The PEFT configuration of ``settings``, or ``None``."""
    if settings.peft is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("--peft needs the package peft: pip install 'rrhf[peft]'") from error
    targets: Any = settings.lora_target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
