"""A model folder as one GGUF file, for llama.cpp and what is built on it: Llama, Mistral, Qwen2 and Qwen3.

The package ``gguf``, llama.cpp's own, writes the file, names the tensors and rounds the weights. What is done here is
what its converter does for these families: reading the configuration, finding the name of the tokenizer's splitting
rule, and ordering the rows of Llama's query and key weights as llama.cpp's rotation wants them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.files import cache_folder, checksum_of_file, claimed_place, read_object, refuse_existing, replacing
from rrhf.common.imports import of_extra
from rrhf.common.progress import progress
from rrhf.models.folders import model_folder, refuse_missing_weights, save_policy

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("rrhf")

# our name → the names that gguf has for the weights' type and for the file's
WEIGHT_TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


@dataclass(frozen=True)
class Family:
    """How llama.cpp calls a model type, and whether it turns neighbouring rows of query and key together."""

    architecture: str
    neighbours: bool


FAMILIES = {
    "llama": Family("llama", neighbours=True),
    "mistral": Family("llama", neighbours=True),
    "qwen2": Family("qwen2", neighbours=False),
    "qwen3": Family("qwen3", neighbours=False),
}

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}  # regular expression → llama.cpp's name


def export_gguf(source: str | Path, output: str | Path, weights: str = "f16", overwrite: bool = False) -> Path:
    """Write the model in ``source`` as a GGUF file.

    Args:
        source: a model folder, or a run folder.
        output: the file, ending in .gguf; written whole or not at all.
        weights: one of ``WEIGHT_TYPES``; vectors (norms, biases) stay fp32, and rows that q8_0's blocks of 32 do not
            divide become fp16.
        overwrite: replace a file that exists.

    Returns:
        ``output``.

    Raises:
        UserError: what is there cannot be exported; the message says why, and names llama.cpp's converter.
    """
    folder, output = model_folder(source), Path(output)
    if weights not in WEIGHT_TYPES:
        raise UserError(f"--type {weights}: {nearest(weights, WEIGHT_TYPES)}")
    if output.suffix != ".gguf":
        raise UserError(f"--output {output}: the name of a GGUF file ends in .gguf")
    refuse_existing(output, overwrite)
    gguf = of_extra("gguf", "writing GGUF needs the package gguf: pip install 'rrhf[gguf]'")
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds an adapter alone: train with --merge_adapter true, or merge it with PEFT first"
        )
    config = read_object(folder / "config.json")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise _elsewhere(folder, f"the family {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise _elsewhere(folder, f"its rotation is scaled ({rope.get('rope_type', rope.get('type'))})")
    if config.get("use_sliding_window"):
        raise _elsewhere(folder, "it uses a sliding window")
    vocabulary = _vocabulary(folder, config)
    quiet = logging.getLogger("gguf")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with replacing(output) as temporary:
            writer = gguf.GGUFWriter(temporary, family.architecture)
            try:
                _write_settings(writer, folder, config, weights)
                _write_tokenizer(writer, folder, vocabulary)
                _write_tensors(writer, folder, config, family, weights)
            finally:
                writer.close()
    finally:
        quiet.setLevel(level)
    log.info(f"gguf: {output}, {output.stat().st_size / 1e6:.0f} MB, {weights} weights")
    return output


def _elsewhere(folder: Path, why: str) -> UserError:
    """What to do where this module cannot: llama.cpp's converter knows every family."""
    return UserError(
        f"{folder}: not exported to GGUF here: {why}. llama.cpp's converter does more: "
        f"git clone https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt && "
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype f16"
    )


# --- settings --------------------------------------------------------------------------------------------------------


def _write_settings(writer: Any, folder: Path, config: dict[str, Any], weights: str) -> None:
    import gguf

    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    context = config["max_position_embeddings"]
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    if window is not None and window < context:
        log.info(f"gguf: llama.cpp has no sliding window for Mistral: the context is cut to it, {window} tokens")
        context = window
    place = folder.resolve()
    # With a capital: transformers fails on a file whose name is exactly "mistral".
    writer.add_name((place.parent if place.name == "model" else place).name.capitalize())
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[WEIGHT_TYPES[weights][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# --- tokenizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]  # gguf.TokenType
    splitting: str  # llama.cpp's name of the rule that cuts a text before merging
    adds: dict[str, bool]  # whether bos and eos are put around a text


def _vocabulary(folder: Path, config: dict[str, Any]) -> _Vocabulary:
    """The byte-level BPE tokenizer of ``folder`` in llama.cpp's words."""
    from gguf import TokenType
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise _elsewhere(folder, "it has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    splitting = _splitting(parts)
    if splitting is None:
        raise _elsewhere(folder, "its tokenizer is no byte-level BPE with a splitting rule known here")
    size = config["vocab_size"]
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {max(by_id)}, the model {size} rows: resize its embeddings first"
        )
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}

    def kind(number: int) -> int:
        if number not in by_id:
            return int(TokenType.UNUSED)
        if number in added:
            return int(TokenType.CONTROL if added[number] else TokenType.USER_DEFINED)
        return int(TokenType.NORMAL)

    ids = tokenizer("a").input_ids
    return _Vocabulary(
        tokens=[by_id.get(number, f"[PAD{number}]") for number in range(size)],
        kinds=[kind(number) for number in range(size)],
        splitting=splitting,
        adds={"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id},
    )


def _splitting(parts: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts a text into words; ``None`` where no name fits."""
    if parts["model"]["type"] != "BPE" or parts["model"].get("byte_fallback"):
        return None
    if (parts.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    rule = parts.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    bytes_ = steps[-1]
    if bytes_.get("type") != "ByteLevel" or bytes_.get("add_prefix_space"):
        return None
    before = steps[:-1]
    if bytes_.get("use_regex", True):
        digits = [{"type": "Digits", "individual_digits": True}]
        return "gpt-2" if not before else "smollm" if before == digits else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0].get("behavior") != "Isolated":
        return None
    return SPLITS.get(before[0]["pattern"].get("Regex", ""))


def _write_tokenizer(writer: Any, folder: Path, vocabulary: _Vocabulary) -> None:
    """Tokens by our reading; merges, special ids and chat template by gguf's."""
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(vocabulary.tokens))
    special.add_special_token.update(vocabulary.adds)
    special.add_to_gguf(writer, quiet=True)


# --- weights ---------------------------------------------------------------------------------------------------------


def neighbouring_rows(weights: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half next to row i of its second: transformers turns the pair (i, i + d/2), llama.cpp
    (2i, 2i + 1). ``weights`` has ``heads`` · d rows; transformers' reader undoes this."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _write_tensors(writer: Any, folder: Path, config: dict[str, Any], family: Family, weights: str) -> None:
    """Two passes over the weights, so that one tensor is in memory at a time: the table, then the data."""
    import gguf
    import numpy as np

    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    order = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads} if family.neighbours else {}
    tied = config.get("tie_word_embeddings", False)
    plan = []
    for theirs, shape, read in _tensors(folder):
        if tied and theirs == "lm_head.weight":
            continue  # llama.cpp takes the embedding where there is no output layer
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise _elsewhere(folder, f"llama.cpp's {family.architecture} has no tensor for {theirs}")
        kind = _kind(shape, weights)
        size = gguf.quants.quant_shape_to_byte_shape(shape, kind) if kind.name not in ("F32", "F16") else shape
        dtype = {"F32": "float32", "F16": "float16"}.get(kind.name, "uint8")
        plan.append((ours, kind, read))
        number = math.prod(size) * np.dtype(dtype).itemsize
        writer.add_tensor_info(ours, size, np.dtype(dtype), number, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours, kind, read in progress(plan, "gguf", len(plan), "tensors"):
        values = read()
        part = ours.split(".")[-2]
        if part in order:
            values = neighbouring_rows(values, order[part])
        writer.write_tensor_data(gguf.quants.quantize(values, kind))


def _kind(shape: tuple[int, ...], weights: str) -> Any:
    """The type a tensor is written in."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[WEIGHT_TYPES[weights][0]]
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, a function that reads it as fp32) of every tensor in the folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    def reader(file: Path, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name).float().numpy()

        return read

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}): write or fetch it again") from error
        for name, shape in shapes.items():
            yield name, shape, reader(file, name)


def gguf_as_folder(path: Path) -> Path:
    """Convert a GGUF file into an ordinary model folder in the cache, and return that folder.

    A file is converted once, wherever its copies lie (in an environment each, say), but by each version of
    transformers: older ones read some tokenizers wrongly. The object transformers makes of a GGUF file is marked
    quantised and refuses to be saved, so its state goes into a fresh model of the same configuration.

    Raises:
        UserError: no such file, it is no GGUF file that transformers reads, or its rotation is scaled, which it drops.
    """
    if not path.exists():
        raise UserError(f"--model {path}: no such file")
    try:
        key = f"{checksum_of_file(path)}|{metadata.version('transformers')}"
    except OSError as error:
        raise UserError(f"--model {path}: cannot be read: {error}") from error
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.parent.with_suffix(".lock").open("ab") as lock, claimed_place(lock, 0, wait=True):
            if not (folder / "config.json").exists():  # nor did another process make it meanwhile
                _convert(path, folder)
    return folder


def _refuse_scaled_rotation(path: Path) -> None:
    """Of GGUF files transformers reads how a rotation is scaled for GPT-OSS alone; others it would load unscaled.

    Raises:
        UserError: the file's rotation is scaled.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    name = reader.fields.get("general.architecture")
    architecture = None if name is None else name.contents()
    kind = reader.fields.get(f"{architecture}.rope.scaling.type")
    scaling = "none" if kind is None or architecture == "gpt-oss" else str(kind.contents())
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    if scaling == "none" and not factors:
        return
    why = f"tensor {factors[0]}" if factors else f"{architecture}.rope.scaling.type = {scaling}"
    raise UserError(
        f"--model {path}: its rotation is scaled ({why}), which transformers does not read from a GGUF file, so that "
        "another model would be loaded: give the model's folder or hub id, of which the file was made"
    )


def _convert(path: Path, folder: Path) -> None:
    """Write the GGUF file as a model folder, whole or not at all."""
    import tempfile

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        _refuse_scaled_rotation(path)
        quantised, found = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        refuse_missing_weights(found, str(path))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise UserError(f"--model {path}: reading GGUF needs the package gguf: pip install 'rrhf[gguf]'") from error
    except UserError:
        raise
    except Exception as error:  # a broken file's bytes can raise anything
        raise UserError(f"--model {path}: transformers cannot read this GGUF file: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    if quantised.generation_config is not None:
        model.generation_config = quantised.generation_config
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        staging = Path(scratch, folder.name)
        staging.mkdir()  # the scratch folder itself is for its user alone
        save_policy(model, tokenizer, staging)
        staging.rename(folder)
