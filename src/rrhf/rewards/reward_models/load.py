"""Load a reward model: what its name stands for, found without reading weights, and then the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.models.devices import resolve_device, resolve_dtype
from rrhf.models.folders import no_folder
from rrhf.models.load import context_length
from rrhf.models.locate import locate
from rrhf.rewards.reward_models.heads import (
    find_head,
    raw_checkpoint,
    read_raw,
    stored_names,
    stored_rows,
    stored_tensors,
)
from rrhf.rewards.reward_models.passes import CausalReward, EncoderReward, Fp32Linear, Head, RewardModel
from rrhf.rewards.reward_models.reading import CausalReader, PairReader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASSIFIER = "ForSequenceClassification"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
FAILURES = (OSError, ValueError, ImportError, KeyError, RuntimeError)


@dataclass(frozen=True)
class Place:
    """Where a reward model lies, and what is known of it without its weights.

    Attributes:
        name: as it was given.
        folder: where configuration and tokenizer are, or the hub id.
        config: the configuration.
        raw: the raw checkpoint, if it is one.
        head: the head's name among its tensors and how many numbers it gives, where a causal model's lies in a folder.
    """

    name: str
    folder: str
    config: Any
    raw: Path | None = None
    head: tuple[str, int] | None = None

    @property
    def classifies(self) -> bool:
        """Whether it was saved as a sequence classification model of transformers."""
        return any(name.endswith(CLASSIFIER) for name in getattr(self.config, "architectures", None) or [])

    @property
    def outputs(self) -> int:
        """How many numbers a row gets: one a label of a classification model; else 1."""
        if self.head is not None:
            return self.head[1]
        return int(self.config.num_labels) if self.classifies else 1

    @property
    def context(self) -> int | None:
        """The most tokens of a row."""
        return context_length(self.config)


def find_reward_model(name: str) -> Place:
    """Find a reward model by its name: a hub id, a folder, a raw checkpoint, or ``package:NAME/FILE``.

    Its configuration and the names of its weights are read, no weights.

    Raises:
        UserError: nothing is there, or something else than a reward model.
    """
    from transformers import AutoConfig

    raw = raw_checkpoint(name)
    folder = str(raw.parent) if raw is not None else _located(name)
    if raw is not None and not (raw.parent / "config.json").exists():
        raise UserError(
            f"reward model {name}: beside {raw.name} there is no config.json: put the configuration and the tokenizer "
            "of the model there that it was trained from (EleutherAI/gpt-j-6B for Dahoas/gptj-rm-static)"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except FAILURES as error:
        raise UserError(f"reward model {name}: its configuration cannot be read: {error}{no_folder(name)}") from error
    place = Place(name, folder, config, raw)
    return _with_known_head(place, Path(folder)) if raw is None and Path(folder).is_dir() else place


def _with_known_head(place: Place, folder: Path) -> Place:
    """The place with the causal head that lies in the folder, if one does.

    Raises:
        UserError: there is none, nor a classification model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    head = find_head(stored_names(folder), place.config)
    if head is not None and type(place.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return replace(place, head=(head, stored_rows(folder, f"{head}.weight")))
    if place.classifies:
        return place
    raise UserError(
        f"reward model {place.name}: has neither a classification head nor a scalar one that is known (score, v_head, "
        f"value_head). To score by a policy's likelihood give --reward logprob:{place.name}"
    )


def _located(name: str) -> str:
    try:
        location = locate(name)
    except UserError as error:
        raise UserError(f"reward model {name}: {str(error).removeprefix(f'--model {name}: ')}") from error
    if location.adapter is not None:
        raise UserError(f"reward model {name}: is an adapter alone: merge it into its base model {location.base} first")
    return location.source


def load_reward_model(place: Place, device: str = "auto", dtype: str = "auto") -> RewardModel:
    """Load a reward model in evaluation mode on the device asked for.

    Raises:
        UserError: it cannot be loaded, has no head that is known, or lacks weights: nothing is made up.
    """
    from transformers import AutoTokenizer

    here = resolve_device(device)
    weights_dtype = resolve_dtype(dtype, here)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.folder)
        if place.raw is not None:
            return _raw(place, tokenizer, here, weights_dtype)
        folder = _downloaded(place)
        place = _with_known_head(place, folder)
        load = _classifier if place.head is None else _causal
        return load(place, folder, tokenizer, here, weights_dtype)
    except FAILURES as error:
        raise UserError(f"reward model {place.name}: cannot be loaded: {error}{no_folder(place.folder)}") from error


def _downloaded(place: Place) -> Path:
    """The folder of a model on the hub, without what would have to be unpickled."""
    if Path(place.folder).is_dir():
        return Path(place.folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(place.folder, allow_patterns=HUB_FILES))


def _classifier(
    place: Place, folder: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
) -> EncoderReward:
    from transformers import AutoModelForSequenceClassification

    with quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    _refuse_missing(place, info)
    limit = getattr(tokenizer, "model_max_length", None) or 0
    limits = [n for n in (limit, context_length(model)) if n and n < 10**9]  # "no limit" is a huge number
    reader = PairReader(tokenizer, min(limits, default=None), joined=place.outputs > 1)
    _head_in_fp32(model, folder)
    return EncoderReward(model.to(device).eval(), reader)


def _head_in_fp32(model: PreTrainedModel, folder: Path) -> None:
    """Let the last layer of a classifier in half precision multiply in fp32, with its weights as they are stored."""
    import torch
    from torch import nn

    body = f"{model.base_model_prefix}."
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith(body)}
    heads = [name for name, layer in layers.items() if layer.out_features == model.config.num_labels]
    if not heads or layers[heads[-1]].weight.dtype not in (torch.bfloat16, torch.float16):
        return
    name = heads[-1]
    rounded = layers[name]
    stored = stored_tensors(folder, [f"{name}.{kind}" for kind in rounded.state_dict()])
    head = Fp32Linear(rounded.in_features, rounded.out_features, bias=rounded.bias is not None)
    head.load_state_dict({kind: stored.get(f"{name}.{kind}", value) for kind, value in rounded.state_dict().items()})
    model.set_submodule(name, head)


def _causal(
    place: Place, folder: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
) -> CausalReward:
    from transformers import AutoModel

    assert place.head is not None
    name = place.head[0]
    with quiet():
        backbone, info = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _refuse_missing(place, info)
    tensors = stored_tensors(folder, [f"{name}.weight", f"{name}.bias"])
    return _with_head(place, backbone, tensors, name, tokenizer, device)


def _raw(place: Place, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype) -> CausalReward:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    assert place.raw is not None
    tensors = read_raw(place.raw)
    name = find_head(set(tensors), place.config)
    if name is None:
        raise UserError(
            f"reward model {place.name}: {place.raw.name} has no scalar head that is known (v_head, score, value_head)"
        )
    kind = MODEL_MAPPING[type(place.config)]
    head = {key: tensors.pop(key) for key in (f"{name}.weight", f"{name}.bias") if key in tensors}
    prefix = f"{kind.base_model_prefix}."
    body = {key.removeprefix(prefix): value for key, value in tensors.items()}
    with quiet():
        backbone, info = kind.from_pretrained(
            None, config=place.config, state_dict=body, dtype=dtype, output_loading_info=True
        )
    _refuse_missing(place, info)
    if info["unexpected_keys"]:
        raise UserError(
            f"reward model {place.name}: {place.raw.name} has weights that a {place.config.model_type} model lacks "
            f"({', '.join(sorted(info['unexpected_keys'])[:3])} …): is config.json that of another model?"
        )
    return _with_head(place, backbone, head, name, tokenizer, device)


def _with_head(
    place: Place, backbone: Any, tensors: dict[str, Any], name: str, tokenizer: Any, device: torch.device
) -> CausalReward:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if place.raw is not None and len(weight) != 1:
        raise UserError(f"reward model {place.name}: its head {name} gives {len(weight)} numbers, not one score")
    shift = (0.0, 1.0)
    if getattr(place.config, "normalize_reward", False):  # OpenRLHF's
        shift = (float(place.config.mean), float(place.config.std))
    head = Head(weight.float().to(device), None if bias is None else bias.float().to(device), *shift)
    unread = place.config.get_text_config().pad_token_id if place.classifies else None
    reader = CausalReader(tokenizer, place.context, always_end=not place.classifies, unread=unread)
    return CausalReward(backbone.to(device).eval(), head, reader, place.context or 0)


def _refuse_missing(place: Place, info: dict[str, Any]) -> None:
    if info["missing_keys"] or info.get("mismatched_keys"):
        lacks = ", ".join(sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])]))[:3])
        raise UserError(
            f"reward model {place.name}: weights are missing or of another shape ({lacks} …): a head that was never "
            "trained says nothing; train one with `rrhf reward-model`"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While it lasts transformers does not say which weights it leaves out: what matters is checked here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
