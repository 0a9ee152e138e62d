"""Causal models with a scalar head: which tensor of a checkpoint is the head, and old checkpoints of raw tensors.

Layouts that are known, by the names of their tensors:

- transformers' ``…ForSequenceClassification``, and TRL's reward trainer, which writes those: ``score``;
- OpenRLHF: ``score`` or ``value_head``, or what its configuration calls ``value_head_prefix``;
- TRL's ``AutoModelForCausalLMWithValueHead``: ``v_head.summary``;
- ``Dahoas/gptj-rm-static`` (trlx): ``v_head`` without a bias, in ``hf_ckpt.pt`` beside a GPT-J's configuration and
  tokenizer, ``transformer.`` in front of the decoder's names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.common.remote import fetched_model, is_url

if TYPE_CHECKING:
    from torch import Tensor

HEADS = ("score", "v_head.summary", "v_head", "value_head")
RAW = (".pt", ".bin", ".pth")  # read only where the user names the file, or it has the one known name
KNOWN_RAW = "hf_ckpt.pt"
WRAPPERS = ("module.", "pretrained_model.")  # what trainers put in front of every name
# Buffers that are made anew.
WITHOUT_WEIGHTS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", ".position_ids")
OUTPUT_LAYERS = ("lm_head.",)  # of the language model, which a score does not need


def find_head(names: set[str], config: Any) -> str | None:
    """The name of the head among a checkpoint's tensors, without ``.weight``; None where it has none that is known."""
    own = getattr(config, "value_head_prefix", None)
    return next((head for head in ([own] if own else []) + list(HEADS) if f"{head}.weight" in names), None)


def stored_names(folder: Path) -> set[str]:
    """The names of the tensors in a folder's safetensors files; no weights are read."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def stored_rows(folder: Path, name: str) -> int:
    """How many rows a matrix in a folder's safetensors files has; no weights are read."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                return int(tensors.get_slice(name).get_shape()[0])
    raise UserError(f"{folder}: the file that should hold {name} is missing: fetch the model again")


def stored_tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Some tensors of a folder's safetensors files by their names; those that are not there are left out."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            inside = set(tensors.keys())
            found.update({name: tensors.get_tensor(name) for name in names if name in inside})
    return found


def raw_checkpoint(name: str) -> Path | None:
    """The raw checkpoint that a name stands for: the file itself, or a folder's ``hf_ckpt.pt`` without safetensors."""
    place = fetched_model(name) if is_url(name) else Path(name)
    if place.is_file() and place.suffix in RAW:
        return place
    if place.is_dir() and not list(place.glob("*.safetensors")) and (place / KNOWN_RAW).exists():
        return place / KNOWN_RAW
    return None


def read_raw(file: Path) -> dict[str, Tensor]:
    """The tensors of a raw checkpoint by their names, without wrappers' prefixes and what is made anew.

    Weights only: whatever else is pickled there is not run.

    Raises:
        UserError: the file is no checkpoint of tensors alone.
    """
    import pickle  # nosec B403 # for the name of an error
    import zipfile

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{file}: is no checkpoint of weights alone ({str(error).splitlines()[0]}): nothing else is unpickled"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: holds no dictionary of tensors")
    for prefix in WRAPPERS:
        if all(name.startswith((prefix, *HEADS)) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {
        name: value
        for name, value in state.items()
        if not name.endswith(WITHOUT_WEIGHTS) and not name.startswith(OUTPUT_LAYERS)
    }
