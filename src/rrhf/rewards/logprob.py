"""What a causal language model says of responses: the policy as a reward, and the sums that references are kept by.

``logprob:MODEL`` scores by p_i = Σ_t log P(y_i,t | x, y_i,<t) / ‖y_i‖ (Eq. 1 of arXiv 2304.05302) and
``logprob-sum:MODEL`` by the sum; with a reference model ρ the sums are differences to ρ's, which are, up to β, DPO's
implicit reward (arXiv 2305.18290).

Sums that are kept stand in ``Record.rewards`` under ``logprob-sum:NAME#DIGEST`` (``reference_sums_name``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rrhf.common.errors import UserError
from rrhf.common.presentation import describe_counts
from rrhf.models.adapters import load_policy_or_adapter
from rrhf.models.folders import no_folder
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings, context_length
from rrhf.models.locate import locate
from rrhf.models.tokenization import EncodedRecord, TextFormat, TextSettings, cut_left
from rrhf.records.record import Record
from rrhf.rewards.kind import Item, RewardContext, RewardKind, Scorer
from rrhf.rewards.kl import log_ratios

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrhf.models.batching import Forward
    from rrhf.models.forward import Logprobs

log = logging.getLogger("rrhf")

SUM = "logprob-sum"
DIGITS = 16  # of the digest in a column's name: 64 bits
CPU_TOKENS, DEVICE_TOKENS = 4096, 16384  # of a forward pass where nobody says how many


class ResponseLogprob(NamedTuple):
    """Σ_t log P(y_t | …) of one response, in nats, and its ``length`` ‖y‖ in tokens, a written end token counted."""

    sum: float
    length: int


def reference_sums_name(model: str, text: TextSettings | None = None, max_length: int | None = None) -> str:
    """The name in ``Record.rewards`` of the responses' log-probability sums under ``model``.

    It is ``logprob-sum:NAME#DIGEST``. NAME is the hub id, or the last part of a path. DIGEST is the beginning of
    ``model_digest``: the same weights have the same sums wherever they lie. Where texts are not encoded in the usual
    way (a system prompt, template arguments, a limit of lengths), the digest covers that too: other tokens have other
    sums. The type in which the weights are loaded is not covered.

    Raises:
        UserError: there is no such model.
    """
    weights = model_digest(model)
    if not weights:
        cure = f"check the name{no_folder(model)}"
        raise UserError(f"model {model}: cannot be found, so its log-probabilities have no name: {cure}")
    usual = asdict(TextSettings())
    unusual = {name: value for name, value in asdict(text or TextSettings()).items() if value != usual[name]}
    if max_length is not None:
        unusual["max_length"] = max_length
    if unusual:
        weights = hashlib.sha256(f"{weights}{json.dumps(unusual, sort_keys=True)}".encode()).hexdigest()
    name = model if not Path(model).exists() and not model.startswith("package:") else Path(model).name
    return f"{SUM}:{name or model}#{weights[:DIGITS]}"


class ResponseSums:
    """A model in memory, asked for the log-probabilities of responses.

    Texts are encoded as in training: the query by ``text``, a response cut from the right where ``max_length`` holds no
    more of it. What then does not fit the model's context loses the beginning of its query, and a response that alone
    does not fit, its end. ``counts`` says how often each happened. No number depends on what else is asked for.

    Args:
        model, tokenizer: a causal language model; it is used as it is, in its present mode.
        text: system prompt, template arguments, query limit.
        max_length: most tokens of query and response together.
        max_tokens_per_forward: rows of one forward pass; None: by the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: TextSettings | None = None,
        *,
        max_length: int | None = None,
        max_tokens_per_forward: int | None = None,
    ) -> None:
        from rrhf.models.path_check import KeptPath

        self.model, self.format, self.max_length = model, TextFormat(tokenizer, text), max_length
        on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
        self.budget = max_tokens_per_forward or (CPU_TOKENS if on_cpu else DEVICE_TOKENS)
        self.counts: Counter[str] = Counter()
        self._path = KeptPath()

    def __call__(self, items: Sequence[Item]) -> list[ResponseLogprob | None]:
        """The log-probability of each response; None where no token of it is left or there was none.

        Raises:
            UserError: the model gives something else than a finite number; the message names the record.
        """
        import torch

        encoded, places = self._encode(items)
        found: list[ResponseLogprob | None] = [None] * len(items)
        with torch.inference_mode():
            values = self._measure(encoded)
        for record, indices, logprobs in zip(encoded, places, values, strict=True):
            for index, logprob in zip(indices, logprobs, strict=True):
                if not math.isfinite(logprob.sum):
                    raise UserError(
                        f"the model gives a response of record {record.id!r} the log-probability {logprob.sum}: its "
                        "weights or their type are broken; give --dtype float32 or another model"
                    )
                found[index] = logprob
        return found

    def _encode(self, items: Sequence[Item]) -> tuple[list[EncodedRecord], list[list[int]]]:
        """Records of the responses that share a query, and which items those are."""
        queries: dict[int, list[int]] = {}
        places: dict[tuple[int, int], list[int]] = {}
        encoded: dict[tuple[int, int], EncodedRecord] = {}
        for place, (record, index) in enumerate(items):
            if id(record) not in queries:
                before = self.format.queries_cut
                queries[id(record)] = self.format.encode_query(record.query)
                self.counts["queries cut from the left"] += self.format.queries_cut - before
            query, response = self._fitted(record, index, queries[id(record)])
            if not response:
                continue
            key = id(record), len(query)  # all are the end of the same query
            if key not in encoded:
                places[key], encoded[key] = [], EncodedRecord(record.id, query, [], [])
            places[key].append(place)
            encoded[key] = replace(encoded[key], responses=[*encoded[key].responses, response])
        return [replace(one, scores=[None] * len(one.responses)) for one in encoded.values()], list(places.values())

    def _fitted(self, record: Record, index: int, query: list[int]) -> tuple[list[int], list[int]]:
        """Query and response within ``max_length``, then within the model's context."""
        response = self.format.response_ids(record, index)
        context = context_length(self.model)
        if self.max_length is not None and len(query) + len(response) > self.max_length:
            response = response[: max(self.max_length - len(query), 0)]
            self.counts["responses cut" if response else "responses without room"] += 1
        if context is not None and len(response) >= context:
            response = response[: context - 1]
            self.counts["responses cut"] += 1
        if context is not None and len(query) + len(response) > context:
            query = cut_left(query, context - len(response), self.format.tokenizer.bos_token_id)
            self.counts["queries cut from the left"] += 1
        return query, response

    def _measure(self, encoded: Sequence[EncodedRecord]) -> list[list[ResponseLogprob]]:
        from rrhf.models.out_of_memory import run_forwards
        from rrhf.models.passes import response_logprobs

        numbered = [replace(record, id=str(number)) for number, record in enumerate(encoded)]
        values: list[list[ResponseLogprob]] = [[] for _ in encoded]
        path = self._path(self.model, numbered) if numbered else "padded"

        def run(forward: Forward) -> list[Logprobs]:
            return [response_logprobs(self.model, part, path) for part in forward.parts()]

        for forward, done in run_forwards(self.model, numbered, self.budget, path, run):
            for records, logprobs in zip(forward.parts(), done, strict=True):
                each = zip(logprobs.sums.tolist(), logprobs.lengths.tolist(), strict=True)
                for record in records:
                    values[int(record.id)] += [ResponseLogprob(*pair) for pair in islice(each, len(record.responses))]
        return values


class LogprobModel:
    """A model by its name, loaded when it is first asked and released by ``close``; see ``ResponseSums``."""

    def __init__(
        self,
        settings: ModelSettings,
        text: TextSettings | None = None,
        *,
        max_length: int | None = None,
        max_tokens_per_forward: int | None = None,
    ) -> None:
        locate(settings.model)  # a name that is none is refused before any work
        self.settings, self.text, self.max_length = settings, text, max_length
        self.max_tokens_per_forward = max_tokens_per_forward
        self._sums: ResponseSums | None = None

    def __call__(self, items: Sequence[Item]) -> list[ResponseLogprob | None]:
        return self._loaded()(items)

    def model(self) -> PreTrainedModel:
        """The model itself, which stays in memory until ``close``."""
        return self._loaded().model

    def _loaded(self) -> ResponseSums:
        if self._sums is None:
            model, tokenizer = load_policy_or_adapter(self.settings)
            limits = {"max_length": self.max_length, "max_tokens_per_forward": self.max_tokens_per_forward}
            self._sums = ResponseSums(model.eval(), tokenizer, self.text, **limits)
        return self._sums

    def close(self) -> None:
        """Release the model, and say what did not fit."""
        if self._sums is not None and (cut := +self._sums.counts):
            log.info(f"log-probabilities under {self.settings.model}: {describe_counts(cut)}")
        self._sums = None


def logprob_model(name: str, context: RewardContext) -> LogprobModel:
    """The model of a name, with what a reward's context says of device, type, texts and limits."""
    return LogprobModel(
        ModelSettings(name, device=context.device, dtype=context.dtype),
        context.text,
        max_length=context.max_length,
        max_tokens_per_forward=context.max_tokens_per_forward,
    )


def fill_sums(batch: Sequence[Record], name: str, model: LogprobModel | ResponseSums) -> list[Record]:
    """New records with ``rewards[name]``; only the values that are missing there are computed."""
    values = [list(record.rewards.get(name) or [None] * len(record.responses)) for record in batch]
    missing = [(row, index) for row, known in enumerate(values) for index, value in enumerate(known) if value is None]
    if missing:
        found = model([(batch[row], index) for row, index in missing])
        for (row, index), logprob in zip(missing, found, strict=True):
            values[row][index] = None if logprob is None else logprob.sum
    return [
        replace(record, rewards={**record.rewards, name: known}) if record.responses else record
        for record, known in zip(batch, values)
    ]


# --- the kinds of reward -------------------------------------------------------------------------------------------


class _LogprobScorer:
    """Scores by a model's log-probabilities, less those of a reference where the context has one.

    ``mean`` divides by the response's length in the model's tokens. Sums that a record has are not computed again.
    """

    def __init__(self, model: str, context: RewardContext, mean: bool) -> None:
        if not model:
            raise UserError("reward logprob: names no model: write logprob:MODEL or logprob-sum:MODEL")
        self.mean, self.context = mean, context
        self.policy = logprob_model(model, context)
        self.reference = logprob_model(context.reference_model, context) if context.reference_model else None

    def __call__(self, items: Sequence[Item]) -> list[float | None]:
        if not items:
            return []
        lengths = [1] * len(items)
        if self.mean:
            found = self.policy(items)
            sums = [logprob and logprob.sum for logprob in found]
            lengths = [logprob.length if logprob else 1 for logprob in found]
        else:
            sums = self._sums(self.policy, items)
        if self.reference is not None:
            sums = log_ratios(sums, self._sums(self.reference, items))
        return [None if total is None else total / length for total, length in zip(sums, lengths, strict=True)]

    def _sums(self, model: LogprobModel, items: Sequence[Item]) -> list[float | None]:
        name = reference_sums_name(model.settings.model, self.context.text, self.context.max_length)
        values = [record.rewards[name][index] if name in record.rewards else None for record, index in items]
        missing = [place for place, value in enumerate(values) if value is None]
        found = model([items[place] for place in missing]) if missing else []
        for place, logprob in zip(missing, found, strict=True):
            values[place] = logprob and logprob.sum
        return values

    def close(self) -> None:
        for model in (self.policy, self.reference):
            if model is not None:
                model.close()


def _scorer(model: str, context: RewardContext, mean: bool) -> Scorer:
    return _LogprobScorer(model, context, mean)


def _digest(model: str, context: RewardContext) -> str:
    names = [model, *([context.reference_model] if context.reference_model else [])]
    return " ".join(reference_sums_name(name, context.text, context.max_length) for name in names)


LOGPROB = RewardKind(("logprob:MODEL",), partial(_scorer, mean=True), _digest)
LOGPROB_SUM = RewardKind(("logprob-sum:MODEL",), partial(_scorer, mean=False), _digest)
