"""One way from a model's name to what is loaded, whatever kind of name it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_folder, resolve_model
from rrhf.models.gguf import gguf_as_folder


@dataclass(frozen=True)
class Location:
    """What a model's name stands for.

    Args:
        base: the name of the whole model: the name itself, or the one that an adapter names as its base.
        source: what transformers loads that from: a hub id, or a folder (for a GGUF file the one it was converted to).
        adapter: the folder of the adapter that goes on top, where the name is an adapter's.
    """

    base: str
    source: str
    adapter: Path | None = None

    @property
    def tokenizer(self) -> str:
        """What transformers loads the tokenizer from: an adapter's folder may have one of its own."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return str(self.adapter)
        return self.source


def locate(name: str) -> Location:
    """Find a model by its name; no weights are read, but a GGUF file is converted the first time.

    Args:
        name: a hub id, a folder with weights or with an adapter alone, a GGUF file, or ``package:NAME/FILE``.

    Raises:
        UserError: no such folder, file or package, or something else than a model is there.
    """
    path = resolve_model(name)
    if not is_adapter(Path(path)):
        return Location(name, _whole_model(path))
    folder = Path(path)
    base = base_of_adapter(folder)
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UserError(f"--model {folder}: the adapter has no {ADAPTER_WEIGHTS}; pickled weights are not read")
    try:
        return Location(base, _whole_model(resolve_model(base)), folder)
    except UserError as error:
        raise UserError(f"the base model that {folder / ADAPTER_CONFIG} names: {error}") from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone; some trainers write the base model's config.json beside it."""
    whole = (folder / "config.json").exists() and any(f.name != ADAPTER_WEIGHTS for f in folder.glob("*.safetensors"))
    return (folder / ADAPTER_CONFIG).exists() and not whole


def base_of_adapter(folder: Path) -> str:
    """The name of the model that an adapter goes on top of.

    Raises:
        UserError: the adapter's configuration cannot be read, or names none.
    """
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--model {folder}: {ADAPTER_CONFIG} cannot be read: {error}") from error
    if not base:
        raise UserError(
            f"--model {folder}: {ADAPTER_CONFIG} names no base_model_name_or_path: write the base model's there"
        )
    return str(base)


def _whole_model(path: str) -> str:
    if path.endswith(".gguf"):
        path = str(gguf_as_folder(Path(path)))
    check_folder(path)
    return path
