"""Rows → scores: batches by length within a token budget, and what is shared computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrhf.models.batching import Forward
from rrhf.models.end_states import end_states
from rrhf.models.first_token import first_token_alone
from rrhf.models.kernels.choice import kernels_for
from rrhf.models.out_of_memory import in_halves, run_forwards
from rrhf.models.path_check import END_STATES, usable_path
from rrhf.models.tokenization import EncodedRecord
from rrhf.records.record import Record
from rrhf.rewards.reward_models.reading import CausalReader, PairReader, Row

Request = tuple[Record, Sequence[int]]  # a record, and which of its responses are to be scored


@dataclass(frozen=True)
class Head:
    """A linear head over last hidden states, in fp32: ``weight`` [L, hidden_size], ``bias`` [L] or None.

    Its scores are (W·h + b − ``mean``) / ``std``, as OpenRLHF normalises them where its configuration says so.
    """

    weight: Tensor
    bias: Tensor | None = None
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, states: Tensor) -> Tensor:
        """Scores [R, L] of states [R, hidden_size]."""
        with torch.autocast(states.device.type, enabled=False):
            states = states if states.dtype == torch.float64 else states.float()
            bias = None if self.bias is None else self.bias.to(states.dtype)
            logits = nn.functional.linear(states, self.weight.to(states.dtype), bias)
        return (logits - self.mean) / self.std


class Fp32Linear(nn.Linear):
    """The last layer of a classifier whose other layers are in half precision: weights and product are in fp32."""

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight, self.bias)


def encoder_logits(model: PreTrainedModel, rows: Sequence[Row], padding: int) -> Tensor:
    """The classification logits of rows, padded on the right. Tensor of shape (rows, labels), fp32."""
    width = max(len(row.ids) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (width - len(values))]

    device = model.device
    inputs = {
        "input_ids": torch.tensor([padded(row.ids, padding) for row in rows], device=device),
        "attention_mask": torch.tensor([padded([1] * len(row.ids), 0) for row in rows], device=device),
    }
    if rows[0].types is not None:
        inputs["token_type_ids"] = torch.tensor([padded(row.types or (), 0) for row in rows], device=device)
    logits: Tensor = model(**inputs).logits
    return logits.float()


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in batches of similar length, each of at most ``budget`` tokens with its padding, or one row.

    The longest come first: what does not fit the memory fails at once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


@contextlib.contextmanager
def _as_encoder(model: PreTrainedModel, budget: int, batches: int) -> Iterator[None]:
    """While it lasts, ``model`` computes the same faster: its device's products, and no state that is not read."""
    kernels = kernels_for(model.device)
    with contextlib.ExitStack() as stack:
        if not torch.is_grad_enabled():  # the weights stay
            stack.enter_context(kernels.packed(model, budget, batches))
        stack.enter_context(kernels.lean(model))
        stack.enter_context(first_token_alone(model))
        yield


@dataclass
class EncoderReward:
    """A sequence classification model, which reads every row whole.

    ``most_rows``: of a batch, since memory ran out with more.
    """

    model: PreTrainedModel
    reader: PairReader
    most_rows: int | None = None
    cpu_tokens: ClassVar[int] = 512  # of a forward pass on a CPU by default: rows that fit the caches are fastest

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, record: Record, indices: Sequence[int]) -> list[Row]:
        """The rows of the record's responses at ``indices``."""
        return self.reader.rows(record, indices)

    def compute(self, rows: Sequence[Row], budget: int) -> Tensor:
        """Logits of rows, in order and with the graph. Tensor of shape (R, labels), fp32."""
        padding = self.reader.tokenizer.pad_token_id or 0
        logits: list[Tensor] = []
        order: list[int] = []
        batches = length_batches([len(row.ids) for row in rows], budget)
        with _as_encoder(self.model, budget, len(batches)):
            for batch in batches:
                left = batch
                while left:

                    def run(size: int, left: Sequence[int] = left) -> Tensor:
                        return encoder_logits(self.model, [rows[index] for index in left[:size]], padding)

                    most = min(self.most_rows or len(left), len(left))
                    part, fitting = in_halves(run, most, "score", "rows", "--max_tokens_per_forward")
                    self.most_rows = fitting if fitting < most else self.most_rows
                    logits.append(part)
                    order += left[: len(part)]
                    left = left[len(part) :]
        return in_order(logits, order)


@dataclass
class CausalReward:
    """A causal decoder with a scalar head, which reads what the rows of a record share once where it takes trees.

    ``longest_row``: of the trees to come, which decides what the check of the path must cover.
    """

    backbone: PreTrainedModel
    head: Head
    reader: CausalReader
    longest_row: int = 0
    cpu_tokens: ClassVar[int] = 4096

    @cached_property
    def path(self) -> str:
        return usable_path(self.backbone, self.longest_row, END_STATES)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def encode(self, record: Record, indices: Sequence[int]) -> list[EncodedRecord]:
        """The rows of the record's responses at ``indices``, which share what they begin with."""
        return self.reader.encode(record, indices)

    def compute(self, rows: Sequence[EncodedRecord], budget: int) -> Tensor:
        """Scores of all responses of ``rows``, in order and with the graph. Tensor of shape (R, L), fp32."""
        scores: list[Tensor] = []
        order: list[int] = []

        def run(forward: Forward) -> list[Tensor]:
            return [self.head(end_states(self.backbone, part, self.path)) for part in forward.parts()]

        for forward, done in run_forwards(self.backbone, _numbered(rows), budget, self.path, run):
            scores += done
            order += [int(n) for part in forward.parts() for record in part for n in record.scores if n is not None]
        return in_order(scores, order)


RewardModel = EncoderReward | CausalReward


@torch.inference_mode()
def score_requests(model: RewardModel, requests: Sequence[Request], budget: int) -> Tensor:
    """Logits of all responses asked for, in order. Tensor of shape (R, L), fp32, on the CPU."""
    rows: Any = [row for record, indices in requests for row in model.encode(record, indices)]
    return model.compute(rows, budget).cpu()


def in_order(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """The rows of ``parts`` sorted by the numbers that ``order`` gives them."""
    rows = torch.cat(list(parts))
    return rows[torch.tensor(order, device=rows.device).argsort()]


def _numbered(encoded: Sequence[EncodedRecord]) -> list[EncodedRecord]:
    """The records with the number of each response, counted through all of them, where scores stand: it travels along
    when records are sorted and cut in slices."""
    numbered, count = [], 0
    for record in encoded:
        numbers: list[float | None] = [float(count + i) for i in range(len(record.responses))]
        numbered.append(replace(record, scores=numbers))
        count += len(numbers)
    return numbered
