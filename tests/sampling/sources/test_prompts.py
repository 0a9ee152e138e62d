"""Queries as tokens before a model is loaded, and responses as an engine hands them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rrhf.common.errors import UserError
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.locate import Location, locate
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import Record
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.prompts import Prompts
from support import tiny

CHAT = [{"role": "user", "content": "The river"}]


def prompts(model: Path, sampling: SamplingSettings | None = None, text: TextSettings | None = None) -> Prompts:
    return Prompts(locate(str(model)), "tiny", sampling or SamplingSettings(max_new_tokens=8), text or TextSettings())


def test_queries_and_end_tokens_are_those_of_the_loaded_model(model: Path, tmp_path: Path) -> None:
    """Also where generation_config.json names an end token that neither the tokenizer nor the template has."""
    folder = tiny.write_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    for place, own in ((model, set()), (folder, {7})):
        ours = prompts(place)
        sampler = Sampler(*load_policy(ModelSettings(str(place), "cpu", "float32")), SamplingSettings())
        for query in ("The river", CHAT):
            assert ours.encode(Record(query)) == sampler.format.encode_query(query)
            assert ours.end_tokens(query) == sampler.end_tokens(Record(query))
            assert own <= ours.end_tokens(query)


def test_a_response_ends_at_an_end_token_or_a_stop_string(model: Path) -> None:
    ours = prompts(model, SamplingSettings(max_new_tokens=8, stop=["old"]))
    end, chat_end = ours.format.end_token("text"), ours.format.end_token(CHAT)
    words = ours.format.tokenizer("The new bridge", add_special_tokens=False).input_ids
    stopped = ours.format.tokenizer("The old bridge", add_special_tokens=False).input_ids
    assert ours.response(words, "text") == ("The new bridge", "length")
    assert ours.response([*words, end], "text") == ("The new bridge", "stop")
    assert ours.response([*words, chat_end], CHAT) == ("The new bridge", "stop")
    assert ours.response([*words, chat_end], "text")[1] == "length"  # ends only an assistant's turn
    assert ours.response(stopped, "text") == ("The ", "stop")
    assert ours.response([], "text") == ("", "length")
    assert ours.response([end], "text") == ("", "stop")


def test_a_query_that_does_not_fit_is_refused_by_its_id(model: Path) -> None:
    long = Record("word " * 130, id="long")
    ours = prompts(model)
    ours.check_query(Record("short", id="short"))
    for refuse in (ours.check_query, ours.encode):
        with pytest.raises(UserError, match=r"record long: a query of \d+ tokens .* give --max_query_length 120"):
            refuse(long)
    cut = prompts(model, text=TextSettings(max_query_length=120))
    cut.check_query(long)
    assert len(cut.encode(long)) == 120
    with pytest.raises(UserError, match="are 129 tokens together, more than the context of 128 of tiny"):
        prompts(model, text=TextSettings(max_query_length=121))
    with pytest.raises(
        UserError, match=r"^--max_new_tokens 128 and a token .* more than the context of 128 of tiny: low"
    ):
        prompts(model, SamplingSettings(max_new_tokens=128))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--model tiny: cannot be loaded"):
        Prompts(Location(str(tmp_path), str(tmp_path)), "tiny", SamplingSettings(), TextSettings())
