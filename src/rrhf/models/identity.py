"""What tells one model from another under the same name: a digest of all that its answers depend on."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError
from rrhf.models.folders import resolve_model
from rrhf.models.locate import ADAPTER_CONFIG, is_adapter
from rrhf.records.checksums import checksum_of_file

if TYPE_CHECKING:
    from torch import nn

# Of a model folder: weights, configurations and tokenizer. A card or a trainer's state changes no answer.
PARTS = (
    "*.safetensors", "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "chat_template*", "openvino_*",
)  # fmt: skip


def model_digest(name: str) -> str:
    """32 hexadecimal digits of SHA-256 over a model's weights, configuration and tokenizer.

    It takes about a second for each GB. The files' contents count, not their times or places: a copied model is the
    same model, and one that was trained anew under its old name is another. An adapter's digest includes its base
    model's. A hub id stands for the commit that is loaded.

    Returns:
        The digest; ``""`` where there is no such model, which its loading reports.
    """
    try:
        path = Path(resolve_model(name))
    except UserError:  # no such package: reported where the model is loaded
        return ""
    if path.is_file():
        return _digest([path])
    if not path.is_dir():
        return _hub_digest(name)
    files = sorted({file for pattern in PARTS for file in path.glob(pattern) if file.is_file()})
    return _digest(files, _base_digest(path) if is_adapter(path) else "") if files else ""


def _base_digest(adapter: Path) -> str:
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return model_digest(base) if base else ""


def _hub_digest(name: str) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        commit = extract_commit_hash(cached_file(name, "config.json"), None)
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()[:32] if commit else ""


def _digest(files: list[Path], base: str = "") -> str:
    digest = hashlib.sha256(base.encode())
    for file in files:
        state = file.stat()
        digest.update(f"{file.name}\0{_checksum(file.resolve(), state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=256)
def _checksum(file: Path, size: int, time: int) -> str:
    """SHA-256 of a file's content, computed once a process as long as its ``size`` and ``time`` stay."""
    return checksum_of_file(file)


def weights_digest(model: nn.Module) -> str:
    """32 hexadecimal digits of SHA-256 over the weights that a model has now, by name. About a second for each GB."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name}\0{weight.dtype}\0{tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
