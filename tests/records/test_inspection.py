"""What inspection measures, against numbers worked by hand and naive formulas."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
import pytest

from rrhf.records.inspection import format_inspection, inspect_records, inspection_html
from rrhf.records.inspection.diversity import SELF_BLEU_QUERIES, bleu, self_bleu
from rrhf.records.record import Record
from rrhf.records.sources import source_name


def three() -> list[Record]:
    """Three queries whose every number below is worked by hand."""
    return [
        Record(
            query="one two",
            responses=["a b a b", "c", "c"],
            sources=["beam/0", "beam/1", "human/chosen"],
            finish=["length", "stop", "stop"],
            scores=[1.0, 3.0, 3.0],
        ),
        Record(query="three", responses=["d e", "f"], sources=["beam/0", "human/chosen"], scores=[2.0, None]),
        Record(query=[{"role": "user", "content": "four"}], responses=["g g"], sources=["beam/0"]),
    ]


def test_counts_worked_by_hand() -> None:
    result = inspect_records(three())
    assert (result["n"], result["responses"]) == (3, 6)
    assert result["k"] == {"1": 1, "2": 1, "3": 1}
    assert result["finish"] == {"length": 1, "stop": 5}
    assert result["truncated"] == pytest.approx(1 / 6)
    assert result["duplicates"] == {"responses": 1, "queries": 1}
    assert result["unscored"] == {"responses": 2, "records": 1}
    assert result["ties"] == {"pairs": 3, "tied": 1, "share": pytest.approx(1 / 3)}
    assert result["no_signal"] == {"queries": 2, "share": pytest.approx(2 / 3)}
    assert result["lengths"]["response"]["words"] == {"mean": pytest.approx(11 / 6), "p50": 1, "p95": 4, "max": 4}
    assert result["lengths"]["query"]["words"]["max"] == 2  # "one two", and "user: four"
    assert result["lengths"]["query"]["characters"]["max"] == len("user: four")


def test_scores_equal_but_for_the_last_bit_are_tied() -> None:
    near = Record(query="q", responses=["a", "b"], sources=["beam/0", "human/chosen"], scores=[0.3, 0.1 + 0.2])
    result = inspect_records([near])
    assert result["ties"] == {"pairs": 1, "tied": 1, "share": 1.0}
    assert result["no_signal"] == {"queries": 1, "share": 1.0}
    assert {name: source["win_share"] for name, source in result["scores_by_source"].items()} == {
        "beam": 0.5, "human/chosen": 0.5,
    }  # fmt: skip


def test_scores_worked_by_hand() -> None:
    result = inspect_records(three())
    total = result["scores"]
    assert (total["n"], total["mean"], total["mean_of_maxima"]) == (4, 2.25, 2.5)
    assert total["std"] == pytest.approx(np.std([1, 3, 3, 2]))
    assert total["std_within_query"] == pytest.approx((np.std([1, 3, 3]) + 0) / 2)
    beam, human = result["scores_by_source"]["beam"], result["scores_by_source"]["human/chosen"]
    assert (beam["n"], beam["mean"], beam["mean_of_maxima"], beam["min"], beam["max"]) == (3, 2.0, 2.5, 1.0, 3.0)
    assert beam["win_share"] == pytest.approx((0.5 + 1) / 2) and human["win_share"] == pytest.approx(0.25)
    assert beam["response_share"] == pytest.approx(4 / 6)


def test_distinct_worked_by_hand() -> None:
    by_source = inspect_records(three())["diversity"]["by_source"]
    # beam: words {a b a b c}: 3 of 5; {d e}: 2 of 2; {g g}: 1 of 2. Pairs {ab ba ab}: 2 of 3; 1 of 1; 1 of 1.
    assert by_source["beam"]["distinct_1"] == pytest.approx((3 / 5 + 1 + 1 / 2) / 3)
    assert by_source["beam"]["distinct_2"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert by_source["human/chosen"]["distinct_2"] is None  # one word has no pair
    assert by_source["human/chosen"]["self_bleu"] is None  # never two to a query
    assert by_source["beam"]["truncated"] == pytest.approx(1 / 4)


def test_correlation_with_length_against_numpy() -> None:
    rng = random.Random(0)
    records = [
        Record(
            query=f"q{i}",
            responses=["x" * rng.randint(1, 50) for _ in range(4)],
            scores=[rng.gauss(i % 3, 1) for _ in range(4)],
        )
        for i in range(50)
    ]
    sizes = np.array([[len(response) for response in record.responses] for record in records], dtype=float)
    scores = np.array([record.scores for record in records], dtype=float)
    result = inspect_records(records)["score_length_correlation"]
    assert result["overall"] == pytest.approx(np.corrcoef(sizes.ravel(), scores.ravel())[0, 1], abs=1e-12)
    sizes -= sizes.mean(1, keepdims=True)
    scores -= scores.mean(1, keepdims=True)
    assert result["within_query"] == pytest.approx(np.corrcoef(sizes.ravel(), scores.ravel())[0, 1], abs=1e-12)


def test_correlation_is_undefined_where_nothing_varies() -> None:
    records = [Record(query="q", responses=["a", "bb", "cc"], scores=[0.1, 0.1, 0.1])]
    assert inspect_records(records)["score_length_correlation"] == {"overall": None, "within_query": None}


def test_percentiles_are_nearest_ranks() -> None:
    records = [Record(query=f"q{i}", responses=["w " * (i + 1)]) for i in range(20)]
    random.Random(1).shuffle(records)
    assert inspect_records(records)["lengths"]["response"]["words"] == {"mean": 10.5, "p50": 10, "p95": 19, "max": 20}


def test_bleu_worked_by_hand() -> None:
    hypothesis = ["the", "cat", "sat", "on", "the", "mat"]
    reference = ["the", "cat", "is", "on", "the", "mat"]
    # precisions 5/6, 3/5, 1/4, 0.1/3; equal lengths
    assert bleu(hypothesis, [reference]) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 0.1 / 3) ** 0.25)
    # clipped by the largest count in any one reference: "the" twice of 3
    assert bleu(["the"] * 3, [["the", "the", "a"], ["the", "b", "c"]]) == pytest.approx(
        (2 / 3 * 1 / 2 * 0.1) ** (1 / 3)
    )
    # brevity: 4 words against 8
    words = list("abcdefgh")
    assert bleu(words[:4], [words]) == pytest.approx(np.exp(1 - 8 / 4))
    assert bleu([], [["a"]]) == bleu(["b"], [["a"]]) == 0.0


def test_self_bleu() -> None:
    assert self_bleu([list("abcde")] * 3) == pytest.approx(1.0)
    assert self_bleu([["a"], ["a"]]) == pytest.approx(1.0)
    assert self_bleu([list("abcd"), list("efgh")]) == 0.0
    varied = inspect_records([Record(query="q", responses=["a b c d e", "v w x y z"], sources=["s/0", "s/1"])])
    assert varied["diversity"]["by_source"]["s"]["self_bleu"] == 0.0


def test_self_bleu_sample_does_not_depend_on_the_order() -> None:
    rng = random.Random(2)
    records = [
        Record(
            query=f"q{i}",
            responses=[" ".join(rng.choices("abcdef", k=8)) for _ in range(3)],
            sources=["s/0", "s/1", "t/0"],
        )
        for i in range(SELF_BLEU_QUERIES * 2)
    ]
    first = inspect_records(records)["diversity"]
    second = inspect_records(reversed(records))["diversity"]
    assert first["self_bleu_queries"] == SELF_BLEU_QUERIES
    assert first["by_source"]["s"]["self_bleu"] == pytest.approx(second["by_source"]["s"]["self_bleu"], rel=1e-12)
    everything = np.mean([self_bleu([response.split() for response in r.responses[:2]]) for r in records])
    assert first["by_source"]["s"]["self_bleu"] != pytest.approx(everything, rel=1e-9)  # it is a sample
    assert first["by_source"]["s"]["self_bleu"] == pytest.approx(everything, abs=0.05)  # and a fair one
    assert first["by_source"]["t"]["self_bleu"] is None and first["all"]["self_bleu"] > 0


@pytest.mark.parametrize(
    "tag, name",
    [
        ("top-p/3", "top-p"),
        ("human/chosen", "human/chosen"),
        ("org/model@beam/12", "org/model@beam"),
        ("plain", "plain"),
    ],
)
def test_source_names(tag: str, name: str) -> None:
    assert source_name(tag) == name


@pytest.mark.parametrize("flat, warned", [(2, False), (3, True)])
def test_warning_above_a_fifth_without_signal(flat: int, warned: bool) -> None:
    def records() -> Iterator[Record]:
        for i in range(10):
            scores: list[float | None] = [1.0, 1.0, None] if i < flat else [1.0, 2.0, None]
            yield Record(query=f"q{i}", responses=["a", "b", "c"], scores=scores)

    warnings = inspect_records(records())["warnings"]
    assert bool(warnings) == warned
    if warned:
        assert "3 of 10 queries (30%)" in warnings[0]


def test_unscored_and_bare_files_are_described_without_a_warning() -> None:
    for records in ([], [Record(query="q")], [Record(query="q", responses=["a"])]):
        result = inspect_records(records)
        assert result["scores"] is None and result["warnings"] == [] and result["scores_by_source"] == {}
        assert "Scores" not in format_inspection(result)
        assert "<h1>" in inspection_html(result)


def test_result_is_plain_json() -> None:
    result = inspect_records(three())
    assert json.loads(json.dumps(result, allow_nan=False))["scores"]["mean"] == 2.25
    histogram = result["histograms"]["scores"]
    assert sum(histogram["counts"]) == 4 and len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert histogram["counts"][0] == 1 and histogram["counts"][-1] == 2  # 1.0 first; both 3.0 in the last bin


def test_bins_of_lengths_hold_equally_many() -> None:
    records = [Record(query="q", responses=["w " * n for n in range(1, 46)])]  # 45 lengths, two to a bin
    histogram = inspect_records(records)["histograms"]["response words"]
    assert histogram["counts"] == [2] * 22 + [1] and histogram["edges"][:2] == [0.5, 2.5]


def test_terminal_text_is_aligned_and_says_the_numbers() -> None:
    text = format_inspection(inspect_records(three()))
    assert "Warning: 2 of 3 queries (67%) carry no ranking signal" in text
    assert re.search(r"^  beam +3 +2\.000 +0\.816 .* 75\.0% +66\.7%$", text, re.MULTILINE)
    scores = text[text.index("Scores\n") :].split("\n\n")[0].splitlines()[1:]
    assert len(scores) == 4 and len({len(line) for line in scores}) == 1


class Links(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def test_page_is_one_file_escaped_and_the_same_each_time() -> None:
    records = three()
    records[0].sources[0] = "<script>alert(1)</script>"
    result = inspect_records(records)
    page = inspection_html(result, title="a<b")
    links = Links()
    links.feed(page)
    assert all(link.startswith("#") for link in links.found)
    assert "script" not in links.tags and "link" not in links.tags and "&lt;script&gt;" in page
    assert links.tags.count("svg") == len([h for h in result["histograms"].values() if h]) == 4
    assert "<title>a&lt;b</title>" in page and "prefers-color-scheme: dark" in page
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "#000000" not in page  # no ink that a dark page would swallow
    assert page == inspection_html(result, title="a<b")
