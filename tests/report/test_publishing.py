"""Publishing: the card, GGUF files that read back as the same model, uploads to a hub that runs here."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rrhf.cli.main import main
from rrhf.common.errors import UserError
from rrhf.models.folders import save_policy
from rrhf.models.gguf import export_gguf
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings, load_policy
from rrhf.records.files import read_records, write_records
from rrhf.report.card import CARD, MARK, model_card, write_card
from rrhf.report.hub import push_model, push_records
from support.models import tiny_model, tiny_tokenizer
from support.reward_models import write_encoder
from support.tiny import rows, write_model, write_rewards, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
TOKEN = "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"


def train_flags(model: Path, data: Path, output: Path) -> list[str]:
    return [
        "train", "--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu",
        "--max_steps", "2", "--gradient_accumulation_steps", "2", "--bf16", "false", "--report_to", "none",
        "--learning_rate", "0.0003", "--ranking_loss", "listmle", "--sft_reduction", "mean", "--max_length", "64",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a tiny model that was trained, and an evaluation with one gain and one that may be none."""
    from rrhf.evaluation.texts import Likelihood, evaluate_texts

    folder = tmp_path_factory.mktemp("published") / "my-run"
    folder.mkdir()
    base = write_model(folder.parent / "base")
    lines = [*rows(7), {"query": "nothing scored", "responses": ["a", "b"], "scores": [None, None]}]
    data = write_rows(folder / "scored.jsonl", lines)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"source": "someone/some-data", "format": "hh"}}))
    assert main(train_flags(base, data, folder / "model")) == 0
    records = list(read_records(data))
    good, bad = [("a a a a", "stop")] * len(records), [("b", "stop")] * len(records)
    mixed = [(("a" if i % 2 else "bb"), "stop") for i in range(len(records))]
    for name, rho, pi in (("gain", bad, good), ("none", mixed, mixed[::-1])):
        result, _ = evaluate_texts(
            records,
            rho,
            pi,
            [length],
            perplexity=lambda r, t: Likelihood(2.0 * len(t), len(t)),
            perplexity_model="/a/b/gpt",
            seed=3,
        )
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def length(prompts: list[Any], completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


# --- the card --------------------------------------------------------------------------------------------------------


def test_training_writes_a_card_that_the_hub_reads(run: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / "model" / CARD)
    assert card.data.library_name == "transformers"
    assert {"rrhf", "alignment"} <= set(card.data.tags)
    assert card.data.datasets == ["someone/some-data"]
    assert card.data.base_model is None  # a folder of this machine is nobody's base model
    assert card.data.license is None  # not known
    text = card.content
    for part in (
        "- records: 7", "- skipped: 1 (no response is scored)", "human 88%", "provided 12%", "`listmle`",
        "| learning rate | 0.0003 |", "| optimiser steps | 2 |", "| seed | 42 |", "| queries a step and process | 2 |",
        "a mean over tokens", "| precision | ", "Not evaluated", "arXiv:2304.05302", "trained from base",
    ):  # fmt: skip
        assert part in text, part
    for package in ("rrhf", "torch", "transformers"):
        assert re.search(rf"{package} \d", text), package


def test_the_card_describes_the_ranking_loss_as_its_function_does(run: Path) -> None:
    from rrhf.losses import RANKING_LOSSES, describe

    settings = json.loads((run / "model" / "training.json").read_text())["settings"]
    for name, loss in RANKING_LOSSES.items():
        card = model_card(run / "model", training={"settings": {**settings, "ranking_loss": name}})
        assert f"| ranking loss | `{name}`, {describe(loss)} |" in card
    assert "| responses that train |" not in card and "| equal scores |" not in card
    chosen = {"ties": "margin:0.5", "select": "top:3"}
    card = model_card(run / "model", training={"settings": {**settings, **chosen}})
    assert "| responses that train | `top:3`: the N best |" in card
    assert "| equal scores | `margin:0.5`: scores nearer than E are equal" in card
    others = model_card(run / "model", training={"settings": {**settings, "ranking_loss": "not_here:loss"}})
    assert "| ranking loss | `not_here:loss` |" in others  # a card imports nothing for it


def test_a_card_names_no_folder_of_the_machine(run: Path) -> None:
    result = json.loads((run / "gain.json").read_text())
    assert str(run.parent) not in model_card(run / "model", result)
    assert "/a/b" not in model_card(run / "model", result)


def test_relative_paths_are_no_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the command is given elsewhere than the training's was, nor where the data are gone."""
    from huggingface_hub import ModelCard

    monkeypatch.chdir(tmp_path)
    write_model(Path("models/base"))
    run = tmp_path / "runs" / "one"
    write_model(run / "model")
    training: dict[str, Any] = {"settings": {"model": "models/base", "data": "runs/scored.jsonl"}}
    (run / "model" / "training.json").write_text(json.dumps(training))
    data = {"source": "data/train.jsonl", "held_out": "someone/prompts"}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    card = ModelCard.load(write_card(run))
    assert (card.data.base_model, card.data.datasets) == (None, ["someone/prompts"])
    assert "trained from base with" in card.text and "- trained on: `scored.jsonl`" in card.text
    training["settings"]["model"] = "someone/base"
    assert "\nbase_model: someone/base\n" in model_card(run / "model", training=training)


def test_results_are_honest(run: Path) -> None:
    gain = model_card(run / "model", json.loads((run / "gain.json").read_text()))
    assert "| 1.000 | 7.000 | 6.000 [6.000, 6.000] |" in gain
    assert "the interval lies above 0" in gain
    none = model_card(run / "model", json.loads((run / "none.json").read_text()))
    assert "**no difference is shown**: the interval includes 0" in none
    worse = json.loads((run / "gain.json").read_text())
    values = worse["rewards"][next(iter(worse["rewards"]))]
    values["gain"] = {"mean": -3.0, "low": -3.5, "high": -2.5}
    assert "**worse**" in model_card(run / "model", worse)


def test_the_card_is_refreshed_after_evaluation_unless_somebody_wrote_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.copy(again / "gain.json", again / "evaluation.json")
    note_weights(again)
    (again / "scored.jsonl").unlink()  # what was counted in training is remembered
    assert main(["publish", str(again), "--to", "card"]) == 0
    place = again / "model" / CARD
    assert capsys.readouterr().out.strip() == str(place)
    assert "above 0" in place.read_text(encoding="utf-8")
    assert "human 88%" in place.read_text(encoding="utf-8")
    own = place.read_text(encoding="utf-8").replace(MARK, "") + "my words"
    place.write_text(own, encoding="utf-8")
    write_card(again, refresh=True)
    assert place.read_text(encoding="utf-8") == own
    assert main(["publish", str(again), "--to", "card"]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["publish", str(again), "--to", "card", "--overwrite"]) == 0
    assert "my words" not in place.read_text(encoding="utf-8")


def note_weights(run: Path) -> None:
    """As an evaluation does, of the model that is there now."""
    noted = {"made_of": {"weights": model_digest(str(run / "model"))}}
    (run / "evaluation.pi.made-of.json").write_text(json.dumps(noted), encoding="utf-8")


def test_an_evaluation_of_another_model_is_not_on_the_card(run: Path, tmp_path: Path) -> None:
    """The model was trained anew in its place; without a note of the weights, name and time tell."""
    again = shutil.copytree(run, tmp_path / "again")
    result = json.loads((again / "gain.json").read_text())
    place, model = again / "evaluation.json", again / "model"
    result["settings"] = {"models": {"rho": str(tmp_path / "base"), "pi": str(model)}}
    place.write_text(json.dumps(result), encoding="utf-8")
    assert "above 0" in model_card(model)  # as old versions left it
    os.utime(place, (1, 1))
    assert "Not evaluated" in model_card(model)
    note_weights(again)
    assert "above 0" in model_card(model)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n", encoding="utf-8")
    os.utime(place)
    assert "Not evaluated" in model_card(model)


def test_the_card_says_what_was_measured_against_what(run: Path) -> None:
    result = json.loads((run / "gain.json").read_text())
    result["rewards"] = {"model:/home/me/secret/rm": next(iter(result["rewards"].values()))}
    result["settings"] = {"models": {"rho": "/home/me/first", "pi": "/home/me/runs/7/rounds/3/model"}}
    card = model_card(run / "model", result)
    assert "By `model:rm` the model is better than ρ (`first`): the interval lies above 0" in card
    assert "| reward `model:rm` |" in card and "/home" not in card and "secret" not in card


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranking_loss": "hinge"}, "with RRHF ([arXiv 2304.05302](https://arxiv.org/abs/2304.05302)): of several"),
        ({"ranking_loss": "dpo", "sft_weight": 0.0}, "with the ranking loss `dpo`: of several scored responses to a "
         "query it learns to rate the better ones higher."),
        ({"ranking_loss": "none"}, "with supervised fine-tuning: it learns to write the best response"),
        ({"baseline": "ppo"}, "with PPO: it learns from the scores of responses that it samples itself."),
    ],
)  # fmt: skip
def test_the_card_says_how_it_was_trained(settings: dict[str, Any], said: str, run: Path) -> None:
    assert said in model_card(run / "model", training={"settings": settings})


def test_the_card_of_ppo_says_nothing_of_ranking(tmp_path: Path) -> None:
    """What it learned from, and by which settings, stand in the place of Eq. 5 and of scored responses."""
    base, data = write_model(tmp_path / "base"), write_rows(tmp_path / "d.jsonl", rows(2))
    write_rewards(tmp_path)
    flags = [
        "--reward", "tiny_rewards:vowels", "--max_new_tokens", "4", "--rollout_queries", "2", "--ppo_epochs", "1",
        "--max_steps", "1", "--clip_range", "0.3", "--kl_beta", "0.07", "--nlpo_top_p", "0.8", "--device", "cpu",
    ]  # fmt: skip
    code = "import sys; from rrhf.cli.main import main; sys.exit(main())"
    command = ["baseline", "nlpo", "--model", str(base), "--data", str(data), "--output", str(tmp_path / "m"), *flags]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = model_card(tmp_path / "m")
    for part in (
        "trained from base with NLPO: it learns", "`d.jsonl`, queries\n", "- responses sampled in training: 2",
        "| reward | `tiny_rewards:vowels` |", "| clip range | 0.3 |", "| KL β | 0.07 |", "| rollouts | 1 |",
        "| top p of NLPO's mask | 0.8 |", "| learning rate | 1e-05 |",
    ):  # fmt: skip
        assert part in card, part
    for part in ("Eq. 5", "p_i", "scored responses", "by source", "ranking loss"):
        assert part not in card, part


def test_the_card_of_a_reward_model(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    base, data = write_model(tmp_path / "base"), write_rows(tmp_path / "d.jsonl", rows(4))
    command = ["reward-model", "--model", str(base), "--data", str(data), "--eval_data", str(data)]
    flags = ["--output", str(tmp_path / "rm"), "--max_steps", "1", "--device", "cpu", "--report_to", "none"]
    assert main([*command, *flags]) == 0
    card = ModelCard.load(write_card(tmp_path / "rm"))
    assert card.data.pipeline_tag == "text-classification"
    for part in (
        "A reward model (`LlamaForSequenceClassification`): of scored", "- queries with a better and a worse response",
        "| loss | −log σ(", "\nHeld-out pairs: ", "--reward FOLDER --output", "AutoModelForSequenceClassification",
    ):  # fmt: skip
        assert part in card.text, part
    settings = json.loads((tmp_path / "rm" / "training-settings.json").read_text())
    for part in ("Eq. 5", "p_i", "language model", "generate", "CausalLM", settings["data"], settings["model"]):
        assert part not in card.text, part


def test_a_card_of_a_model_that_nobody_knows_claims_no_method(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    text = write_card(write_model(tmp_path / "some")).read_text(encoding="utf-8")
    assert f"{MARK}\n\n# some\n\nA language model.\n" in text
    write_encoder(tmp_path / "encoder")
    card = ModelCard.load(write_card(tmp_path / "encoder"))
    assert "\nA model of the class `BertForSequenceClassification`, which scores texts.\n" in card.text
    assert card.data.pipeline_tag == "text-classification"
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    card = ModelCard.load(write_card(tmp_path / "encoder"))
    assert "\nA model of the class `BertModel`.\n" in card.text and card.data.pipeline_tag is None


def test_the_card_of_a_round_has_the_name_of_its_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "mine/rounds/3/model")
    assert "# mine, round 3\n" in model_card(tmp_path / "mine/rounds/3/model")


@pytest.mark.parametrize("chat", [True, False])
def test_the_cards_snippet_runs(chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", chat=chat)
    text = write_card(folder).read_text(encoding="utf-8")
    snippet = text.partition("```python\n")[2].partition("```")[0]
    assert ("apply_chat_template" in snippet) == chat
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["output"].shape[1] > found["inputs"]["input_ids"].shape[1]


def test_a_card_of_an_adapter(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path))
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    with pytest.raises(UserError, match="--merge_adapter"):
        export_gguf(tmp_path, tmp_path / "m.gguf")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model here: give a run folder"):
        write_card(tmp_path)


# --- GGUF ------------------------------------------------------------------------------------------------------------

TEXTS = (
    "Hello  world, it's 2024!\n\n\tHe'll pay 12345 €.",
    "<|im_start|>user\nWhat's that?<|im_end|>\n<|im_start|>assistant\n",
    "naïve café — 你好, привет 🙂",
    " leading and trailing ",
)


@pytest.fixture()
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRHF_CACHE", str(tmp_path / "cache"))


def read_back(path: Path) -> tuple[Any, Any]:
    return load_policy(ModelSettings(str(path), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with merges."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("merging")))


def difference(one: Any, other: Any, length: int = 40) -> float:
    ids = torch.arange(length)[None] % one.config.vocab_size
    with torch.no_grad():
        return float((one(ids).logits - other(ids).logits).abs().max())


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_reads_back_as_the_same_model(family: str, merging: Any, tmp_path: Path) -> None:
    tokenizer = merging
    model = tiny_model(family, len(tokenizer) + 3)  # rows without a token, as padded embeddings have
    if family == "qwen3":  # transformers' reader takes the heads of all Qwen3 files to be of size 128
        from transformers import Qwen3Config, Qwen3ForCausalLM

        model = Qwen3ForCausalLM(Qwen3Config(**{**model.config.to_dict(), "head_dim": 128})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # Qwen2's start at 0, which any order would keep
    save_policy(model, tokenizer, tmp_path / "m")
    path = export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    again, again_tokenizer = read_back(path)
    # To llama.cpp a Mistral is a Llama without a sliding window: the same up to the window's 8 tokens.
    assert again.config.model_type == ("llama" if family == "mistral" else family.removesuffix("-tied"))
    assert difference(model, again, 8 if family == "mistral" else 40) == 0.0
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name]), name
    for text in TEXTS:
        assert again_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert again_tokenizer.chat_template == tokenizer.chat_template
    assert again_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert again_tokenizer.pad_token_id == tokenizer.pad_token_id


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize(("weights", "most"), [("f16", 2e-3), ("bf16", 1e-2), ("q8_0", 5e-2)])
def test_rounded_weights(weights: str, most: float, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = write_model(tmp_path / "m")
    path = export_gguf(folder, tmp_path / "m.gguf", weights)
    model, _ = read_back(folder)
    assert 0 < difference(model, read_back(path)[0]) < most
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == weights.upper()
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.usefixtures("_cache")
def test_rows_that_q8_0_cannot_divide_become_fp16(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4)  # fmt: skip
    save_policy(LlamaForCausalLM(config), tokenizer, tmp_path / "m")
    kinds = {
        t.name: t.tensor_type.name for t in GGUFReader(export_gguf(tmp_path / "m", tmp_path / "m.gguf", "q8_0")).tensors
    }
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")


@pytest.mark.usefixtures("_cache")
def test_the_tokenizer_of_smollm2(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(smollm2_tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    save_policy(model, smollm2_tokenizer, tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        ids = smollm2_tokenizer(text).input_ids
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == smollm2_tokenizer.decode(ids)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == smollm2_tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(tokenizer, name) == getattr(smollm2_tokenizer, name)


def splitting_of(rule: Any, folder: Path) -> str:
    """llama.cpp's name for a tokenizer that cuts texts by ``rule``."""
    from gguf import GGUFReader

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = rule
    save_policy(tiny_model("llama", len(tokenizer)), tokenizer, folder)
    file = GGUFReader(export_gguf(folder, folder / "m.gguf", "f32", overwrite=True))
    return str(file.fields["tokenizer.ggml.pre"].contents())


def test_the_splitting_rules_that_have_a_name(tmp_path: Path) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, Whitespace
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    whole = ByteLevel(add_prefix_space=False)
    assert splitting_of(whole, tmp_path) == "gpt-2"
    assert splitting_of(Sequence([Digits(individual_digits=True), whole]), tmp_path) == "smollm"
    for name in ("llama-bpe", "qwen2"):
        split = Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
        assert splitting_of(Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)]), tmp_path) == name
    for rule in (Whitespace(), Sequence([Whitespace(), whole]), ByteLevel(add_prefix_space=True)):
        with pytest.raises(UserError, match=r"no byte-level BPE.*convert_hf_to_gguf\.py"):
            splitting_of(rule, tmp_path)


def test_a_beginning_token_is_written_down(tmp_path: Path) -> None:
    from gguf import GGUFReader

    for bos in (None, "<s>"):
        tokenizer = tiny_tokenizer(bos=bos)
        save_policy(tiny_model("llama", len(tokenizer)), tokenizer, tmp_path)
        file = GGUFReader(export_gguf(tmp_path, tmp_path / "m.gguf", "f32", overwrite=True))
        assert file.fields["tokenizer.ggml.add_bos_token"].contents() == (bos is not None)
    assert file.fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_token_id


def test_a_sliding_window_cuts_the_context(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = tiny_tokenizer()
    save_policy(tiny_model("mistral", len(tokenizer)), tokenizer, tmp_path)
    fields = GGUFReader(export_gguf(tmp_path, tmp_path / "m.gguf", "f32")).fields
    assert fields["llama.context_length"].contents() == 8


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {}, "the family 'gpt2' is not one of llama, mistral, qwen2, qwen3"),
        ("gemma2", {}, "the family 'gemma2'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"its rotation is scaled \(llama3\)"),
        ("qwen2", {"use_sliding_window": True}, "it uses a sliding window"),
    ],
)
def test_what_cannot_be_exported_is_sent_to_llama_cpp(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    save_policy(tiny_model(family, len(tokenizer)), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message + r".*convert_hf_to_gguf\.py .* --outfile"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_gguf_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    output = tmp_path / "out" / "m.gguf"
    assert main(["publish", str(folder), "--to", "gguf"]) == 2
    assert "--output is missing" in capsys.readouterr().err
    assert main(["publish", str(folder), "--to", "gguf", "--output", str(output), "--type", "q8_0"]) == 0
    first = output.read_bytes()
    assert main(["publish", str(folder), "--to", "gguf", "--output", str(output)]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == first
    assert main(["publish", str(folder), "--to", "gguf", "--output", str(tmp_path / "m.bin")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err


def test_broken_weights_leave_no_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        export_gguf(folder, tmp_path / "out" / "m.gguf")
    assert not list((tmp_path / "out").iterdir())


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload asks for: repositories that are made, and the files of their commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.made: list[dict[str, Any]] = []
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []  # (kind and repository, message, files)
        self.tokens: set[str] = set()
        self.refusal: tuple[int, str] | None = None

    @property
    def files(self) -> dict[str, bytes]:
        """What stands in the one repository after all commits."""
        assert len({commit[0] for commit in self.commits}) == 1
        return {name: content for _, _, files in self.commits for name, content in files.items()}


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.refusal is not None:
            code, error = self.server.refusal
            return self.answer(code, {"error": f"{error} {token}"})
        self.server.tokens.add(token)
        kind, _, rest = self.path.removeprefix("/api/").partition("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.made.append(asked)
            name = f"{asked['organization'] or 'somebody'}/{asked['name']}"
            prefix = "datasets/" if asked.get("type") == "dataset" else ""
            return self.answer(200, {"url": f"{self.server.address}/{prefix}{name}", "name": name})
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in rest:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in rest:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            repository = f"{kind}/{rest.partition('/commit/')[0]}"
            self.server.commits.append((repository, lines[0]["value"]["summary"], files))
            return self.answer(
                200, {"commitUrl": f"{self.server.address}/a/b/commit/1", "commitOid": "1", "success": True}
            )
        return self.answer(404, {"error": f"no {self.path}"})

    def do_GET(self) -> None:
        self.answer(404, {"error": f"no {self.path}"})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, in the place of the real one, and a token in the environment."""
    from huggingface_hub import constants
    from transformers.utils import hub as theirs

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # What HF_ENDPOINT and HF_HUB_OFFLINE set when the library is imported, which it is already.
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(theirs, "_hf_api", None)  # transformers keeps a client; a new one takes the address above
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed_with_what_belongs_to_it(run: Path, hub: Hub) -> None:
    (run / "model" / "checkpoint-1").mkdir(exist_ok=True)
    (run / "model" / "checkpoint-1" / "model.safetensors").write_bytes(b"not this")
    assert push_model(run, "me/better", private=True) == f"{hub.address}/me/better"
    assert hub.made[0]["name"] == "better"
    assert hub.made[0]["organization"] == "me"
    assert hub.made[0].get("private", hub.made[0].get("visibility")) in (True, "private")
    assert [commit[0] for commit in hub.commits] == ["models/me/better"]
    files = hub.files
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", CARD} <= set(files)
    assert not [name for name in files if "/" in name or name.startswith("training") or name.endswith(".bin")]
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert 'name = "me/better"' in files[CARD].decode()
    assert str(run.parent) not in files[CARD].decode()
    assert hub.tokens == {TOKEN}
    write_card(run)


def test_records_are_pushed_as_a_data_set(hub: Hub, tmp_path: Path) -> None:
    import datasets

    source = write_rows(tmp_path / "scored.jsonl", rows(5))
    assert push_records(source, "me/data") == f"{hub.address}/datasets/me/data"
    assert hub.made[0]["type"] == "dataset"
    assert hub.commits[0][0] == "datasets/me/data"
    for name, content in hub.files.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(content)
    assert set(hub.files) == {"README.md", "data/train.parquet"}
    assert list(read_records(tmp_path / "clone" / "data" / "train.parquet")) == list(read_records(source))
    found = datasets.load_dataset(str(tmp_path / "clone"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["responses"][2] == rows(5)[2]["responses"]
    card = (tmp_path / "clone" / "README.md").read_text(encoding="utf-8")
    assert "5 queries with 10 responses" in card
    assert "human 100%" in card
    assert 'load_dataset("me/data", split="train")' in card


def test_what_is_no_data_set_of_records_is_not_published(hub: Hub, tmp_path: Path) -> None:
    """A Parquet file is read as any other, and queries that would come back as JSON text are refused."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"chosen": ["a"], "rejected": ["b"]}), pairs)
    with pytest.raises(UserError, match=r"pairs\.parquet, row 1: .*query"):
        push_records(pairs, "me/data")
    message = {"role": "user", "content": "Who?"}
    named = {"id": "b", "query": [{**message, "name": "Ann", "date": 3}]}
    for suffix in ("jsonl", "parquet"):
        for wrong, said in ((named, "have date, name beside"), ({"id": "b", "query": "Who?"}, "is text, those before")):
            source = tmp_path / f"queries.{suffix}"
            lines = write_rows(tmp_path / "lines.jsonl", [{"id": "a", "query": [message]}, wrong])
            write_records(source, list(read_records(lines)), overwrite=True)
            with pytest.raises(UserError, match=rf"{suffix}, id 'b': its .*{said}"):
                push_records(source, "me/data")
    assert not hub.made
    table = tmp_path / "good.parquet"
    write_records(table, read_records(write_rows(tmp_path / "good.jsonl", rows(3))))
    push_records(table, "me/data")
    (tmp_path / "back.parquet").write_bytes(hub.files["data/train.parquet"])
    assert list(read_records(tmp_path / "back.parquet")) == list(read_records(table))


def test_transformers_own_push_sends_the_model_and_our_card(hub: Hub, tmp_path: Path) -> None:
    base, data = write_model(tmp_path / "base"), write_rows(tmp_path / "d.jsonl", rows(4))
    (tmp_path / "out/windows").mkdir(parents=True)
    write_rows(tmp_path / "out/windows/0.jsonl", rows(1))
    flags = [*train_flags(base, data, tmp_path / "out"), "--save_steps", "1", "--save_total_limit", "1"]
    assert main([*flags, "--push_to_hub", "--hub_model_id", "me/trained"]) == 0
    assert {"model.safetensors", "config.json", "tokenizer.json", CARD} <= set(hub.files)
    assert not [name for name in hub.files if "/" in name or name.startswith("training") or name.endswith(".bin")]
    assert {commit[0] for commit in hub.commits} == {"models/me/trained"}
    assert MARK in hub.files[CARD].decode()
    for card in (hub.files[CARD].decode(), (tmp_path / "out" / CARD).read_text(encoding="utf-8")):
        assert "- records: 4" in card and "Mean training loss" in card and "# trained" in card
    assert hub.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert TOKEN not in "".join(
        path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md")
    )


@pytest.mark.parametrize(
    ("code", "cure"),
    [(401, "hf auth login"), (403, "the token may not write there"), (404, "check --repo"), (500, "the hub refused")],
)
def test_a_refusal_names_the_cure_and_not_the_token(
    code: int, cure: str, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refusal = (code, "you shall not")
    assert main(["publish", str(run), "--to", "hub", "--repo", "me/better"]) == 2
    said = capsys.readouterr()
    assert cure in said.err
    assert f"({code})" in said.err
    assert TOKEN not in said.err + said.out


def test_nobody_answers(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9.*Check the connection"):
        push_model(run, "me/better")


@pytest.mark.parametrize("command", ["train", "reward-model"])
def test_nobody_answers_a_training(
    command: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    base, data = write_model(tmp_path / "base"), write_rows(tmp_path / "d.jsonl", rows(4))
    files = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / "out")]
    flags = [command, *files, "--device", "cpu", "--report_to", "none", "--push_to_hub", "--hub_model_id"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main([*flags, "me/trained"]) == 2
    assert "me/trained: cannot reach http://127.0.0.1:9" in capsys.readouterr().err
    assert main([*flags, "a/b/c"]) == 2
    assert "--hub_model_id a/b/c: " in capsys.readouterr().err


def test_offline(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE .* is set: unset it"):
        push_model(run, "me/better")


def test_no_token(run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="hf auth login"):
        push_model(run, "me/better")
    assert not hub.made


def test_a_name_that_is_none(run: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match=r"--repo a/b/c: .*give USER/NAME"):
        push_model(run, "a/b/c")


def test_the_command_with_its_environment(run: Path, hub: Hub, tmp_path: Path) -> None:
    """As it is used: an own process that is told of the hub and the token by its environment, and imports no torch."""
    code = (
        "import sys; from rrhf.cli.main import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, "publish", str(run / "scored.jsonl"), "--to", "hub", "--repo", "me/data"],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/datasets/me/data"
    assert TOKEN not in done.stdout + done.stderr
    assert hub.tokens == {TOKEN}


# --- several processes -----------------------------------------------------------------------------------------------


def test_accelerate_takes_the_fsdp2_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own path: file → arguments → environment → the plugin that accelerate makes of it."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp import FSDPModule  # noqa: F401 - FSDP2 is there

    path = str(resources.files("rrhf") / "recipes" / "configs" / "accelerate" / "fsdp2.yaml")
    config = load_config_from_file(path)
    assert str(config.distributed_type) == "DistributedType.FSDP"
    assert config.mixed_precision == "bf16"
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", path, "--num_processes", "2", "-m", "rrhf.cli", "train"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP":
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert str(plugin.state_dict_type) == "StateDictType.SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
