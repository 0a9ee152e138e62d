"""Which device and which type of weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError

if TYPE_CHECKING:
    import torch


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
        if limited and not ("BF16" in limited or "AMX" in limited or limited in ("ALL", "DEFAULT")):
            return False
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device is unknown or not here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda, mps or auto") from error
    return device


def resolve_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """The type of the weights: see ``ModelSettings.dtype``.

    FSDP and DeepSpeed hold fp32 weights and cast them on their own, so training under them is ``auto`` in fp32.
    """
    import torch

    if name == "auto":
        apart = training and any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
        return torch.bfloat16 if native_bfloat16(device) and not apart else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
