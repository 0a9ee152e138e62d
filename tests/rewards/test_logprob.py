"""Log-probabilities as rewards and as columns: against a row and a forward each, whatever else is asked for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oracles.logprobs import response_sum
from rrhf.common.errors import UserError
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.logprob import LogprobModel, ResponseSums, fill_sums, reference_sums_name
from rrhf.rewards.scoring import Rewards, reward_digest, score_records
from support.logprobs import flat, naive, records, settings
from support.models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = RewardContext(device="cpu", dtype="float32")


def test_the_mean_and_the_sum_are_those_of_rows_of_their_own(rho: Path) -> None:
    names = [f"logprob:{rho}", f"logprob-sum:{rho}"]
    scored = list(score_records(records(), names, context=CPU, batch_size=3))
    expected = flat(naive(rho))
    assert flat([record.rewards[names[0]] for record in scored]) == pytest.approx(
        [s / n for s, n in expected], abs=1e-5
    )
    assert flat([record.rewards[names[1]] for record in scored]) == pytest.approx([s for s, _ in expected], abs=1e-4)


def test_scores_do_not_depend_on_the_batch(rho: Path) -> None:
    name = f"logprob:{rho}"
    together = list(score_records(records(), [name], context=CPU))
    for options in ({"batch_size": 1}, {"context": replace(CPU, max_tokens_per_forward=20)}):
        alone = list(score_records(records(), [name], **{"context": CPU, **options}))  # type: ignore[arg-type]
        for one, other in zip(together, alone, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_with_a_reference_the_score_is_the_difference(rho: Path, pi: Path) -> None:
    context = replace(CPU, reference_model=str(rho))
    scored = list(score_records(records(), [f"logprob:{pi}", f"logprob-sum:{pi}"], context=context))
    pairs = list(zip(flat(naive(pi)), flat(naive(rho)), strict=True))
    means, sums = (flat([record.rewards[f"{kind}:{pi}"] for record in scored]) for kind in ("logprob", "logprob-sum"))
    assert means == pytest.approx([(s - t) / n for (s, n), (t, _) in pairs], abs=1e-5)
    assert sums == pytest.approx([s - t for (s, _), (t, _) in pairs], abs=1e-4)
    assert any(abs(value) > 0.01 for value in sums)


# --- columns of sums -------------------------------------------------------------------------------------------------


def test_sums_are_computed_once_and_only_where_they_are_missing(rho: Path, asked: list[int]) -> None:
    name = reference_sums_name(str(rho))
    model = LogprobModel(settings(rho))
    first = fill_sums(records(), name, model)
    assert flat([record.rewards[name] for record in first]) == pytest.approx([s for s, _ in flat(naive(rho))], abs=1e-4)
    assert sum(asked) == sum(len(record.responses) for record in first)
    asked.clear()
    assert fill_sums(first, name, model) == first
    assert asked == []
    # A response that was drawn later has none yet; the reward by the sum takes those that are there.
    longer = first[0].with_responses(["new"], ["stop"], ["top-p/0"])
    (filled,) = fill_sums([longer], name, model)
    assert asked == [1] and None not in filled.rewards[name]
    asked.clear()
    list(score_records([filled], [f"logprob-sum:{rho}"], context=CPU))
    assert asked == []


def test_the_name_follows_the_weights_and_what_changes_the_tokens(rho: Path, pi: Path, tmp_path: Path) -> None:
    copied = tmp_path / "rho"
    shutil.copytree(rho, copied)
    assert reference_sums_name(str(copied)) == reference_sums_name(str(rho))
    names = {
        reference_sums_name(str(pi)),
        reference_sums_name(str(rho)),
        reference_sums_name(str(rho), TextSettings(max_query_length=5)),
        reference_sums_name(str(rho), max_length=5),
    }
    assert len(names) == 4
    assert all(name.startswith(("logprob-sum:rho#", "logprob-sum:pi#")) for name in names)
    assert reference_sums_name(str(rho), TextSettings()) in names
    with pytest.raises(UserError, match="cannot be found"):
        reference_sums_name(str(tmp_path / "nothing" / "here"))
    assert reward_digest(f"logprob:{rho}", CPU) != reward_digest(f"logprob:{pi}", CPU)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_responses_are_cut_as_training_cuts_them(rho: Path) -> None:
    text, limit = TextSettings(max_query_length=4), 12
    name = reference_sums_name(str(rho), text, limit)
    given = fill_sums(records(), name, LogprobModel(settings(rho), text, max_length=limit))
    expected = flat(naive(rho, text, limit))
    assert min(n for _, n in expected) < 8 == max(n for _, n in expected)
    assert flat([record.rewards[name] for record in given]) == pytest.approx([s for s, _ in expected], abs=1e-4)


def test_what_leaves_no_token_is_not_scored() -> None:
    sums = ResponseSums(tiny_model("llama", 300), tiny_tokenizer(), max_length=6)
    record = Record(query="abcdef", responses=["x", ""], finish=["stop", "length"])
    assert sums([(record, 0), (record, 1)]) == [None, None]
    assert sums.counts["responses without room"] == 1  # the other had no token to lose
    assert sums([]) == []


def test_a_query_beyond_the_context_loses_its_beginning_and_only_for_the_response_that_needs_it() -> None:
    model, tokenizer = tiny_model("llama", 300), tiny_tokenizer()
    model.config.max_position_embeddings = 20
    record = Record(query="abcdefghij" * 2, responses=["xy", "x" * 9, "x" * 30], finish=["length"] * 3)
    sums = ResponseSums(model, tokenizer)
    found = sums([(record, index) for index in range(3)])
    with torch.no_grad():
        query = tokenizer(record.query).input_ids
        responses = [tokenizer(response).input_ids for response in record.responses]
        expected = [
            float(response_sum(model, query[-room:], response[: 20 - room]))
            for room, response in zip((18, 11, 1), responses, strict=True)
        ]
    assert [logprob and logprob.sum for logprob in found] == pytest.approx(expected, abs=1e-4)
    assert [logprob and logprob.length for logprob in found] == [2, 9, 19]
    assert sums.counts == {"queries cut from the left": 3, "responses cut": 1}


def test_broken_weights_name_the_record() -> None:
    model = tiny_model("llama", 300)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    sums = ResponseSums(model, tiny_tokenizer())
    with pytest.raises(UserError, match=r"record 'broken' the log-probability nan"):
        sums([(Record(query="a", responses=["b"], id="broken"), 0)])


@pytest.mark.parametrize("name", ["logprob:./nowhere", "logprob:", "logprob-sum:"])
def test_a_model_that_is_not_there_is_refused_before_any_work(name: str) -> None:
    with pytest.raises(UserError, match=r"no such folder|names no model"):
        Rewards([name], context=CPU)
