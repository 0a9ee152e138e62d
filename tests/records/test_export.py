"""Records as other trainers' rows, by hand, and read back by our own readers; TRL's reads them in tests/long."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rrhf.cli.convert import main
from rrhf.common.errors import UserError
from rrhf.records.export import EXPORTS, all_pairs, best_worst, exported
from rrhf.records.files import write_records
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}]
RECORDS = [
    Record(query="The sky is", responses=[" blue.", " red.", " wet.", " up."], scores=[0.9, 0.1, 0.9, None], id="a"),
    Record(query=CHAT, responses=["Green.", "Blue."], scores=[1.0, 2.0], id="b"),
    Record(query="Same", responses=["x", "y"], scores=[0.3, 0.1 + 0.2], id="c"),
    Record(query="Alone", responses=["x"], id="d"),
]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_pairs_by_hand() -> None:
    assert all_pairs(RECORDS[0]) == [(0, 1), (2, 1)]
    assert best_worst(RECORDS[0]) == [(0, 1)]
    assert [best_worst(record) for record in RECORDS[1:]] == [[(1, 0)], [], []]


def test_rows_by_hand() -> None:
    counts = Counter[str]()
    first, _, chat = exported(RECORDS, "trl-preference", counts=counts)
    assert first == {
        "id": "a", "prompt": "The sky is", "chosen": " blue.", "rejected": " red.",
        "score_chosen": 0.9, "score_rejected": 0.1,
    }  # fmt: skip
    assert (chat["prompt"], chat["chosen"], chat["rejected"]) == (CHAT, said("Blue."), said("Green."))
    assert counts == {"all scores are equal": 1, "no response is scored": 1}
    assert [row["id"] for row in exported(RECORDS, "trl-preference", "best-worst")] == ["a", "b"]
    best = list(exported(RECORDS, "trl-best"))
    assert best[0] == {"id": "a", "prompt": "The sky is", "completion": " blue."}
    assert best[1] == {"id": "b", "prompt": CHAT, "completion": said("Blue.")}
    assert [row["id"] for row in best] == ["a", "b", "c"]  # equal scores have a best one
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Sky?"}]
    *_, last = exported(RECORDS, "llamafactory-preference")
    assert last["conversations"] == turns
    assert (last["chosen"], last["rejected"]) == ({"from": "gpt", "value": "Blue."}, {"from": "gpt", "value": "Green."})
    assert list(exported(RECORDS, "llamafactory-best"))[1]["conversations"] == [
        *turns,
        {"from": "gpt", "value": "Blue."},
    ]


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def as_messages(query: Any) -> Any:
    return [{"role": "user", "content": query}] if isinstance(query, str) else query


@pytest.mark.parametrize("to", EXPORTS)
def test_our_readers_give_the_records_back(to: str, tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", RECORDS)
    convert(tmp_path / "records.jsonl", "--to", to, "--output", tmp_path / "rows.jsonl.gz")
    back = [(r.query, r.responses, r.scores) for r in load_dataset_records(tmp_path / "rows.jsonl.gz")]
    sky, same = ("The sky is", "Same") if to.startswith("trl") else map(as_messages, ("The sky is", "Same"))
    if to.endswith("-best"):
        assert back == [(sky, [" blue."], []), (CHAT, ["Blue."], []), (same, ["x"], [])]
    else:
        pairs = [(sky, [" blue.", " red."], [0.9, 0.1]), (sky, [" wet.", " red."], [0.9, 0.1])]
        assert back == [*pairs, (CHAT, ["Blue.", "Green."], [2.0, 1.0])]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "p", "response": "a", "helpfulness": 4, "verbosity": 4},
        {"prompt": "p", "response": "b", "helpfulness": 3, "verbosity": 1},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--to", "trl-best"]
    convert(*arguments)
    assert json.loads((tmp_path / "out.jsonl").read_text())["completion"] == said("a")
    assert "1 rows in " in capsys.readouterr().err
    convert(*arguments, "--overwrite", "--weights", "helpfulness=1", "verbosity=-1")
    assert json.loads((tmp_path / "out.jsonl").read_text())["completion"] == said("b")
    for more, message in (
        (["--to", "trl"], "--to trl: .*known: .*trl-preference"),
        (["--pairing", "best"], "--pairing best: .*best-worst"),
        (["--weights", "helpfulness"], "write NAME=X"),
        (["--weights", "helpfulness=1", "helpfulness=2"], "a name stands there twice"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*arguments, "--overwrite", *more)


def test_nothing_to_export() -> None:
    with pytest.raises(
        UserError, match=r"no record gives a row: all scores are equal \(1\), no response is scored \(1\)"
    ):
        list(exported(RECORDS[2:], "trl-preference"))


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", RECORDS)
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        convert(tmp_path / "records.jsonl", "--to", "trl-best", "--output", tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert len(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()) == 3
