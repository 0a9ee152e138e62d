"""``rrhf reward-model``: it learns an order, its folder is a reward at once, and a killed training ends as if whole."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.common.errors import UserError
from rrhf.models.load import ModelSettings
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.scoring import RewardContext, make_scorer
from rrhf.training.reward_model.config import RewardModelConfig
from rrhf.training.reward_model.data import RankedRecords
from rrhf.training.reward_model.stage import train_reward_model, trainable
from rrhf.training.reward_model.trainer import RewardTrainer
from support import tiny
from support.models import tiny_model, tiny_tokenizer
from support.reward_models import bert_tokenizer, write_encoder, write_roberta
from support.tiny import die

pytestmark = pytest.mark.usefixtures("one_thread")

UPDATE = "accelerate.optimizer:AcceleratedOptimizer.step"


def config(folder: Path, **options: Any) -> RewardModelConfig:
    return RewardModelConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        **{"learning_rate": 3e-3, "num_train_epochs": 4, "per_device_train_batch_size": 4,
           "gradient_accumulation_steps": 1, "seed": 1, **options},
    )  # fmt: skip


def lists(folder: Path) -> tuple[Path, Path]:
    """Lists of four in which more z are better, and pairs of messages beside them; to train on, and held out."""
    pairs = [{**row, "id": f"m{row['id']}"} for row in tiny.rows(4, messages=True)]
    made = [_with_z(row) for row in [*tiny.rows(10, responses=4), *pairs]]
    for row in made[1::3]:
        row["scores"][0] = row["scores"][1]  # ties
    made[2]["scores"] = [None, None, 1.0, 2.0]
    made[3]["scores"] = [1.0] * 4
    held_out = [_with_z({**row, "query": f"new {row['query']}"}) for row in tiny.rows(6, responses=4)]
    return tiny.write_rows(folder / "lists.jsonl", made), tiny.write_rows(folder / "held-out.jsonl", held_out)


def _with_z(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "responses": [f" {'a' * (6 - 2 * j)}{'z' * 2 * j}" for j in range(len(row["responses"]))]}


@pytest.mark.parametrize("backbone", ["llama", "bert"])
def test_it_learns_the_order_and_its_folder_is_a_reward(backbone: str, tmp_path: Path) -> None:
    if backbone == "llama":
        tiny.write_model(tmp_path / "base")
    else:
        write_encoder(tmp_path / "base", context=128, spread=0.1)
    data, held_out = lists(tmp_path)
    settings = config(tmp_path / "rm", num_train_epochs=4 if backbone == "llama" else 8)
    measures = train_reward_model(
        data, ModelSettings(str(tmp_path / "base"), "cpu", "float32"), settings, eval_data=held_out
    )
    found = measures["held_out"]
    assert found["accuracy"]["low"] > 0.6 and found["kendall_tau"]["mean"] > 0.5
    assert (measures["queries"], measures["skipped"]) == (11, {"equal scores alone": 3})
    assert measures["path"] == ("tree" if backbone == "llama" else "whole rows")
    kept = json.loads((tmp_path / "rm" / "reward-model.json").read_text(encoding="utf-8"))
    assert kept == measures and "<svg" in (tmp_path / "rm" / "calibration.svg").read_text(encoding="utf-8")
    assert not list((tmp_path / "rm").glob("checkpoint-*"))
    assert len({file.stat().st_mode for file in (tmp_path / "rm").iterdir()}) == 1  # whoever may read one file, may all

    # The folder gives the rewards that were measured, and transformers reads the same from it.
    records = list(read_records(held_out))
    scorer = make_scorer(str(tmp_path / "rm"), RewardContext(device="cpu", dtype="float32"))
    rewards = scorer([(record, index) for record in records for index in range(4)])
    accurate = [rewards[4 * n + j] > rewards[4 * n + i] for n in range(6) for i in range(4) for j in range(i + 1, 4)]
    assert sum(accurate) / len(accurate) == pytest.approx(found["accuracy"]["mean"])
    if backbone == "llama":
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
        texts = [str(records[0].query) + text + tokenizer.eos_token for text in records[0].responses]
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        with torch.no_grad():
            logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
        assert rewards[:4] == pytest.approx(logits.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="holds a finished model"):
        train_reward_model(data, ModelSettings(str(tmp_path / "base"), "cpu", "float32"), config(tmp_path / "rm"))


def test_trees_give_the_gradients_of_padded_rows() -> None:
    """Rewards and gradients of the head and the embeddings, one row a response, to 1e-5."""
    tokenizer = tiny_tokenizer()
    model = _classifier(tokenizer)
    reward = trainable(model, tokenizer, 128)
    assert reward.reader.unread != tokenizer.eos_token_id
    rows = [row for record in _records(3) for row in reward.encode(record, range(len(record.responses)))]
    found = []
    for path in ("tree", "padded"):
        reward.path = path
        model.zero_grad()
        rewards = reward.compute(rows, 40)
        (rewards[:, 0] * torch.arange(1.0, len(rewards) + 1)).sum().backward()
        found.append((rewards.detach(), model.score.weight.grad.clone(), model.model.embed_tokens.weight.grad.clone()))
    for tree, padded in zip(*found, strict=True):
        assert float(padded.abs().max()) > 1e-3
        torch.testing.assert_close(tree, padded, atol=1e-5, rtol=1e-4)


def _classifier(tokenizer: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    settings = tiny_model("llama", len(tokenizer)).config
    settings.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(settings)


def _records(count: int) -> list[Any]:
    from rrhf.records.record import record_from_row

    return [record_from_row(row, "here", "scores") for row in tiny.rows(count, responses=4)]


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_rows_that_are_too_long_are_cut_together_and_still_share_their_query(bos: str) -> None:
    tokenizer = tiny_tokenizer(bos=bos) if bos else tiny_tokenizer()
    reader = trainable(_classifier(tokenizer), tokenizer, 12).reader
    begin = [tokenizer.bos_token_id] if bos else []

    def read(*responses: str) -> tuple[list[str], list[list[int]]]:
        rows = reader.encode(Record("0123456789", list(responses)), range(len(responses)))
        return (
            [tokenizer.decode(row.query[len(begin) :]) for row in rows],
            [[*row.query, *part] for row in rows for part in row.responses],
        )

    def ids(text: str) -> list[int]:
        return [*begin, *[i for i in tokenizer(text).input_ids if i not in begin], tokenizer.eos_token_id]

    # 12 tokens with what begins and ends a row: the longest row decides what all of them lose.
    shared, rows = read("abcdef", "xy")
    kept = "0123456789"[-5 + len(begin) :]
    assert shared == [kept] and rows == [ids(f"{kept}abcdef"), ids(f"{kept}xy")]
    assert reader.cut == 2
    # A response that alone is too long is cut; the other keeps its own, and the last token that both had.
    shared, rows = read("abcdefghijklmno", "xy")
    assert rows[0] == ids("abcdefghijklmno"[-11 + len(begin) :])
    assert rows[1] == ids("9xy") or (bos and rows[1] == ids("xy"))
    _, rows = read("a", "b")
    assert rows == [ids(f"{'0123456789'[-10 + len(begin) :]}{text}") for text in "ab"]


def test_held_out_scores_that_a_margin_makes_equal_are_left_out_of_the_loss_alone(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    model = write_encoder(tmp_path, context=128)
    reward = trainable(model, tokenizer, 128)
    near, far = (Record("q", [" a", " bcd"], scores=[0.1, score], id=str(score)) for score in (0.2, 0.9))
    settings = config(tmp_path / "rm", ties="margin:0.5")
    trainer = RewardTrainer(model, reward, settings, RankedRecords([far], reward, "margin:0.5"), None, tokenizer)
    both, alone, none = (trainer.evaluate(RankedRecords(held, reward)) for held in ([near, far], [far], [near]))
    assert both["eval_loss"] == alone["eval_loss"] and math.isnan(none["eval_loss"])
    assert both["eval_accuracy"] == none["eval_accuracy"] in (0.0, 1.0)


def test_a_loss_that_is_scaled_is_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bert_tokenizer()
    model = write_encoder(tmp_path, context=128)
    reward = trainable(model, tokenizer, 128)
    data = RankedRecords([Record("q", [" a", " bcd"], scores=[0.1, 0.9], id="r")], reward, "none")
    trainer = RewardTrainer(model, reward, config(tmp_path / "rm"), data, None, tokenizer)
    monkeypatch.setattr(RewardModelConfig, "device", torch.device("meta"))
    assert trainer.compute_loss(model, data.records).device.type == "cpu"
    monkeypatch.setattr(trainer.accelerator, "scaler", object())
    assert trainer.compute_loss(model, data.records).device.type == "meta"


def test_rows_of_a_roberta_are_no_longer_than_its_positions(tmp_path: Path) -> None:
    assert trainable(write_roberta(tmp_path, context=24), bert_tokenizer(), 512).reader.context == 23


def test_killed_and_run_again_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "base")
    lists(tmp_path)

    def train(output: str, *more: str, faults: Any = ()) -> tiny.Result:
        return tiny.warm(
            "reward-model", "--model", "base", "--data", "lists.jsonl", "--eval_data", "held-out.jsonl",
            "--output", output, "--device", "cpu", "--dtype", "float32", "--bf16", "false", "--learning_rate", "1e-3",
            "--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
            "--save_steps", "2", "--report_to", "none", "--seed", "5", *more, cwd=tmp_path, faults=faults,
        )  # fmt: skip

    train("whole").done()
    assert train("killed", faults=[die(UPDATE, 6)]).code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "training.json").exists()
    other = train("killed", "--ties", "half")
    assert other.code == 2 and "ties was 'none', is 'half'" in other.err
    resumed = train("killed").done()
    assert "going on from" in resumed.err and "checkpoint-4" in resumed.err

    def weights(output: str) -> bytes:
        return (tmp_path / output / "model.safetensors").read_bytes()

    def measures(output: str) -> Any:
        return json.loads((tmp_path / output / "reward-model.json").read_text(encoding="utf-8"))

    assert weights("killed") == weights("whole")
    assert measures("killed") == measures("whole")


def test_all_faults_of_the_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as fault:
        config(tmp_path, ties="keep", center_rewards=-1.0, max_length=1)
    assert all(flag in str(fault.value) for flag in ("--ties keep", "--center_rewards -1.0", "--max_length 1"))


def test_data_without_a_pair_is_refused(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "base")
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"query": "q", "responses": ["a", "b"], "scores": [1.0, 1.0]}])
    with pytest.raises(UserError, match=r"no pair is left to train on: 0 queries .* 1 skipped: equal scores alone"):
        train_reward_model(data, ModelSettings(str(tmp_path / "base"), "cpu", "float32"), config(tmp_path / "rm"))
    tiny.write_rows(data, [{"query": "q", "responses": ["a", "b"], "scores": [0.0, 1.0]}])  # mended, it is trained on
    settings = config(tmp_path / "rm", num_train_epochs=1)
    assert train_reward_model(data, ModelSettings(str(tmp_path / "base"), "cpu", "float32"), settings)["steps"] == 1
