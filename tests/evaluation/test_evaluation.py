"""Evaluation: metrics by hand, cut dialogues, gains, unscored texts, one model alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rrhf.evaluation.metrics import corpus_perplexity, cut_at_turn, distinct_n, paired_bootstrap
from rrhf.evaluation.texts import Likelihood, evaluate_texts
from rrhf.records.record import Record

MARKERS = ("Human:", "Assistant:")


def test_bootstrap_interval_is_that_of_a_plain_loop_in_the_limit() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, size=50)
    result = paired_bootstrap(differences.tolist(), seed=0, samples=20_000)
    assert result["mean"] == pytest.approx(differences.mean())
    # The percentile interval of a mean is close to the normal one: 1.96 standard errors to each side.
    error = differences.std() / math.sqrt(50)
    assert result["low"] == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert result["high"] == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_of_two_values_by_hand() -> None:
    # Means of two draws from {0, 1} are 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4.
    assert paired_bootstrap([0.0, 1.0], seed=3) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert paired_bootstrap([0.0, 1.0], seed=3, level=0.4) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_bootstrap_depends_on_the_seed_alone_and_not_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=30).tolist()
    whole = paired_bootstrap(values, seed=5, samples=1000)
    assert paired_bootstrap(values, seed=5, samples=1000) == whole
    assert paired_bootstrap(values, seed=6, samples=1000) != whole
    monkeypatch.setattr("rrhf.evaluation.metrics.CHUNK", 70)
    chunked = paired_bootstrap(values, seed=5, samples=1000)
    assert chunked["low"] == pytest.approx(whole["low"]) and chunked["high"] == pytest.approx(whole["high"])


@pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap(values, seed=0)


def test_distinct_n_by_hand() -> None:
    texts = [list("abab"), list("ab"), list("c")]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # ab ba ab | ab: two kinds of four
    assert distinct_n(texts, 5) == 0.0


def test_corpus_perplexity_by_hand() -> None:
    assert corpus_perplexity(6.0, 3) == pytest.approx(math.e**2)
    with pytest.raises(ValueError, match="0 tokens"):
        corpus_perplexity(0.0, 0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Sure. \n\nHuman: thanks\n\nAssistant: bye", " Sure."),
        (" Sure.\n\nAssistant: more Human: x", " Sure."),
        ("Human: hi", ""),
        (" nothing to cut \n", " nothing to cut \n"),
    ],
)
def test_cut_at_turn(text: str, kept: str) -> None:
    assert cut_at_turn(text, MARKERS) == kept


# --- evaluate_texts ---------------------------------------------------------------------------------------------


def words(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
    """Reward: words; None where the text says so."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if "unscorable" in text else float(len(text.split())) for text in texts]


def negative(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
    """Reward: minus the words."""
    return [None if value is None else -value for value in words(prompts, completions)]


WORDS, NEGATIVE = f"{__name__}:words", f"{__name__}:negative"


def perplexity(records: Sequence[Record], texts: Sequence[tuple[str, str]]) -> Likelihood:
    """A token a word and one for the end, each with a negative log-likelihood of 2."""
    assert len(records) == len(texts)
    tokens = sum(len(text.split()) + (finish == "stop") for text, finish in texts)
    return Likelihood(2.0 * tokens, tokens)


def plain(number: int) -> list[Record]:
    return [Record(query=f"query {index}", id=f"r{index}") for index in range(number)]


def evaluate(records: list[Record], rho: Any, pi: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    arguments: dict[str, Any] = {"perplexity": perplexity, "perplexity_model": "fixed", "seed": 0, **options}
    return evaluate_texts(records, rho, pi, [words, negative], **arguments)


def test_every_number_of_a_small_evaluation_by_hand() -> None:
    rho = [("a b", "stop"), ("a b c", "length")]
    pi = [("a b a b", "stop"), ("c", "stop")]
    result, rows = evaluate(plain(2), rho, pi, settings={"policy": "top-p"})
    assert result["rho"] == {
        "reward_mean": 2.5,
        "reward_std": 0.5,
        "reward_mean_uncut": 2.5,
        "perplexity": pytest.approx(math.exp(2)),
        "perplexity_interval": None,  # this perplexity does not tell its texts apart
        "perplexity_queries_cut": 0,
        "length_mean": (3 + 3) / 2,
        "distinct_2": 2 / 3,
        "n": 2,
        "n_unscored": 0,
    }
    assert result["pi"]["reward_mean"] == 2.5
    assert result["pi"]["length_mean"] == (5 + 2) / 2
    assert result["reward_gain"] == {"mean": 0.0, "low": -2.0, "high": 2.0, "n": 2}
    assert list(result["rewards"]) == [WORDS, NEGATIVE]
    assert result["rewards"][NEGATIVE]["rho"] == {"mean": -2.5, "std": 0.5, "n_unscored": 0}
    assert result["rewards"][NEGATIVE]["gain"]["mean"] == 0.0
    assert result["rewards"][WORDS]["gain"] == result["reward_gain"]
    assert result["phrases"] == []  # of two texts
    assert (result["seed"], result["perplexity_model"], result["settings"]) == (0, "fixed", {"policy": "top-p"})
    assert rows[1] == {
        "id": "r1",
        "query": "query 1",
        "rho": "a b c",
        "rho_finish": "length",
        "rho_rewards": {WORDS: 3.0, NEGATIVE: -3.0},
        "pi": "c",
        "pi_finish": "stop",
        "pi_rewards": {WORDS: 1.0, NEGATIVE: -1.0},
    }
    json.dumps([result, rows], allow_nan=False)


def test_phrases_are_of_the_texts_that_were_measured() -> None:
    """Without the turns that were cut."""
    dialogue = [Record(query="\n\nHuman: hi\n\nAssistant:", id=f"r{index}") for index in range(4)]
    sorry = [("I'm sorry.\n\nHuman: it is all right", "stop")] * 3 + [("yes", "stop")]
    result, _ = evaluate(dialogue, [("yes", "stop")] * 4, sorry)
    assert result["phrases"] == [{"phrase": "i'm sorry", "rho": 0.0, "pi": 0.75}]
    alone, _ = evaluate(dialogue, None, sorry)
    assert "phrases" not in alone


def test_dialogues_are_cut_and_the_uncut_reward_stands_beside() -> None:
    cheat = ("fine \n\nHuman: thank you so much", "stop")
    dialogue = Record(query="\n\nHuman: hi\n\nAssistant:", id="text")
    chat = Record(query=[{"role": "user", "content": "hi"}], id="chat")
    prose = Record(query="A play.", id="prose")
    seen: list[tuple[str, str]] = []

    def watched(records: Sequence[Record], texts: Sequence[tuple[str, str]]) -> Likelihood:
        seen.extend(texts)
        return perplexity(records, texts)

    result, rows = evaluate([dialogue, chat, prose], None, [cheat] * 3, perplexity=watched)
    assert seen == [("fine", "length"), ("fine", "length"), cheat]
    assert [row["pi"] for row in rows] == ["fine", "fine", cheat[0]]
    assert [row.get("pi_uncut") for row in rows] == [cheat[0], cheat[0], None]
    assert [row["pi_rewards"][WORDS] for row in rows] == [1.0, 1.0, 6.0]
    assert result["pi"]["reward_mean"] == pytest.approx(8 / 3)
    assert result["pi"]["reward_mean_uncut"] == 6.0
    whole, _ = evaluate([dialogue, chat, prose], None, [cheat] * 3, cut_markers=())
    assert whole["pi"]["reward_mean"] == whole["pi"]["reward_mean_uncut"] == 6.0


def test_unscored_texts_are_counted_and_leave_their_pair_out() -> None:
    rho = [("a", "stop"), ("unscorable", "stop"), ("a b c", "stop")]
    pi = [("a b", "stop"), ("a b", "stop"), ("unscorable", "stop")]
    result, rows = evaluate(plain(3), rho, pi)
    assert (result["rho"]["reward_mean"], result["rho"]["n"], result["rho"]["n_unscored"]) == (2.0, 3, 1)
    assert result["reward_gain"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert rows[1]["rho_rewards"] == {WORDS: None, NEGATIVE: None}


def test_nothing_scored_gives_nulls_and_no_number() -> None:
    texts = [("unscorable", "stop")] * 2
    result, rows = evaluate(plain(2), texts, texts)
    assert result["rho"]["reward_mean"] is None and result["rho"]["reward_mean_uncut"] is None
    assert result["reward_gain"] == {"mean": None, "low": None, "high": None, "n": 0}
    json.dumps([result, rows], allow_nan=False)


@pytest.mark.parametrize("name", ["rho", "pi"])
def test_one_model_alone_has_its_block_and_no_gain(name: str) -> None:
    texts = [("a b", "stop"), ("c", "stop")]
    result, rows = evaluate(plain(2), *((texts, None) if name == "rho" else (None, texts)))
    other = {"rho": "pi", "pi": "rho"}[name]
    assert result[name]["reward_mean"] == 1.5
    assert other not in result and "reward_gain" not in result
    assert set(result["rewards"][WORDS]) == {name}
    assert other not in rows[0] and f"{other}_rewards" not in rows[0]


def test_texts_without_a_token_have_no_part_in_the_perplexity() -> None:
    asked: list[tuple[str, str]] = []

    def watched(records: Sequence[Record], texts: Sequence[tuple[str, str]]) -> Likelihood:
        asked.extend(texts)
        return perplexity(records, texts)

    result, _ = evaluate(plain(3), [("", "length"), ("", "stop"), ("a", "length")], None, perplexity=watched)
    assert asked == [("", "stop"), ("a", "length")]
    assert result["rho"]["length_mean"] == 2 / 3
    nothing, _ = evaluate(plain(1), [("", "length")], None)
    assert nothing["rho"]["perplexity"] is None and nothing["rho"]["length_mean"] == 0.0


@pytest.mark.parametrize(("rho", "pi"), [(None, None), ([("a", "stop")], None)])
def test_texts_that_do_not_match_the_records_are_refused(rho: Any, pi: Any) -> None:
    with pytest.raises(ValueError, match="one text of each model a record"):
        evaluate(plain(2), rho, pi)
