"""Loading and saving policies: folders, GGUF files, files of packages, and everything that is none of these."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rrhf.common.errors import UserError
from rrhf.models.devices import native_bfloat16, resolve_device, resolve_dtype
from rrhf.models.folders import package_folder, resolve_model, save_policy
from rrhf.models.gguf import gguf_as_folder
from rrhf.models.load import ModelSettings, attention_options, context_length, load_policy, positions_in_table
from rrhf.models.locate import Location, locate
from support import tiny
from support.families import FAMILIES
from support.models import SMOLLM2, tiny_model

PROBE = torch.tensor([[1, 5, 9, 33, 2, 64]])


def cpu(name: str | Path, **options: Any) -> ModelSettings:
    return ModelSettings(model=str(name), device="cpu", **{"dtype": "float32", **options})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(96)}
    tokenizer = Tokenizer(models.WordLevel({**words, "</s>": 96}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROBE.clamp(max=model.config.vocab_size - 1)).logits


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_policy(tiny_model("llama"), tiny_tokenizer(), folder)
    return folder


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3"])
def test_what_is_saved_loads_the_same(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    save_policy(model, tokenizer, tmp_path / "m")
    again, again_tokenizer = load_policy(cpu(tmp_path / "m"))
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    assert again_tokenizer("w3 w4 </s>").input_ids == [3, 4, 96]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
    save_policy(again, again_tokenizer, tmp_path / "twice")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_the_type_of_the_weights(saved: Path) -> None:
    assert load_policy(cpu(saved, dtype="bfloat16"))[0].dtype == torch.bfloat16
    assert load_policy(cpu(saved, dtype="float32"))[0].dtype == torch.float32
    native = torch.bfloat16 if native_bfloat16(torch.device("cpu")) else torch.float32
    assert load_policy(cpu(saved, dtype="auto"))[0].dtype == native
    assert load_policy(cpu(saved, dtype="auto"), training=True)[0].dtype == native  # with fp32 masters in the optimiser


def test_an_attention_of_ones_own(saved: Path) -> None:
    assert load_policy(cpu(saved, attn_implementation="eager"))[0].config._attn_implementation == "eager"


def test_flex_attention_is_asked_of_the_model_and_needs_a_gpu(saved: Path) -> None:
    assert "--attn_implementation flex needs a CUDA GPU, not cpu" in refused(cpu(saved, attn_implementation="flex"))
    settings = cpu(saved, attn_implementation="flex")
    assert attention_options(settings, torch.device("cuda")) == {}  # transformers knows no such attention
    assert attention_options(cpu(saved, attn_implementation="eager"), torch.device("cpu")) == {
        "attn_implementation": "eager"
    }
    assert attention_options(cpu(saved), torch.device("cuda")) == {}


def refused(settings: ModelSettings) -> str:
    with pytest.raises(UserError) as raised:
        load_policy(settings)
    return str(raised.value)


def test_a_folder_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    message = refused(cpu(saved))
    assert str(saved) in message
    assert "no weights (*.safetensors)" in message and "checkpoint-N/" in message


def test_pickled_weights_are_not_read(saved: Path) -> None:
    """Whatever the pickle holds, it is not opened."""
    ran = saved / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    (saved / "model.safetensors").unlink()
    torch.save({"weights": Bomb()}, saved / "pytorch_model.bin")
    assert "pickled weights are not read" in refused(cpu(saved))
    (saved / "other.safetensors").write_bytes(b"")  # a folder that has weights of something else, too
    assert "cannot be loaded" in refused(cpu(saved))
    assert not ran.exists()
    torch.load(saved / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # it would have run


def test_a_folder_without_a_config(saved: Path) -> None:
    (saved / "config.json").unlink()
    assert f"{saved}: the folder has no config.json" in refused(cpu(saved))


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing"
    assert f"{missing}: no such folder" in refused(cpu(missing))
    monkeypatch.chdir(tmp_path)
    assert "./missing: no such folder" in refused(cpu("./missing"))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.txt"
    file.write_text("hello")
    assert "is a file; give its folder, or a file that ends in .gguf" in refused(cpu(file))


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{"), ("config.json", '{"model_type": "no-such-family"}'), ("model.safetensors", "nonsense")],
)
def test_a_folder_with_a_broken_file(name: str, content: str, saved: Path) -> None:
    (saved / name).write_text(content)
    message = refused(cpu(saved))
    assert str(saved) in message and "cannot be loaded" in message


def test_an_interrupted_save(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(cpu(saved))


@pytest.mark.parametrize("lacking", ["head", "layer"])
def test_weights_that_no_file_has_are_not_drawn_at_random(lacking: str, saved: Path) -> None:
    """A reward model has no output layer; a config.json may name more layers than were saved."""
    config = AutoConfig.from_pretrained(saved)
    if lacking == "head":
        LlamaForSequenceClassification(config).save_pretrained(saved)
    else:
        config.num_hidden_layers += 1
        config.save_pretrained(saved)
    said = refused(cpu(saved))
    names = "lm_head.weight" if lacking == "head" else "model.layers.2.input_layernorm.weight"
    assert f"{saved}: its files lack weights of a causal language model ({names}" in said


def test_a_hub_id_that_cannot_be_had() -> None:
    """Offline, as all tests are: no network is waited for."""
    assert "nobody/no-such-model" in refused(cpu("nobody/no-such-model"))


def test_the_misspelt_name_of_a_folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wombat/model").mkdir(parents=True)
    for name in ("wombt/model", "womba/modell"):
        said = refused(cpu(name))
        assert "no folder of that name is here; did you mean 'wombat/model'?" in said
    assert "no folder of that name is here)" in refused(cpu("koala"))
    assert refused(cpu("./wombt")).endswith("; did you mean 'wombat'?")
    (saved / "config.json").write_text("{", encoding="utf-8")
    assert "no folder" not in refused(cpu(saved))


# --- GGUF ---------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: PreTrainedModel, extra: Callable[[Any], None] = lambda writer: None) -> None:
    """A Llama as a GGUF file in fp32: its heads' rows interleaved, as llama.cpp's converter has them.

    ``extra`` is called with the writer before anything is written.
    """
    from gguf import GGUFWriter, TokenType

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*(chr(33 + number) for number in range(94)), "ab", "<|unk|>", "<|end|>"]
    assert len(tokens) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 95 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(96)
    writer.add_bos_token_id(96)
    writer.add_unk_token_id(95)

    def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
        rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
        return rows.swapaxes(1, 2).reshape(weights.shape)

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        weights = tensor.numpy()
        module = name.removesuffix(".weight")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if module in heads:
            weights = interleaved(weights, heads[module])
        writer.add_tensor(f"{prefix}{names[module]}.weight", np.ascontiguousarray(weights))
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RRHF_CACHE", str(folder))
    return folder


def gguf_file(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    pytest.importorskip("gguf")
    model = tiny_model("llama")
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, model)
    return path, model


def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path: Path, cache: Path) -> None:
    path, model = gguf_file(tmp_path)
    loaded, tokenizer = load_policy(cpu(path))
    torch.testing.assert_close(logits(loaded), logits(model))
    assert tokenizer("a").input_ids == [ord("a") - 33]
    assert tokenizer.eos_token_id == 96
    (folder,) = (cache / "gguf").iterdir()  # one folder, and nothing half-made beside it
    assert not hasattr(loaded.config, "quantization_config")
    save_policy(loaded, tokenizer, tmp_path / "again")  # which what transformers makes of a GGUF file refuses
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(loaded))


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = gguf_file(tmp_path)
    before = os.umask(0o002)
    try:
        folder = gguf_as_folder(path)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o775  # others who share the cache may read it
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o664}
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setitem(sys.modules, "gguf", None)  # it is not read again
    assert gguf_as_folder(path) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    copy = tmp_path / "another environment" / path.name
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert gguf_as_folder(copy) == folder  # nor kept twice


def convert(path: str) -> None:
    gguf_as_folder(Path(path))


def test_a_gguf_file_is_converted_once_by_two_processes(tmp_path: Path, cache: Path) -> None:
    path, _ = gguf_file(tmp_path)
    calls = tiny.count("rrhf.models.gguf:_convert", tmp_path / "calls")
    forks, place = tiny.forks(*tiny.PRELOADED), {"RRHF_CACHE": str(cache)}
    started = [forks.start("models.test_load:convert", str(path), faults=[calls], env=place) for _ in range(2)]
    for process in started:
        forks.wait(process).done()
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert len(list((cache / "gguf").iterdir())) == 1


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path, cache: Path) -> None:
    path, _ = gguf_file(tmp_path)
    first = gguf_as_folder(path)
    write_gguf(path, tiny_model("llama", seed=1))
    second = gguf_as_folder(path)
    assert first != second
    assert not torch.equal(logits(load_policy(cpu(first))[0]), logits(load_policy(cpu(second))[0]))


def test_another_transformers_reads_a_gguf_file_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = gguf_file(tmp_path)
    first = gguf_as_folder(path)
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.0" if name == "transformers" else installed(name))
    assert gguf_as_folder(path) != first


def test_a_folder_that_is_named_like_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "tiny.gguf").mkdir()
    with pytest.raises(UserError, match=r"--model .*tiny\.gguf: cannot be read: .*Is a directory"):
        gguf_as_folder(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("content", [b"", b"this is no GGUF file, only some bytes " * 20, b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_gguf(content: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert f"{path}: transformers cannot read this GGUF file" in refused(cpu(path))
    assert not list(cache.glob("gguf/*"))


def test_a_gguf_file_that_is_cut_short(tmp_path: Path, cache: Path) -> None:
    path, _ = gguf_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * len(whole) // 3])
    assert f"{path}: transformers cannot read this GGUF file" in refused(cpu(path))
    assert not list(cache.glob("gguf/*"))


def test_a_gguf_file_without_one_of_its_tensors(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    add = gguf.GGUFWriter.add_tensor
    lost = "blk.1.ffn_up.weight"
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", lambda self, name, *a: name == lost or add(self, name, *a))
    path, _ = gguf_file(tmp_path)
    assert f"{path}: its files lack weights of a causal language model (model.layers.1.mlp.up_proj.weight)" in refused(
        cpu(path)
    )
    assert not list((cache / "gguf").iterdir())


def scaled_by(kind: str) -> Callable[[Any], None]:
    from gguf import RopeScalingType

    def scaled(writer: Any) -> None:
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(8.0)

    return scaled


def factors(name: str) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor(name, np.array([1, 1, 8, 8], dtype=np.float32))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (lambda: scaled_by("linear"), r"llama.rope.scaling.type = linear"),
        (lambda: scaled_by("yarn"), r"llama.rope.scaling.type = yarn"),
        (lambda: factors("rope_freqs.weight"), "tensor rope_freqs.weight"),
        (lambda: factors("rope_factors_long.weight"), "tensor rope_factors_long.weight"),
        (lambda: scaled_by("none"), None),
    ],
)
def test_a_scaled_rotation(
    extra: Callable[[], Callable[[Any], None]], said: str | None, tmp_path: Path, cache: Path
) -> None:
    """transformers would load it unscaled, as another model."""
    pytest.importorskip("gguf")
    path = tmp_path / "scaled.gguf"
    write_gguf(path, tiny_model("llama"), extra())
    if said is None:
        assert load_policy(cpu(path))
    else:
        assert f"{path}: its rotation is scaled ({said})" in refused(cpu(path))
        assert not list(cache.glob("gguf/*"))


def test_no_such_gguf_file(tmp_path: Path, cache: Path) -> None:
    assert "none.gguf: no such file" in refused(cpu(tmp_path / "none.gguf"))


# --- files of packages --------------------------------------------------------------------------------------------


@pytest.fixture()
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries a model and fails where it is imported."""
    folder = tmp_path / "site" / "some_model_package"
    save_policy(tiny_model("llama"), tiny_tokenizer(), folder / "weights")
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    return folder


def test_a_model_that_a_package_carries(package: Path) -> None:
    assert package_folder("some_model_package") == package
    assert resolve_model("package:some_model_package/weights") == str(package / "weights")
    loaded, _ = load_policy(cpu("package:some_model_package/weights"))
    assert torch.equal(logits(loaded), logits(tiny_model("llama")))
    assert "some_model_package" not in sys.modules


def test_every_kind_of_name_has_its_location(package: Path, saved: Path) -> None:
    assert locate("org/model") == Location("org/model", "org/model")  # a hub id: nothing is asked
    assert locate(str(saved)) == Location(str(saved), str(saved))
    carried = "package:some_model_package/weights"
    assert locate(carried) == Location(carried, str(package / "weights"))
    converted = locate(SMOLLM2)
    assert converted.base == SMOLLM2 and converted.source == str(gguf_as_folder(Path(resolve_model(SMOLLM2))))
    for name, says in ((saved / "none", "no such folder"), (saved / "config.json", "is a file")):
        with pytest.raises(UserError, match=says):
            locate(str(name))


def test_a_package_without_that_file(package: Path) -> None:
    message = refused(cpu("package:some_model_package/wieghts"))
    assert "carries no file 'wieghts'" in message and "weights" in message


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.models", ".."])
def test_a_package_that_is_not_there(name: str) -> None:
    assert "no such package is installed" in refused(cpu(f"package:{name}/file.gguf"))
    assert resolve_model("some/name") == "some/name"


def test_smollm2(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert resolve_model(SMOLLM2).endswith(".gguf")
    assert model.num_parameters() == pytest.approx(135e6, rel=0.01)
    assert context_length(model) == 8192 or context_length(model) == 2048
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


# --- devices and types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "cuda:99"])
def test_an_unknown_device(name: str) -> None:
    with pytest.raises(UserError, match=r"use cpu, cuda, mps or auto"):
        resolve_device(name)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == expected


def test_an_unknown_type() -> None:
    with pytest.raises(UserError, match="--dtype float16: known: auto, float32, bfloat16"):
        ModelSettings(model="x", dtype="float16")


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ("", True),
        ("DEFAULT", True),
        ("ALL", True),
        ("AVX512_CORE_AMX", True),
        ("AVX512_CORE_BF16", True),
        ("avx512_core_amx", True),
        ("AVX2", False),
        ("avx2", False),
        ("SSE41", False),
        ("AVX512_CORE", False),
        ("AVX512_CORE_VNNI", False),
    ],
)
@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_is_native_where_processor_and_limit_allow_it(
    limit: str, allowed: bool, hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: hardware)
    device = torch.device("cpu")
    assert native_bfloat16(device) == (allowed and hardware)
    assert resolve_dtype("auto", device) == (torch.bfloat16 if allowed and hardware else torch.float32)
    assert resolve_dtype("auto", device, training=True) == resolve_dtype("auto", device)
    for written in ("true", "True"):  # accelerate reads it in either case
        monkeypatch.setenv("ACCELERATE_USE_FSDP", written)  # which holds fp32 weights and casts them on its own
        assert resolve_dtype("auto", device, training=True) == torch.float32
    assert resolve_dtype("bfloat16", device) == torch.bfloat16
    assert resolve_dtype("float32", device) == torch.float32


def test_context_lengths() -> None:
    assert context_length(tiny_model("llama")) == context_length(tiny_model("llama").config) == 512
    assert context_length(tiny_model("gpt2")) == 512
    assert context_length(tiny_model("gemma3")) == 512
    assert context_length(tiny_model("bloom")) is None  # positions by distance: there is no limit to name


@pytest.mark.parametrize("family", ["gpt2", "gpt-j", "opt", "gpt-neo", "llama", "gemma4", "bloom"])
def test_positions_that_stand_in_a_table(family: str) -> None:
    expected = 512 if family in ("gpt2", "gpt-j", "opt", "gpt-neo") else None
    assert positions_in_table(FAMILIES[family].make()) == expected


def test_the_tokenizer_of_a_folder(saved: Path) -> None:
    assert AutoTokenizer.from_pretrained(saved).eos_token == "</s>"
