"""Train a low-rank adapter instead of all weights (PEFT), and load the folder of one as an ordinary policy."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError, nearest, too_small
from rrhf.common.files import read_object, write_text
from rrhf.common.imports import of_extra
from rrhf.models.devices import resolve_device
from rrhf.models.folders import ADAPTER_CONFIG, no_folder, refuse_missing_weights
from rrhf.models.load import FLEX, ModelSettings, attention_options, load_policy
from rrhf.models.locate import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("lora", "qlora")


@dataclass(frozen=True)
class AdapterSettings:
    """``--peft`` and its sizes."""

    peft: str | None = field(
        default=None,
        metadata={"help": "lora, or qlora (4-bit base weights; needs bitsandbytes and a CUDA GPU; untested)"},
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
        faults = too_small(self, lora_r=1)
        if self.peft is not None and self.peft not in KINDS:
            faults.append(f"--peft {self.peft}: {nearest(self.peft, KINDS)}")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            faults.append(f"--lora_alpha {self.lora_alpha}: must be a number above 0; with 0 nothing would be trained")
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")
        if faults:
            raise UserError("\n".join(faults))


def peft_config(settings: AdapterSettings) -> Any:
    """The PEFT configuration of ``settings``, or ``None``."""
    if settings.peft is None:
        return None
    targets: Any = settings.lora_target_modules
    return _peft("--peft").LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def refuse_lost_base(settings: AdapterSettings, model: str) -> None:
    """Refuse to save an adapter alone where ``model``, on which it is trained, is an adapter too.

    Raises:
        UserError: nothing would hold what the new one stands on.
    """
    if settings.peft is not None and not settings.merge_adapter and locate(model).adapter is not None:
        raise UserError(
            f"--merge_adapter false: {model} is an adapter itself, and its sum with its base, on which the new one "
            "would stand, is saved nowhere: leave --merge_adapter true"
        )


def with_adapter(model: PreTrainedModel, config: Any) -> Any:
    """``model`` with a new adapter in its layers, which alone is trained.

    Raises:
        UserError: the model has no layers of the names that ``config`` gives; these are its embeddings, and shared; or
            ``config`` is of virtual tokens.
    """
    peft = _peft("peft_config")
    _refuse_virtual_tokens(config, "peft_config")
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:  # the layers' names are what can be wrong here
        names = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if hasattr(layer, "weight")})
        raise UserError(
            f"the adapter does not fit the model: {error}. Layers with weights here (--lora_target_modules): "
            f"{', '.join(names)}"
        ) from error
    _refuse_shared(adapted, "--lora_target_modules")
    return adapted


def _refuse_virtual_tokens(config: Any, what: str) -> None:
    """Prompt and prefix tuning change no layer: they put vectors of their own in front of a row, or of its keys."""
    if getattr(config, "is_prompt_learning", False):
        raise UserError(
            f"{what}: {type(config).__name__} puts virtual tokens in front of a text, which the passes over records do "
            "not read: take an adapter of layers, as LoRA"
        )


def _refuse_shared(adapted: Any, what: str) -> None:
    """An adapter on one of two embeddings that share a weight cannot be merged: the other would change with it."""
    model = adapted.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or len({id(getattr(end, "base_layer", end).weight) for end in ends}) == 2:
        return
    names = sorted(name for name, layer in model.named_modules() if layer in ends and hasattr(layer, "base_layer"))
    if names:
        raise UserError(
            f"{what}: an adapter on {', '.join(names)}, but the model's input and output embeddings share a weight, so "
            "that merging it would change both: leave them out of the layers that get one"
        )


def load_policy_or_adapter(
    settings: ModelSettings, training: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``load_policy``, also of a folder that holds an adapter alone: its base model, with the adapter merged into it.

    Raises:
        UserError: nothing loadable is there, or the adapter does not fit its base model.
    """
    location = locate(settings.model)
    if location.adapter is None:
        return load_policy(settings, training)
    folder = location.adapter
    peft = _peft(f"--model {folder}, an adapter,")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {folder}: {ADAPTER_CONFIG} cannot be read: {error}") from error
    _refuse_virtual_tokens(config, f"--model {folder}")
    try:
        model, tokenizer = load_policy(replace(settings, model=location.base), training, location.tokenizer)
    except UserError as error:
        raise UserError(f"the base model that {folder / ADAPTER_CONFIG} names: {error}") from error
    misfit = f"--model {folder}: the adapter does not fit its base model {location.base}"
    try:
        config.inference_mode, config.base_model_name_or_path = True, None  # PEFT would warn of another name
        adapted = peft.get_peft_model(model, config)
        result = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(str(folder), device="cpu"))
    except (ValueError, RuntimeError, KeyError) as error:  # other layers, other sizes
        raise UserError(f"{misfit}: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in result.missing_keys if f".{adapted.active_adapter}." in name]
    if missing or result.unexpected_keys:
        wrong = f"no weights for {missing[0]}" if missing else f"the model has no {result.unexpected_keys[0]}"
        raise UserError(f"{misfit}: {wrong}")
    _refuse_shared(adapted, f"--model {folder}")
    # An adapter freezes its base, also once it is merged: what is loaded here trains as any policy does.
    return adapted.merge_and_unload().requires_grad_(True).eval(), tokenizer


def merged(model: Any, settings: ModelSettings, quantised: bool = False) -> PreTrainedModel:
    """The base model with the adapter of ``model`` added to its weights.

    Where the base is ``quantised``, its whole weights are loaded again, as ``settings`` say: sums with 4-bit weights
    would be rounded to 4 bits.
    """
    if not quantised:
        return model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        name_base(Path(folder), settings.model)
        return load_policy_or_adapter(replace(settings, model=folder), training=True)[0]


def name_base(folder: Path, name: str) -> None:
    """Let the adapter in ``folder`` name its base as the user does: PEFT names what transformers loaded it from.

    For a GGUF file, and for one that a package carries, that is a folder in this machine's cache.
    """
    place = folder / ADAPTER_CONFIG
    write_text(place, json.dumps({**read_object(place), "base_model_name_or_path": name}, indent=2) + "\n")


def load_quantised(settings: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy with 4-bit (NF4) weights, for ``--peft qlora``. Untested: it needs a GPU with bitsandbytes.

    Raises:
        UserError: there is no CUDA device, or bitsandbytes is missing.
    """
    import torch

    device = resolve_device(settings.device)
    if device.type != "cuda":
        raise UserError("--peft qlora needs a CUDA GPU: use --peft lora, which trains the same adapter without one")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--peft qlora needs the package bitsandbytes: pip install bitsandbytes, or use --peft lora")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from rrhf.models.kernels.choice import ask_for_flex

    location = locate(settings.model)
    if location.adapter is not None:
        raise UserError(f"--model {settings.model}: --peft qlora trains on a whole model, and this is an adapter alone")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = attention_options(settings, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.source)
        model, found = AutoModelForCausalLM.from_pretrained(
            location.source,
            quantization_config=quantisation,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        refuse_missing_weights(found, settings.model)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        hint = no_folder(settings.model)
        raise UserError(f"--model {settings.model}: cannot be loaded in 4 bits: {error}{hint}") from error
    if settings.attn_implementation == FLEX:
        ask_for_flex(model)
    return _peft("--peft").prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), tokenizer


def _peft(what: str) -> Any:
    return of_extra("peft", f"{what} needs the package peft: pip install 'rrhf[peft]'")
