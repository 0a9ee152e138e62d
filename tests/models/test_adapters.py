"""Adapters: a whole run with LoRA, the folder of an adapter as a model, and adapters that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.cli import demo
from rrhf.common.errors import UserError
from rrhf.common.presentation import typeset_number
from rrhf.models.adapters import (
    AdapterSettings,
    load_policy_or_adapter,
    load_quantised,
    merged,
    peft_config,
    with_adapter,
)
from rrhf.models.folders import _adapter_of_hub
from rrhf.models.gguf import export_gguf
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.locate import Location, locate
from rrhf.recipes.config import override, parse_config, read_config
from rrhf.training.config import RRHFConfig
from rrhf.training.trainer import RRHFTrainer
from support import tiny
from support.models import tiny_model, tiny_tokenizer

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
RUN = ("run", "config.yaml", "--output", "run")
IDS = torch.tensor([[5, 9, 4, 40]])


def cpu(model: Path) -> ModelSettings:
    return ModelSettings(model=str(model), device="cpu", dtype="float32")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[Path, Any]:
    """(folder, model) of an adapter that is no identity."""
    from peft import LoraConfig

    model, tokenizer = load_policy_or_adapter(cpu(base))
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = with_adapter(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted.eval()


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_with_lora_evaluates_what_it_trained(base: Path, tmp_path: Path) -> None:
    evaluations, texts = {}, {}
    for merge in (True, False):
        settings = tiny.config(base)
        settings["train"] |= {"peft": "lora", "learning_rate": 0.05, "merge_adapter": merge, "watch_steps": 5,
                              "watch_max_new_tokens": 6}  # fmt: skip
        folder = tiny.workplace(tmp_path / str(merge), settings)
        tiny.warm(*RUN, cwd=folder).done()
        run = folder / "run"
        assert (run / "model" / "model.safetensors").exists() == merge
        assert (run / "model" / "adapter_model.safetensors").exists() != merge
        assert len({file.stat().st_mode for file in (run / "model").iterdir() if file.is_file()}) == 1
        evaluations[merge] = json.loads((run / "evaluation.json").read_text())
        texts[merge] = {
            name: [row["responses"] for row in tiny.read_rows(run / f"evaluation.{name}.jsonl")]
            for name in ("rho", "pi")
        }
        assert typeset_number(evaluations[merge]["reward_gain"]["mean"]) in (run / "report.html").read_text(
            encoding="utf-8"
        )
        card = (run / "model" / "README.md").read_text(encoding="utf-8")
        assert ("A language model" if merge else "A LoRA adapter") in card
        history = json.loads((run / "model" / "trainer_state.json").read_text())["log_history"]
        assert any("eval_perplexity" in row for row in history)  # under the model without its adapter
    assert texts[True]["pi"] != texts[True]["rho"]
    assert texts[False] == texts[True]  # evaluated alone or merged, the adapter is there
    assert evaluations[False]["pi"] == evaluations[True]["pi"]


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_an_adapter_has_a_learning_rate_of_its_own(base: Path, tmp_path: Path) -> None:
    for given, expected in ((None, 2e-4), (1e-5, 1e-5)):
        args = RRHFConfig(output_dir=str(tmp_path), learning_rate=given, use_cpu=True, bf16=False)
        assert args.learning_rate == (given or 2e-5)
        model, tokenizer = load_policy_or_adapter(cpu(base))
        config = peft_config(AdapterSettings(peft="lora"))
        RRHFTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=tiny.rows(2), peft_config=config)
        assert args.learning_rate == expected


def test_it_is_written_down(base: Path, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    train = ("train", "--model", str(base), "--data", "scored.jsonl", "--device", "cpu", "--max_steps", "1",
             "--bf16", "false", "--report_to", "none")  # fmt: skip
    tiny.warm(*train, "--output", "plain", cwd=tmp_path).done()
    tiny.warm(*train, "--output", "lora", "--peft", "lora", cwd=tmp_path).done()
    rates = [json.loads((tmp_path / n / "training.json").read_text())["settings"] for n in ("plain", "lora")]
    assert [settings["learning_rate"] for settings in rates] == [2e-5, 2e-4]


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        (["--full"], 5e-5),
        (["--full", "train.peft=lora"], 5e-4),
        (["train.peft=lora", "--quick"], 5e-4),
        (["train.learning_rate=1e-3", "train.peft=lora", "--full"], 1e-3),
    ],
)
def test_the_demo_takes_an_adapter(
    arguments: list[str], rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(demo, "execute", lambda *given: found.extend(given) or 0)
    assert demo.main(arguments) == 0
    config = parse_config(override(read_config(found[0]), found[1]), tmp_path)
    assert config.train.learning_rate == rate
    assert config.adapter.peft == ("lora" if "train.peft=lora" in arguments else None)


# --- the folder of an adapter as a model ------------------------------------------------------------------------------


def test_an_adapter_loads_as_its_base_with_it(base: Path, adapter: tuple[Path, Any]) -> None:
    folder, adapted = adapter
    loaded, tokenizer = load_policy_or_adapter(cpu(folder))
    assert torch.allclose(logits(loaded), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(load_policy_or_adapter(cpu(base))[0]), atol=1e-2)
    assert type(loaded).__name__ == "LlamaForCausalLM" and not loaded.training
    assert tokenizer("The river").input_ids == load_policy_or_adapter(cpu(base))[1]("The river").input_ids


def test_a_config_of_its_base_beside_an_adapter_makes_it_no_whole_model(base: Path, adapter: tuple[Path, Any]) -> None:
    folder, model = adapter
    shutil.copy(base / "config.json", folder)
    assert locate(str(folder)).adapter == folder
    loaded, _ = load_policy_or_adapter(cpu(folder))
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.fixture
def on_the_hub(adapter: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The copy of somebody's adapter in the hub's cache."""
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--somebody--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(adapter[0], repository / "snapshots" / commit)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"), raising=False)
    _adapter_of_hub.cache_clear()
    yield repository / "snapshots" / commit
    _adapter_of_hub.cache_clear()


def test_an_adapter_on_the_hub_is_merged_and_trains_on(on_the_hub: Path, base: Path, adapter: tuple[Path, Any]) -> None:
    """transformers alone would hook it into its base, and freeze all of it."""
    name = "somebody/lora"
    assert locate(name) == Location(str(base), str(base), on_the_hub)
    loaded, _ = load_policy_or_adapter(ModelSettings(name, device="cpu", dtype="float32"))
    torch.testing.assert_close(logits(loaded), logits(adapter[1]))
    assert all(p.requires_grad for p in loaded.parameters())
    assert model_digest(name) == model_digest(str(adapter[0])) != ""


def test_an_adapter_names_its_base_as_it_was_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the folder in the cache that a GGUF file was converted to."""
    pytest.importorskip("gguf")
    export_gguf(base, tmp_path / "base.gguf", "f32")
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    tiny.warm(
        "train", "--model", "base.gguf", "--data", "scored.jsonl", "--output", "alone", "--device", "cpu", "--peft",
        "lora", "--merge_adapter", "false", "--max_steps", "1", cwd=tmp_path,
        env={"RRHF_CACHE": str(tmp_path / "cache")},
    ).done()  # fmt: skip
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base.gguf"
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("RRHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    load_policy_or_adapter(cpu(Path("alone")))


def test_an_adapter_trains_on_as_a_whole_model(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    """An adapter freezes its base; merged into it, all weights are to be trained."""
    folder, _ = adapter
    start, _ = load_policy_or_adapter(cpu(folder), training=True)
    assert all(parameter.requires_grad for parameter in start.parameters())
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    train = ("train", "--model", str(folder), "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
             "--max_steps", "1", "--bf16", "false", "--learning_rate", "1e-3", "--report_to", "none")  # fmt: skip
    tiny.warm(*train, cwd=tmp_path).done()
    trained = load_policy_or_adapter(cpu(tmp_path / "out"))[0]
    matrices = [(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True) if a.dim() == 2]
    assert matrices and not any(torch.equal(before, after) for before, after in matrices)


def test_a_quantised_base_is_loaded_whole_before_merging(base: Path, adapter: tuple[Path, Any]) -> None:
    """On whole weights both ways must agree; 4-bit weights need a GPU."""
    _, adapted = adapter
    again = merged(adapted, cpu(base), quantised=True)
    assert torch.allclose(logits(again), logits(merged(adapted, cpu(base))), atol=1e-6)


def test_an_adapter_on_an_adapter_must_be_merged(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    train = ("train", "--model", str(adapter[0]), "--data", "scored.jsonl", "--output", "out", "--device", "cpu",
             "--max_steps", "1", "--peft", "lora", "--bf16", "false", "--report_to", "none")  # fmt: skip
    refused = tiny.warm(*train, "--merge_adapter", "false", cwd=tmp_path)
    assert refused.code == 2 and "is an adapter itself" in refused.err
    tiny.warm(*train, cwd=tmp_path).done()
    found = logits(load_policy_or_adapter(cpu(tmp_path / "out"))[0])
    assert torch.allclose(found, logits(adapter[1]), atol=1e-2)  # one small step from it


# --- its name ---------------------------------------------------------------------------------------------------------


def test_the_location_of_an_adapter_is_its_base_and_itself(adapter: tuple[Path, Any], base: Path) -> None:
    folder, _ = adapter
    assert locate(str(folder)) == Location(str(base), str(base), folder)
    assert locate(str(folder)).tokenizer == str(folder)
    (folder / "tokenizer_config.json").unlink()
    assert locate(str(folder)).tokenizer == str(base)
    with pytest.raises(UserError, match="is an adapter alone; name its base model"):
        load_policy(cpu(folder))


def test_sampling_checks_an_adapter_before_it_is_loaded(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    """Its base's context, and its own tokenizer's templates, are known without weights."""
    tiny.write_rows(tmp_path / "queries.jsonl", tiny.rows(2, responses=0))
    calls = tmp_path / "calls"
    counted = tiny.count("rrhf.models.cache:load_policy_or_adapter", calls)
    ended = tiny.warm(
        "sample", "--model", str(adapter[0]), "--data", "queries.jsonl", "--output", "out.jsonl", "--device", "cpu",
        "--max_new_tokens", "1000", cwd=tmp_path, faults=[counted],
    )  # fmt: skip
    assert ended.code == 2 and "more than the context of 128" in ended.err
    assert not calls.exists()


# --- what does not fit ------------------------------------------------------------------------------------------------


def change(folder: Path, **values: Any) -> None:
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **values}))


def another_base(folder: Path, family: str = "llama", **sizes: int) -> str:
    config = tiny_model(family).config
    for name, value in sizes.items():
        setattr(config, name, value)
    type(tiny_model(family))(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("llama", {"hidden_size": 64, "head_dim": 8}, "size mismatch"),
        ("llama", {"num_hidden_layers": 1}, "the model has no "),
        ("llama", {"num_hidden_layers": 3}, "no weights for "),
        ("gpt2", {}, "q_proj"),
    ],
)
def test_an_adapter_of_another_model(
    family: str, sizes: dict[str, int], said: str, adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = adapter
    change(folder, base_model_name_or_path=another_base(tmp_path / "other", family, **sizes))
    with pytest.raises(UserError, match="does not fit its base model") as caught:
        load_policy_or_adapter(cpu(folder))
    assert said in str(caught.value) and str(folder) in str(caught.value)


def test_an_adapter_without_its_parts(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = adapter
    change(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"the base model that .* names: --model .*gone: no such folder"):
        load_policy_or_adapter(cpu(folder))
    change(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        load_policy_or_adapter(cpu(folder))
    change(folder, base_model_name_or_path="base")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_policy_or_adapter(cpu(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        load_policy_or_adapter(cpu(folder))


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model")
def test_shared_embeddings_get_no_adapter(layer: str, tmp_path: Path) -> None:
    """Merged into the weight that both share, it would change the other one too."""
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        return LoraConfig(r=2, target_modules=["q_proj", layer], task_type="CAUSAL_LM")

    with pytest.raises(UserError, match=rf"--lora_target_modules: an adapter on \S*{layer}, but .* share a weight"):
        with_adapter(tiny_model("llama-tied"), config())
    assert with_adapter(tiny_model("llama"), config()).active_adapter
    tied = tiny_model("llama-tied", vocabulary=512)
    tied.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tied.name_or_path = str(tmp_path / "base")
    get_peft_model(tied, config()).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(UserError, match=rf"--model \S*adapter: an adapter on \S*{layer}, but .* share a weight"):
        load_policy_or_adapter(cpu(tmp_path / "adapter"))


def test_virtual_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    """The passes over records read none, and would train nothing."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for kind in (PromptTuningConfig, PrefixTuningConfig):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with pytest.raises(UserError, match=f"peft_config: {kind.__name__} puts virtual tokens"):
            with_adapter(tiny_model("llama"), config)
    model, _ = load_policy_or_adapter(cpu(base))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="prompt: PromptTuningConfig puts virtual tokens"):
        load_policy_or_adapter(cpu(tmp_path / "prompt"))


def test_layers_that_the_model_does_not_have(base: Path, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    refused = tiny.warm(
        "train", "--model", str(base), "--data", "scored.jsonl", "--output", "out", "--device", "cpu", "--peft", "lora",
        "--lora_target_modules", "c_attn", cwd=tmp_path,
    )  # fmt: skip
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "the adapter does not fit the model" in refused.err and "c_attn" in refused.err
    assert "--lora_target_modules" in refused.err and "down_proj" in refused.err


def test_sizes_with_which_nothing_would_be_trained() -> None:
    with pytest.raises(UserError) as raised:
        AdapterSettings("lora", lora_r=0, lora_alpha=0.0, lora_dropout=1.0)
    assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == [
        "--lora_r 0", "--lora_alpha 0.0", "--lora_dropout 1.0",
    ]  # fmt: skip


def test_qlora_says_what_it_needs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_rows(tmp_path / "scored.jsonl", tiny.rows(4))
    refused = tiny.warm(
        "train", "--model", str(base), "--data", "scored.jsonl", "--output", "out", "--device", "cpu", "--peft",
        "qlora", cwd=tmp_path,
    )  # fmt: skip
    assert refused.code == 2 and "--peft qlora needs a CUDA GPU: use --peft lora" in refused.err
    monkeypatch.setattr("rrhf.models.adapters.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_quantised(cpu(base))
    assert AdapterSettings.__dataclass_fields__["peft"].metadata["help"].endswith("untested)")
