"""Giving a result away: a model card, the Hugging Face hub, GGUF for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rrhf.errors import UserError


def model_folder(path: str | Path) -> Path:
    """The folder of weights at ``path``: itself, or ``model/`` inside a run folder.

    Raises:
        UserError: there is no model; the message says what a model folder holds.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        weights = next(folder.glob("*.safetensors"), None) if folder.is_dir() else None
        if weights is not None and any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            return folder
    raise UserError(
        f"{path}: no model here: give a run folder, or a folder with config.json (or adapter_config.json) and weights "
        "(*.safetensors), as `rrhf train` writes it"
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file.

    Raises:
        UserError: the file is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): write or fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return found
