"""OpenVINO as a source. What needs the engine runs with ``make test-engines``."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rrhf.cli.main import main
from rrhf.common.errors import UserError
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import EngineModel
from rrhf.sampling.sources.local import LocalModel
from rrhf.sampling.sources.openvino import OpenVINO
from rrhf.sampling.sources.parsing import parse_source
from support.engines import CAN_CONVERT, answers, convert_for_openvino, differences, river_records, write_engine_model

INSTALLED = importlib.util.find_spec("openvino_genai") is not None
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="OpenVINO GenAI is not installed here: make test-engines")


def sampling(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"policy": "top-p", "max_new_tokens": 8, "seed": 3, **changes})


def test_it_is_written_with_its_folder() -> None:
    source = parse_source("openvino:converted/model@diverse-beam:4")
    assert (source.kind, source.name, source.count) == ("openvino", "converted/model", 4)
    assert source.tag == "model@diverse-beam"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": "beam", "stop": ["\n"]}, "OpenVINO's beams cannot end at --stop strings"),
        ({"policy": "diverse-beam", "temperature": 0.7}, "OpenVINO's beams have no --temperature"),
    ],
)
def test_what_its_beams_cannot_do_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        OpenVINO("anything", sampling(**changes), TextSettings())


@pytest.mark.skipif(INSTALLED, reason="OpenVINO GenAI is installed")
def test_without_the_package_the_cure_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queries = tmp_path / "queries.jsonl"
    write_records(queries, [Record("The river")])
    flags = ["--data", str(queries), "--output", str(tmp_path / "out.jsonl"), "--source", "openvino:folder@top-p:2"]
    assert main(["sample", *flags]) == 2
    with pytest.raises(UserError, match=r"pip install 'rrhf\[openvino\]'"):
        OpenVINO("folder", SamplingSettings(), TextSettings())


# --- with the engine ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine_model(tmp_path_factory.mktemp("openvino") / "model")


@pytest.fixture(scope="module")
def converted(model: Path) -> str:
    """The same model, converted by the command that the documentation gives."""
    if not INSTALLED or not CAN_CONVERT:
        pytest.skip("OpenVINO GenAI and optimum-intel are not installed here: make test-engines")
    return convert_for_openvino(model, model.with_name("converted"), "fp32")


Source = Callable[..., EngineModel]


@pytest.fixture
def source(converted: str) -> Source:
    def make(tag: str = "t", text: TextSettings | None = None, dtype: str = "float32", **changes: Any) -> EngineModel:
        return EngineModel(OpenVINO(converted, sampling(**changes), text, dtype), tag, {})

    return make


def local(model: Path, **changes: Any) -> LocalModel:
    settings = ModelSettings(str(model), "cpu", "float32")
    return LocalModel(settings, sampling(**changes), TextSettings(), "l", PolicyCache())


@needs_openvino
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_draws_depend_on_seed_record_and_number_alone(source: Source, dtype: str) -> None:
    """Seeds count (openvino.genai#3584), and nothing that is decoded beside, with a cache of 8 bits neither."""
    records = river_records(24)
    ours = source(dtype=dtype)
    drawn = answers(ours, records)
    assert len({text for responses in drawn.values() for text, _ in responses}) > 90  # of 96
    assert answers(ours, records) == drawn
    assert differences(drawn, answers(ours, records[::-1])) == 0
    assert differences(drawn, {k: v for r in records[:3] for k, v in answers(ours, [r]).items()}) == 0
    first_two = answers(source(num_responses=2, dtype=dtype), records)
    assert all(first_two[key] == drawn[key][:2] for key in drawn)
    other = source(seed=4, dtype=dtype)
    assert differences(drawn, answers(other, records)) > 90


@needs_openvino
def test_greedy_and_a_cut_nucleus_are_those_of_the_model_itself(source: Source, model: Path) -> None:
    records = river_records(8)
    expected = answers(local(model, policy="greedy"), records)
    assert answers(source(policy="greedy"), records) == expected
    for narrow in ({"policy": "top-p", "top_p": 1e-6}, {"policy": "top-k", "top_k": 1}):
        drawn = answers(source(num_responses=2, **narrow), records)
        assert all(drawn[key] == expected[key] * 2 for key in expected)


@needs_openvino
@pytest.mark.parametrize("policy", ["beam", "diverse-beam"])
def test_beams_are_those_of_the_model_itself(source: Source, model: Path, policy: str) -> None:
    """Of queries none of whose beams ends early: how ended ones are weighed is another matter (docs/sources.md)."""
    records = river_records(12)
    expected = answers(local(model, policy=policy, num_responses=3), records)
    found = answers(source(policy=policy, num_responses=3), records)
    to_the_end = [key for key in expected if all(finish == "length" for _, finish in expected[key] + found[key])]
    assert len(to_the_end) >= 6
    assert [found[key] for key in to_the_end] == [expected[key] for key in to_the_end]


@needs_openvino
def test_stop_strings_and_the_length_of_queries(source: Source) -> None:
    records = river_records(8)
    whole = answers(source(policy="greedy"), records)
    mark = whole["q0"][0][0][2:4]
    cut = answers(source(policy="greedy", stop=[mark]), records)
    assert cut["q0"] == [(whole["q0"][0][0].partition(mark)[0], "stop")]
    counts: Counter[str] = Counter()
    short = source(num_responses=2, text=TextSettings(max_query_length=6))
    assert len(list(short.answer(records, counts))) == 8
    assert counts["queries were cut to --max_query_length 6 (t)"] == 8


@needs_openvino
def test_an_end_token_ends_a_response(source: Source, converted: str, tmp_path: Path) -> None:
    """A model whose generation_config.json names as end token what it says first ends there."""
    records = river_records(4)
    whole = source(policy="greedy", max_new_tokens=1)
    tokens = {i: drawn[0][0] for i, drawn in whole.engine.generate([whole._request(r) for r in records])}
    folder = tmp_path / "ends"
    shutil.copytree(converted, folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {sorted(set(tokens.values()))}}}')
    ended = EngineModel(OpenVINO(str(folder), sampling(policy="greedy"), TextSettings(), "float32"), "t", {})
    assert set(map(tuple, (r for v in answers(ended, records).values() for r in v))) == {("", "stop")}


@needs_openvino
def test_the_command_mixes_it_with_the_model_itself(converted: str, model: Path, tmp_path: Path) -> None:
    queries, output = tmp_path / "queries.jsonl", tmp_path / "out.jsonl"
    write_records(queries, river_records(5))
    sources = ["--source", f"openvino:{converted}@top-p:2", "--source", f"{model}@greedy:1"]
    flags = ["--max_new_tokens", "6", "--dtype", "float32", "--device", "cpu", "--batch_size", "2"]
    assert main(["sample", "--data", str(queries), "--output", str(output), *sources, *flags]) == 0
    tags = [tag for record in read_records(output) for joined in record.sources for tag in joined.split("|")]
    assert Counter(tags) == {"converted@top-p/0": 5, "converted@top-p/1": 5, "model@greedy/0": 5}


@needs_openvino
def test_a_stopped_call_takes_its_requests_back(source: Source) -> None:
    """What is left of a call that was stopped half-way must not answer the next one."""
    records = river_records(24)
    ours = source(batch_size=1)
    undisturbed = answers(ours, records)
    begun = ours.answer(list(records), Counter())
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert answers(ours, records[::-1]) == undisturbed
    ours.close()
    assert ours.engine.pipeline is None
    assert answers(ours, records) == undisturbed


@needs_openvino
def test_what_is_not_converted_is_refused(source: Source, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no openvino_model\.xml; convert a model first: optimum-cli export openvino"):
        EngineModel(OpenVINO(str(model), sampling(), TextSettings()), "t", {}).check()
    with pytest.raises(UserError, match="more than the context of 128"):
        source(max_new_tokens=200).check()
