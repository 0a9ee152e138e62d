"""The likelihood of texts under a model whose context they may exceed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rrhf.common.errors import UserError
from rrhf.evaluation.perplexity import fit_context, nll_under, refuse_short_context
from rrhf.models import passes
from rrhf.models.load import context_length
from rrhf.models.tokenization import EncodedRecord
from rrhf.records.record import Record
from support import tiny
from support.models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer(eos="<|endoftext|>")  # one token a byte, and one for the end


def encoded(query: list[int], *responses: list[int]) -> EncodedRecord:
    return EncodedRecord("a", query, responses, [None] * len(responses))


def test_a_query_is_cut_from_the_left_until_its_longest_response_fits() -> None:
    fits, long = encoded([1, 2, 3], [4, 5]), encoded([1, 2, 3, 4], [5], [6, 7])
    records = fit_context([fits, long], 5)
    assert [list(record.query) for record in records] == [[1, 2, 3], [2, 3, 4]]
    assert fit_context([fits, long], None) == [fits, long]


def test_a_query_that_is_cut_keeps_its_bos() -> None:
    (record,) = fit_context([encoded([9, 1, 2, 3, 4], [5])], 4, bos=9)
    assert list(record.query) == [9, 3, 4]
    (record,) = fit_context([encoded([9, 1, 2, 3, 4], [5])], 2, bos=9)
    assert list(record.query) == [4]


def test_a_response_that_leaves_no_room_for_its_query_is_refused_with_its_record() -> None:
    with pytest.raises(UserError, match=r"record 'a': a response of 5 tokens .* context of 5 .*--perplexity_model"):
        fit_context([encoded([1], [2] * 5)], 5)


def test_a_row_longer_than_the_context_is_measured_on_what_fits() -> None:
    """gpt2 has learned positions: one past the last is an IndexError."""
    model = tiny_model("gpt2", len(TOKENIZER))
    context = context_length(model)
    assert context == 512
    response = "and so it went on"  # 17 tokens and the end
    query = "".join(chr(97 + i % 26) for i in range(600))
    under = nll_under(model, TOKENIZER, show=False)
    long = under([Record(query=query)], [(response, "stop")])
    cut = under([Record(query=query[-(512 - 18) :])], [(response, "stop")])
    assert cut.queries_cut == 0 and long.queries_cut == 1
    assert (long.nll, long.tokens) == (cut.nll, 18)
    # Where all fits nothing is cut: not even in a row of exactly the context's length.
    both = under([Record(query="a"), Record(query=query)], [(response, "stop")] * 2)
    assert (both.tokens, both.queries_cut) == (36, 1)
    with pytest.raises(UserError, match="a response of 513 tokens"):
        under([Record(query=query)], [("x" * 512, "stop")])


def test_texts_to_one_query_are_read_together_and_what_was_said_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", len(TOKENIZER))
    texts = [("one", "stop"), ("two more", "length"), ("one", "length"), ("one", "stop"), ("", "stop")]
    records = [Record(query=query) for query in ("a b", "a b", "a b", "a b", "c")]
    alone = [nll_under(model, TOKENIZER, show=False)([record], [text]) for record, text in zip(records, texts)]
    said: dict[tuple[str, str, str], tuple[float, int]] = {}
    under = nll_under(model, TOKENIZER, show=False, said=said)
    together = under(records, texts)
    assert [number for number, _ in together.of_text] == pytest.approx([one.nll for one in alone], abs=1e-4)
    assert [tokens for _, tokens in together.of_text] == [4, 8, 3, 4, 1] and together.tokens == 20
    assert len(said) == 4  # the first text came twice
    read: list[EncodedRecord] = []
    forward = passes.response_logprobs
    monkeypatch.setattr(
        passes, "response_logprobs", lambda m, rows, path: (read.extend(rows), forward(m, rows, path))[1]
    )
    again = under([*records, Record(query="c")], [*texts, ("new", "stop")])
    assert again.of_text[:-1] == together.of_text and again.tokens == 24
    assert [len(record.responses) for record in read] == [1]  # the new one alone
    query = "".join(chr(97 + i % 26) for i in range(600))
    short = nll_under(tiny_model("gpt2", len(TOKENIZER)), TOKENIZER, show=False, said=(kept := {}))
    assert short([Record(query=query)] * 2, [("one", "stop"), ("two", "stop")]).queries_cut == 2
    assert not kept  # what was said of a cut query holds for its texts of this call alone


def test_a_perplexity_model_with_a_short_context_is_refused_by_its_configuration_alone(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "judge")
    (folder / "model.safetensors").write_bytes(b"never read")
    refuse_short_context(str(folder), 127)
    with pytest.raises(UserError, match=r"--max_new_tokens 128 do not fit the context of 128 tokens"):
        refuse_short_context(str(folder), 128)
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(UserError, match=r"perplexity model .* cannot be loaded"):
        refuse_short_context(str(folder), 1)
