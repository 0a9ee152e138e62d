"""The kind of reward that is a model: how it is named, which of its labels counts, and its scorer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError, nearest
from rrhf.common.remote import is_url
from rrhf.models.identity import model_digest
from rrhf.records.checksums import checksum_of_file
from rrhf.rewards.kind import Item, RewardContext, RewardKind
from rrhf.rewards.reward_models.heads import raw_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from rrhf.rewards.reward_models.load import Place
    from rrhf.rewards.reward_models.passes import RewardModel

log = logging.getLogger("rrhf")

GPU_TOKENS = 32768  # of a forward pass where nobody says how many
INDEPENDENT = ("multi_label_classification", "regression")  # problem types whose labels say nothing of each other


def names_reward_model(reward: str) -> bool:
    """Whether a reward without ``model:`` in front is a model's name: a path that is there, a URL, or a hub id."""
    name = reward.partition("#")[0]
    return is_url(name) or (":" not in reward and ("/" in name or Path(name).is_dir()))


def split_label(argument: str) -> tuple[str, str | None]:
    """``NAME#LABEL`` in its parts; a folder whose own name has a ``#`` in it is taken as it is."""
    name, hash_, label = argument.rpartition("#")
    if not hash_ or Path(argument).exists():
        return argument, None
    return name, label


class ModelScorer:
    """Scores responses by a reward model, which is loaded when there is something to score.

    Args:
        argument: ``NAME`` or ``NAME#LABEL``; the label that counts as good, by name or number, of a model with several.

    Raises:
        UserError: there is no such model, or it has several labels and none is named, or not this one.
    """

    def __init__(self, argument: str, context: RewardContext) -> None:
        from rrhf.rewards.reward_models.load import find_reward_model

        name, label = split_label(argument)
        self.place, self.context = find_reward_model(name), context
        self.positive = positive_label(self.place, label)
        self.model: RewardModel | None = None
        self.rows = 0

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        if not items:
            return []
        from rrhf.rewards.reward_models.passes import score_requests

        if self.model is None:
            from rrhf.rewards.reward_models.load import load_reward_model

            self.model = load_reward_model(self.place, self.context.device, self.context.dtype)
        # Neighbours of one record are asked for together, so that they can share its query.
        groups = [list(group) for _, group in groupby(items, key=lambda item: id(item[0]))]
        requests = [(group[0][0], [index for _, index in group]) for group in groups]
        cut_before = self.model.reader.cut
        budget = self.context.max_tokens_per_forward or _budget(self.model)
        logits = score_requests(self.model, requests, budget)
        self.rows += len(items)
        if self.model.reader.cut and not cut_before:
            log.warning(
                f"reward model {self.place.name}: its context is {self.model.reader.context} tokens; longer rows are "
                "cut from the left"
            )
        scores = log_odds(logits, self.positive, getattr(self.place.config, "problem_type", None) in INDEPENDENT)
        return [self._finite(score, item) for score, item in zip(scores.tolist(), items, strict=True)]

    def _finite(self, score: float, item: Item) -> float:
        if score - score != 0:
            raise UserError(
                f"reward model {self.place.name} gave {score} for response {item[1]} of record {item[0].id!r}: "
                "try --dtype float32"
            )
        return score

    def close(self) -> None:
        """Say how many rows were cut, and let go of the weights."""
        if self.model is not None and self.model.reader.cut:
            log.warning(
                f"reward model {self.place.name}: {self.model.reader.cut} of {self.rows} rows were longer than its "
                f"context of {self.model.reader.context} tokens and were cut from the left"
            )
        self.model, self.rows = None, 0


def _budget(model: RewardModel) -> int:
    return model.cpu_tokens if model.device.type == "cpu" else GPU_TOKENS


def positive_label(place: Place, label: str | None) -> int:
    """The number of the label that counts as good.

    Raises:
        UserError: there are several and none is named, or not this one.
    """
    several = range(place.outputs) if place.outputs > 1 else range(0)
    labels = {number: str(place.config.id2label.get(number, number)) for number in several}
    if not labels:
        if label is not None:
            raise UserError(f"reward model {place.name}#{label}: has one score and no labels: leave #{label} out")
        return 0
    known = ", ".join(labels.values())
    if label is None:
        raise UserError(
            f"reward model {place.name} has {len(labels)} labels ({known}): say which one is good, as "
            f"--reward {place.name}#{labels[max(labels)]}"
        )
    numbers = [number for number, name in labels.items() if name == label]
    if not numbers and label.isdecimal() and int(label) in labels:
        numbers = [int(label)]
    if len(numbers) != 1:
        raise UserError(f"reward model {place.name} has no label {label!r}: {nearest(label, labels.values())}")
    return numbers[0]


def log_odds(logits: Tensor, positive: int, independent: bool = False) -> Tensor:
    """One score a row: a lone logit itself; of L labels log P(positive) − log (1 − P(positive)).

    Unlike the probability it does not round to 1 where the model is sure, so responses stay apart. With two labels it
    is the difference of the logits.

    Args:
        logits: Tensor of shape (R, L).
        positive: which label.
        independent: each label stands for itself: its logit is its log-odds (a sigmoid), or its value (regression).

    Returns:
        Tensor of shape (R,), fp64.
    """
    import torch

    logits = logits.double()
    if logits.shape[1] == 1 or independent:
        return logits[:, positive]
    others = [label for label in range(logits.shape[1]) if label != positive]
    return logits[:, positive] - torch.logsumexp(logits[:, others], dim=1)


def reward_model_digest(argument: str, context: RewardContext) -> str:
    """A digest of the weights, configuration and tokenizer, of the label, and of the type that is computed in."""
    from rrhf.models.devices import resolve_device, resolve_dtype

    name, label = split_label(argument)
    raw = raw_checkpoint(name)
    weights = [model_digest(str(raw.parent) if raw is not None else name)]
    if raw is not None:
        weights.append(checksum_of_file(raw))
    facts: list[Any] = [weights, label, str(resolve_dtype(context.dtype, resolve_device(context.device)))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


MODEL = RewardKind(("FOLDER_OR_HUB_ID", "FOLDER_OR_HUB_ID#LABEL", "model:NAME"), ModelScorer, reward_model_digest)
