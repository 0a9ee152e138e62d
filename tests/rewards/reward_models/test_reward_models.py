"""Reward models of every layout against one row at a time through transformers' own classes, and how they are named."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrhf.common.errors import UserError
from rrhf.models import end_states, path_check
from rrhf.models.kernels import reference
from rrhf.models.kernels.choice import KERNELS
from rrhf.records.record import Record
from rrhf.rewards.reward_models.kind import log_odds
from rrhf.rewards.reward_models.passes import length_batches
from rrhf.rewards.scoring import RewardContext, is_provided, make_scorer, reward_digest, score_records
from support.models import tiny_model, tiny_tokenizer
from support.reward_models import bert_tokenizer, write_causal, write_encoder, write_gptj, write_roberta

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = RewardContext(device="cpu", dtype="float32")
TEXTS = [
    Record("why is the sky", [" blue", " not green", "?", " b"], id="a"),
    Record("q", ["a longer answer that goes on", "short"], id="b"),
    Record("another query, a long one", ["yes", "no", "yes and no"], id="c"),
]
CHAT = [Record([{"role": "user", "content": record.query}], record.responses, id=record.id) for record in TEXTS]


def items(records: list[Record]) -> list[tuple[Record, int]]:
    return [(record, index) for record in records for index in range(len(record.responses))]


def close(found: list[float | None], expected: list[float]) -> None:
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3  # a test that can fail


# --- encoders --------------------------------------------------------------------------------------------------------


def lone_logits(model: Any, *texts: str) -> torch.Tensor:
    """One row alone through transformers' class."""
    with torch.no_grad():
        return model(**bert_tokenizer()(*texts, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_an_encoder_scores_pairs_whatever_the_batch(budget: int, tmp_path: Path) -> None:
    model = write_encoder(tmp_path)
    context = RewardContext(device="cpu", dtype="float32", max_tokens_per_forward=budget)
    expected = {
        (r.id, i): float(lone_logits(model, r.query, text)) for r in TEXTS for i, text in enumerate(r.responses)
    }
    for seed in range(2):  # in another order, records torn apart
        asked = items(TEXTS)
        random.Random(seed).shuffle(asked)
        close(make_scorer(str(tmp_path), context)(asked), [expected[r.id, i] for r, i in asked])


def test_weights_are_laid_out_once_for_all_batches_but_not_while_they_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_encoder(tmp_path)
    context = RewardContext(device="cpu", dtype="float32", max_tokens_per_forward=1)  # a row a batch
    scorer: Any = make_scorer(str(tmp_path), context)
    scorer(items(TEXTS))
    asked: list[tuple[int, int]] = []
    packed = KERNELS["cpu"].packed
    monkeypatch.setattr(
        KERNELS["cpu"], "packed", lambda model, rows, steps: asked.append((rows, steps)) or packed(model, rows, steps)
    )
    scorer(items(TEXTS))
    assert asked == [(1, len(items(TEXTS)))]
    rows = [row for record in TEXTS for row in scorer.model.encode(record, range(len(record.responses)))]
    scorer.model.compute(rows, 1).sum().backward()
    assert len(asked) == 1


def test_messages_reach_an_encoder_without_a_template_as_text(tmp_path: Path) -> None:
    model = write_encoder(tmp_path)
    found = make_scorer(str(tmp_path), CPU)(items(CHAT))
    close(found, [float(lone_logits(model, f"user: {r.query}", text)) for r in TEXTS for text in r.responses])


def test_of_several_labels_one_must_be_named(tmp_path: Path) -> None:
    model = write_encoder(tmp_path, {0: "NEGATIVE", 1: "POSITIVE"})
    with pytest.raises(UserError, match=r"2 labels \(NEGATIVE, POSITIVE\): say which .*#POSITIVE"):
        make_scorer(str(tmp_path), CPU)
    with pytest.raises(UserError, match=r"no label 'POSITIV': did you mean 'POSITIVE'"):
        make_scorer(f"{tmp_path}#POSITIV", CPU)
    # A classifier reads one text; two labels' log-odds are the difference of their logits.
    logits = [lone_logits(model, r.query + text) for r in TEXTS for text in r.responses]
    close(make_scorer(f"{tmp_path}#POSITIVE", CPU)(items(TEXTS)), [float(z[1] - z[0]) for z in logits])
    close(make_scorer(f"model:{tmp_path}#0", CPU)(items(TEXTS)), [float(z[0] - z[1]) for z in logits])


def test_of_several_values_each_stands_for_itself(tmp_path: Path) -> None:
    model = write_encoder(tmp_path, {0: "helpful", 1: "verbose"})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": "regression"}))
    logits = [lone_logits(model, r.query + text) for r in TEXTS for text in r.responses]
    close(make_scorer(f"{tmp_path}#helpful", CPU)(items(TEXTS)), [float(z[0]) for z in logits])


def test_a_classifier_without_a_template_reads_messages_as_turns(tmp_path: Path) -> None:
    model = write_encoder(tmp_path, {0: "NEGATIVE", 1: "POSITIVE"})
    found = make_scorer(f"{tmp_path}#POSITIVE", CPU)(items(CHAT))
    logits = [lone_logits(model, f"user: {r.query}\n\nassistant: {text}") for r in TEXTS for text in r.responses]
    close(found, [float(z[1] - z[0]) for z in logits])


def test_a_label_of_a_model_that_has_none_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    with pytest.raises(UserError, match="has one score and no labels: leave #GOOD out"):
        make_scorer(f"{tmp_path}#GOOD", CPU)


def test_log_odds_of_three_labels() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0], [60.0, 0.0, 0.0]])
    p = torch.softmax(logits.double(), dim=1)[:, 0]
    odds = log_odds(logits, 0)
    assert float(odds[0]) == pytest.approx(float(torch.log(p[0] / (1 - p[0]))))
    assert float(odds[1]) == pytest.approx(60 - torch.log(torch.tensor(2.0)).item())  # P alone would be 1
    assert log_odds(logits, 1, independent=True).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("query", ["q" * 40, "q"])
def test_rows_longer_than_the_context_are_cut_from_the_left_and_counted(
    query: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("rrhf"), "propagate", True)
    model = write_encoder(tmp_path, context=24)
    records = [Record(query, ["short", "0123456789abcdefghijklmnop"])]
    scorer = make_scorer(str(tmp_path), CPU)
    found = scorer(items(records))
    scorer.close()
    # 24 tokens with [CLS], [SEP], [SEP]: of the query what room is left, of a response alone its end.
    rows = [(query[-16:], "short"), ("", "0123456789abcdefghijklmnop"[-21:])]
    close(found, [float(lone_logits(model, *row)) for row in rows])
    cut = 2 if len(query) > 16 else 1
    assert "its context is 24 tokens; longer rows are cut from the left" in caplog.text
    assert f"{cut} of 2 rows were longer than its context of 24 tokens and were cut from the left" in caplog.text


@pytest.mark.parametrize("head", ["classifier", "classifier.out_proj"])
def test_the_head_of_an_encoder_in_bfloat16_is_multiplied_in_fp32(head: str, tmp_path: Path) -> None:
    """Responses whose logits lie near each other keep their order; bfloat16 has 8 bits for all of them."""
    (write_encoder if head == "classifier" else write_roberta)(tmp_path)
    record = Record("why", ["a" * length for length in range(1, 33)])
    scorer = make_scorer(str(tmp_path), RewardContext(device="cpu", dtype="bfloat16"))
    found = scorer(items([record]))
    assert len(set(found)) == 32
    assert sum(float(torch.tensor(score).bfloat16()) == score for score in found) < 8
    stored = load_file(tmp_path / "model.safetensors")[f"{head}.weight"]
    assert stored.dtype == torch.float32 and torch.equal(scorer.model.model.get_submodule(head).weight, stored)


def test_of_a_roberta_no_more_tokens_are_read_than_it_has_positions_for(tmp_path: Path) -> None:
    """Its table of positions begins behind the padding's number, 0 here."""
    model = write_roberta(tmp_path, context=24)
    scorer = make_scorer(str(tmp_path), CPU)
    found = scorer(items([Record("q" * 40, ["short", "longer"])]))
    assert scorer.model.reader.context == 23
    close(found, [float(lone_logits(model, "q" * (20 - len(text)), text)) for text in ("short", "longer")])


# --- causal models ---------------------------------------------------------------------------------------------------


def row(query: Any, response: str, end: bool = True) -> list[int]:
    """Ids of a query and a response as a causal reward model reads them."""
    tokenizer = tiny_tokenizer()
    if isinstance(query, str):
        return [*tokenizer(query + response).input_ids, tokenizer.eos_token_id]
    text = tokenizer.apply_chat_template([*query, {"role": "assistant", "content": response}], tokenize=False)
    text = text.rstrip("\n") if end else text  # as OpenRLHF's rows end
    return [*tokenizer(text).input_ids, *[tokenizer.eos_token_id] * end]


@torch.no_grad()
def at_the_end(decoder: Any, head: Any, ids: list[int]) -> float:
    return float(head(decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]))


@pytest.mark.parametrize("records", [TEXTS, CHAT], ids=["text", "messages"])
@pytest.mark.parametrize(
    "head, bias, settings",
    [
        ("score", False, {}),  # OpenRLHF
        ("value_head", False, {"value_head_prefix": "value_head"}),
        ("v_head.summary", True, {}),  # TRL
    ],
)
def test_heads_of_other_trainers(
    head: str, bias: bool, settings: dict[str, Any], records: list[Record], tmp_path: Path
) -> None:
    model, linear = write_causal(tmp_path, "llama", head, bias, **settings)
    found = make_scorer(str(tmp_path), CPU)(items(records))
    close(found, [at_the_end(model.model, linear, row(r.query, text)) for r in records for text in r.responses])


def test_where_a_template_ends_a_turn_with_the_end_token_no_second_one_is_read(tmp_path: Path) -> None:
    model, linear = write_causal(tmp_path, "llama", "score")
    tokenizer = tiny_tokenizer(eos="<|im_end|>")  # ChatML's turns end in <|im_end|> and a line break
    tokenizer.save_pretrained(tmp_path)
    found = make_scorer(str(tmp_path), CPU)(items(CHAT))
    rows = [row(r.query, text, end=False)[:-1] for r in CHAT for text in r.responses]
    assert {ids[-1] for ids in rows} == {tokenizer.eos_token_id}
    close(found, [at_the_end(model.model, linear, ids) for ids in rows])


def test_openrlhf_rewards_are_normalised_where_the_configuration_says_so(tmp_path: Path) -> None:
    model, linear = write_causal(tmp_path, "qwen2", "score", normalize_reward=True, mean=0.5, std=2.0)
    found = make_scorer(str(tmp_path), CPU)(items(TEXTS))
    raw = [at_the_end(model.model, linear, row(r.query, text)) for r in TEXTS for text in r.responses]
    close(found, [(value - 0.5) / 2 for value in raw])


@pytest.mark.parametrize("budget", [1, 70, 10_000])
@pytest.mark.parametrize("records", [TEXTS, CHAT], ids=["text", "messages"])
def test_a_causal_classification_model_is_read_where_transformers_reads_it(
    records: list[Record], budget: int, tmp_path: Path
) -> None:
    """Padding is the end token here, as in many models: transformers' class then reads the token before it."""
    from transformers import LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    config = tiny_model("llama", len(tokenizer)).config
    config.num_labels, config.pad_token_id = 1, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    context = RewardContext(device="cpu", dtype="float32", max_tokens_per_forward=budget)
    found = make_scorer(str(tmp_path), context)(items(records))
    with torch.no_grad():
        rows = [row(r.query, text, end=False) for r in records for text in r.responses]
        close(found, [float(model(torch.tensor([ids])).logits) for ids in rows])


def at_the_first_end(decoder: Any, head: Any, ids: list[int]) -> float:
    """How the code that came with gptj-rm-static reads a score: at the first end token of the row."""
    with torch.no_grad():
        values = head(decoder(input_ids=torch.tensor([ids])).last_hidden_state)[0, :, 0]
    return float(values[ids.index(0)])


@pytest.mark.parametrize("named", ["", "hf_ckpt.pt"])
def test_the_layout_of_gptj_rm_static(named: str, tmp_path: Path) -> None:
    decoder, head = write_gptj(tmp_path)
    scorer = make_scorer(str(tmp_path / named), CPU)
    expected = [at_the_first_end(decoder, head, row(r.query, text)) for r in TEXTS for text in r.responses]
    close(scorer(items(TEXTS)), expected)
    assert scorer.model.path == "tree"


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_nothing_but_weights_is_unpickled(tmp_path: Path) -> None:
    write_gptj(tmp_path)
    (tmp_path / "hf_ckpt.pt").write_bytes(pickle.dumps({"v_head.weight": Runs(tmp_path / "ran")}, protocol=2))
    torch.save({"v_head.weight": Runs(tmp_path / "ran")}, tmp_path / "zipped.pt")
    for name in ("hf_ckpt.pt", "zipped.pt"):
        with pytest.raises(UserError, match="no checkpoint of weights alone"):
            make_scorer(str(tmp_path / name), CPU)(items(TEXTS))
    assert not (tmp_path / "ran").exists()


def test_a_raw_checkpoint_needs_its_configuration_and_all_weights(tmp_path: Path) -> None:
    write_gptj(tmp_path)
    state = torch.load(tmp_path / "hf_ckpt.pt", weights_only=True)
    del state["transformer.h.1.attn.q_proj.weight"]
    torch.save(state, tmp_path / "hf_ckpt.pt")
    with pytest.raises(UserError, match=r"weights are missing.*h\.1\.attn\.q_proj\.weight"):
        make_scorer(str(tmp_path), CPU)(items(TEXTS))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config.json: put the configuration .*EleutherAI/gpt-j-6B"):
        make_scorer(str(tmp_path), CPU)


def test_other_pickled_weights_are_read_only_where_the_file_is_named(tmp_path: Path) -> None:
    decoder, head = write_gptj(tmp_path)
    (tmp_path / "hf_ckpt.pt").rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match="pickled weights are not read"):
        make_scorer(str(tmp_path), CPU)
    found = make_scorer(str(tmp_path / "other.pt"), CPU)(items(TEXTS[:1]))
    close(found, [at_the_first_end(decoder, head, row(TEXTS[0].query, text)) for text in TEXTS[0].responses])


def test_a_causal_model_cuts_rows_from_the_left_behind_its_first_token(tmp_path: Path) -> None:
    model, linear = write_causal(tmp_path, "llama", "score", max_position_embeddings=12)
    tiny_tokenizer(bos="<s>").save_pretrained(tmp_path)
    scorer = make_scorer(str(tmp_path), CPU)
    records = [Record("0123456789abcdefghij", ["xyz", "w"])]
    found = scorer(items(records))
    begin = tiny_tokenizer().convert_tokens_to_ids("<s>")
    rows = [[begin, *row(records[0].query, text)[-11:]] for text in records[0].responses]
    close(found, [at_the_end(model.model, linear, ids) for ids in rows])
    assert scorer.model.reader.cut == 2


# --- the shared query ------------------------------------------------------------------------------------------------

SIX = [Record("a query that all six responses share " * 2, [f" response {'x' * i}" for i in range(6)], id="six")]


def test_six_responses_share_their_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of one row a response, from a forward pass over the query's tokens once."""
    model, linear = write_causal(tmp_path, "llama", "score")
    scorer = make_scorer(str(tmp_path), CPU)
    widths: list[int] = []
    original = end_states.lay_out

    def counted(*args: Any) -> Any:
        forest = original(*args)
        widths.append(forest.input_ids.numel())
        return forest

    scorer(items(SIX))  # the check of the path
    monkeypatch.setattr(end_states, "lay_out", counted)
    found = scorer(items(SIX))
    rows = [row(SIX[0].query, text) for text in SIX[0].responses]
    close(found, [at_the_end(model.model, linear, ids) for ids in rows])
    shared = len(SIX[0].query) + len(" response ")
    assert widths == [shared + sum(len(ids) - shared for ids in rows)]
    assert scorer.model.path == "tree"


def test_a_family_without_trees_is_computed_in_padded_rows(tmp_path: Path) -> None:
    model, linear = write_causal(tmp_path, "bloom", "score")
    for budget in (1, 300, 5000):
        context = RewardContext(device="cpu", dtype="float32", max_tokens_per_forward=budget)
        scorer = make_scorer(str(tmp_path), context)
        rows = [row(r.query, text) for r in [*SIX, *TEXTS] for text in r.responses]
        close(scorer(items([*SIX, *TEXTS])), [at_the_end(model.transformer, linear, ids) for ids in rows])
        assert scorer.model.path == "padded"


def test_a_check_that_fails_or_cannot_decide_refuses_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").model
    assert path_check.usable_path(model, 0, path_check.END_STATES) == "tree"
    with monkeypatch.context() as patched:
        patched.setattr(path_check, "tree_end_states", lambda *_: 1 / 0)
        assert path_check.usable_path(model, 0, path_check.END_STATES) == "padded"
    visible = reference.visible

    def one_cell_too_many(ends: torch.Tensor, positions: torch.Tensor, window: int | None = None) -> torch.Tensor:
        seen = visible(ends, positions, window)
        seen[-1, 5] = True  # the last response's end reads the first response's first token
        return seen

    monkeypatch.delitem(KERNELS, "cpu")
    assert path_check.usable_path(model, 0, path_check.END_STATES) == "tree"
    monkeypatch.setattr(reference, "visible", one_cell_too_many)
    assert path_check.usable_path(model, 0, path_check.END_STATES) == "padded"


# --- names, faults, digests ------------------------------------------------------------------------------------------


def test_a_model_is_a_reward_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoder(tmp_path / "rm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "provided").mkdir()  # a kind's name stays the kind's
    assert is_provided("provided") and not is_provided("rm")
    scored = list(score_records(TEXTS, ["rm", "model:rm"], weights=[2, -1], context=CPU))
    for record in scored:
        assert record.rewards["rm"] == record.rewards["model:rm"]
        assert record.scores == pytest.approx(record.rewards["rm"])


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"has neither a classification head .* give --reward logprob:{tmp_path}"):
        make_scorer(str(tmp_path), CPU)


def test_a_head_that_was_never_trained_is_not_made_up(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing .*classifier\.weight"):
        make_scorer(str(tmp_path), CPU)(items(TEXTS))


def test_names_of_nothing_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        make_scorer(str(tmp_path / "nothing"), CPU)
    with pytest.raises(UserError, match="reward model nobody/nothing: its configuration cannot be read"):
        make_scorer("nobody/nothing", CPU)
    with pytest.raises(UserError, match="no folder of that name is here"):
        make_scorer("nobody/nothing", CPU)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is an adapter alone"):
        make_scorer(str(tmp_path), CPU)


def test_the_digest_follows_weights_label_and_type(tmp_path: Path) -> None:
    write_encoder(tmp_path / "rm", {0: "a", 1: "b"})
    write_gptj(tmp_path / "raw")
    name, raw = str(tmp_path / "rm"), str(tmp_path / "raw")
    half = RewardContext(device="cpu", dtype="bfloat16")
    digests = [reward_digest(f"{name}#a", CPU), reward_digest(f"{name}#b", CPU), reward_digest(f"{name}#a", half)]
    digests.append(reward_digest(raw, CPU))
    assert digests[0] == reward_digest(f"model:{name}#a", CPU)
    for folder, file in (("rm", "model.safetensors"), ("raw", "hf_ckpt.pt")):
        place = tmp_path / folder / file
        place.write_bytes(place.read_bytes()[:-1] + b"\1")
    digests += [reward_digest(f"{name}#a", CPU), reward_digest(raw, CPU)]
    assert len(set(digests)) == 6


def test_batches_are_of_similar_length_and_within_the_budget() -> None:
    lengths = [3, 9, 4, 20, 8, 3]
    assert length_batches(lengths, 18) == [[3], [1, 4], [2, 0, 5]]
