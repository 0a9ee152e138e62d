"""Load policies: a hub id, a local folder, a GGUF file, or a file that an installed package carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.models.devices import resolve_device, resolve_dtype
from rrhf.models.folders import no_folder, refuse_missing_weights
from rrhf.models.locate import Location, locate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16")
FLEX = "flex"  # of ``attn_implementation``: trees by FlexAttention


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
        default=None,
        metadata={"help": "attention where the model runs on its own: sdpa, eager, flash_attention_2, …; or flex: the "
                  "model's default there, and FlexAttention for the shared-prefix trees of training on a CUDA GPU, "
                  "compiled for each new length (experimental: not yet run on a GPU)"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: known: {', '.join(DTYPES)}")


def load_policy(
    settings: ModelSettings, training: bool = False, tokenizer_at: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode, on the device asked for.

    ``tokenizer_at``: where the tokenizer is, if not with the model.

    Raises:
        UserError: nothing loadable is there; the message says what is missing. Or the name is an adapter's, which
            ``adapters.load_policy_or_adapter`` loads.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from rrhf.models.kernels.choice import ask_for_flex

    location = locate(settings.model)
    if location.adapter is not None:
        raise UserError(f"--model {settings.model}: is an adapter alone; name its base model {location.base}")
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device, training)
    options = attention_options(settings, device)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_at or location.source)
        # Only safetensors: nothing is unpickled.
        model, found = AutoModelForCausalLM.from_pretrained(
            location.source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        refuse_missing_weights(found, settings.model)
        model = model.to(device).eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {settings.model}: cannot be loaded: {error}{no_folder(settings.model)}") from error
    if settings.attn_implementation == FLEX:
        ask_for_flex(model)
    return model, tokenizer


def tokenizer_and_config(location: Location, shown: str) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """What is known of a model without its weights; ``shown`` is its name in messages.

    Raises:
        UserError: they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location.tokenizer), AutoConfig.from_pretrained(location.source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"--model {shown}: cannot be loaded: {error}{no_folder(location.source)}") from error


def attention_options(settings: ModelSettings, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is told of attention; ``FLEX`` is nothing to it, and is asked of the model it loads.

    Raises:
        UserError: FlexAttention for a device that has no backward pass of it.
    """
    name = settings.attn_implementation
    if name == FLEX and device.type != "cuda":
        raise UserError(f"--attn_implementation {FLEX} needs a CUDA GPU, not {device}: leave it out")
    return {} if name in (None, FLEX) else {"attn_implementation": name}


def context_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The most positions a model, or the model of a configuration, was made for, where the configuration says so.

    Of a model whose positions begin behind its padding's (RoBERTa and its like) those before are taken off.
    """
    config = getattr(model, "config", model).get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value - _positions_unused(model)
    return None


def positions_in_table(model: PreTrainedModel) -> int | None:
    """How many positions a model has in a table (GPT-2, OPT, GPT-J): there is no further one.

    None where it computes them, as most rotary embeddings do. The table is known by its size, the context's.
    """
    from torch import Tensor, nn

    context, tokens = context_length(model), model.get_input_embeddings()
    if context is None:
        return None
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    tables += [buffer for module in model.modules() for buffer in module.buffers(recurse=False)]
    tables += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    # OPT and its like have two rows more, for padding.
    found = any(table.dim() == 2 and context <= len(table) <= context + 2 for table in tables)
    return context if found else None


def _positions_unused(model: PreTrainedModel | PreTrainedConfig) -> int:
    """How many rows of its table of positions a model never reads: 512 tokens fit RoBERTa's 514."""
    modules = model.named_modules() if hasattr(model, "named_modules") else ()
    tables = (module for name, module in modules if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else int(padding) + 1
