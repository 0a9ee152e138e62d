"""The reference's sums of a file of records: what is computed, once, of which tokens, and where it is kept."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from oracles.logprobs import record_sums
from rrhf.common.errors import UserError
from rrhf.models.adapters import AdapterSettings, load_policy_or_adapter
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextFormat
from rrhf.records.files import read_records
from rrhf.training import reference as module
from rrhf.training import stage
from rrhf.training.config import RRHFConfig
from rrhf.training.reference import reference_column, with_reference_sums
from support import tiny
from support.models import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tiny.write_model(tmp_path_factory.mktemp("reference") / "model")
    return ModelSettings(str(folder), device="cpu", dtype="float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = tiny.rows(5, responses=3)
    rows[1]["responses"][2] = ""  # dropped, as training does
    rows[2]["scores"] = [0.5, None, 1.0]
    tiny.write_rows(tmp_path / "scored.jsonl", rows)
    return tmp_path / "scored.jsonl"


def config(folder: Path, **options: Any) -> RRHFConfig:
    plain = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 20, "max_query_length": 12}
    return RRHFConfig(output_dir=str(folder / "out"), **{**plain, "ranking_loss": "dpo", **options})


def test_sums_are_of_the_ids_that_training_sees_and_are_kept(
    model: ModelSettings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = config(tmp_path)
    found = with_reference_sums([data], model, args, tmp_path)
    assert found is not None and found.files[data].parent == data.parent and found.files[data] != data
    policy, tokenizer = load_policy_or_adapter(model)
    format = TextFormat(tokenizer, args.text)
    records = list(read_records(found.files[data], require="scores"))
    assert len(records) == 5
    for record in records:
        ids = format.encode_record(record, args.max_length)
        with torch.no_grad():
            assert record.rewards[found.column] == pytest.approx(record_sums(policy, ids).tolist(), abs=1e-4)
    assert format.queries_cut and format.responses_cut  # else the limits showed nothing

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be computed")

    with monkeypatch.context() as patched:
        patched.setattr("rrhf.rewards.logprob.load_policy_or_adapter", refuse)
        assert with_reference_sums([data], model, config(tmp_path, ranking_loss="kto"), tmp_path) == found
        # a file that brings them is taken as it is
        whole = found.files[data]
        again = with_reference_sums([whole], model, args, tmp_path)
        assert again is not None and again.files == {whole: whole}
        assert with_reference_sums([data], model, config(tmp_path, ranking_loss="hinge"), tmp_path) is None
        # other ids, another name
        for other in ({"max_length": 21}, {"max_query_length": 13}):
            assert reference_column(model, config(tmp_path, **other)) != found.column
            with pytest.raises(AssertionError, match="nothing is to be computed"):
                with_reference_sums([data], model, config(tmp_path, **other), tmp_path)


def test_a_reference_with_other_tokens_is_refused(model: ModelSettings, data: Path, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other")
    tiny_tokenizer(eos="<|im_end|>").save_pretrained(other)
    with pytest.raises(UserError, match=r"--reference_model .*other: its tokenizer is not that of the model"):
        with_reference_sums([data], model, config(tmp_path, reference_model=str(other)), tmp_path)
    # another chat template matters where queries are messages
    tokenizer = AutoTokenizer.from_pretrained(model.model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(other)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows[4]["query"] = [{"role": "user", "content": "Hi"}]
    tiny.write_rows(tmp_path / "chat.jsonl", rows)
    for file, refused in ((data, False), (tmp_path / "chat.jsonl", True)):
        with pytest.raises(UserError, match="its chat template is not that") if refused else nullcontext():
            with_reference_sums([file], model, config(tmp_path, reference_model=str(other)), tmp_path)


def test_the_sums_are_of_the_tokens_that_were_drawn(model: ModelSettings, tmp_path: Path) -> None:
    """A text may have another split: training sees what was drawn, and so does the reference."""
    policy, tokenizer = load_policy_or_adapter(model)
    args = config(tmp_path)
    format = TextFormat(tokenizer, args.text)
    text = max(
        (t for t in tokenizer.get_vocab() if t.isascii() and t.isalpha()), key=len
    )  # one token, drawn letter by letter
    drawn = [*tokenizer.convert_tokens_to_ids(list(text)), tokenizer.eos_token_id]
    rows = [{"query": "q", "responses": [text, "x"], "scores": [1, 0], "drawn_tokens": [drawn, None]}]
    tiny.write_rows(tmp_path / "windows.jsonl", rows)
    found = with_reference_sums([tmp_path / "windows.jsonl"], model, args, tmp_path)
    assert found is not None
    (record,) = read_records(found.files[tmp_path / "windows.jsonl"])
    ids = format.encode_record(record, args.max_length)
    assert ids.responses[0] == drawn
    with torch.no_grad():
        assert record.rewards[found.column] == pytest.approx(record_sums(policy, ids).tolist(), abs=1e-4)


def test_a_reference_without_a_tokenizer(model: ModelSettings, data: Path, tmp_path: Path) -> None:
    load_policy_or_adapter(model)[0].save_pretrained(tmp_path / "bare")
    args = config(tmp_path, reference_model=str(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"--reference_model .*bare: cannot be loaded: .*tokenizer"):
        with_reference_sums([data], model, args, tmp_path)


def test_the_reference_is_gone_before_the_policy_comes(
    model: ModelSettings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []

    def models() -> int:
        gc.collect()
        return sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())

    loads, writes = stage._load, module._write
    before = models()

    def loading(job: Any) -> Any:
        alive.append(models())
        return loads(job)

    def writing(*given: Any) -> None:
        writes(*given)
        alive.append(models())

    monkeypatch.setattr(stage, "_load", loading)
    monkeypatch.setattr(module, "_write", writing)
    args = config(tmp_path, max_steps=1, gradient_accumulation_steps=2, eval_steps=1)
    summary = stage.train_model(data, model, args, AdapterSettings(), eval_data=data)
    assert alive[0] > before  # ρ alone
    assert alive[-1] == before  # and then nothing
    settings = json.loads((tmp_path / "out" / "training-settings.json").read_text())
    assert settings["reference_sums"] == reference_column(model, args)
    assert summary["records"] == 5
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_rank_loss" in line for line in history)
