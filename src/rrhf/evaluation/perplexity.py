"""The likelihood of texts under one fixed model, the judge, whose context they must fit."""

from __future__ import annotations

import json
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rrhf.common.errors import UserError
from rrhf.evaluation.texts import Likelihood, Perplexity, Text
from rrhf.models.cache import TextKey
from rrhf.models.folders import no_folder
from rrhf.models.load import context_length
from rrhf.models.locate import locate
from rrhf.models.tokenization import EncodedRecord, TextFormat, TextSettings, cut_left
from rrhf.records.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrhf.models.batching import Forward

SCORING_TOKENS = 4096  # tokens of one forward pass that scores texts


def nll_under(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSettings | None = None,
    show: bool = True,
    said: MutableMapping[TextKey, tuple[float, int]] | None = None,
    what: str = "perplexity",
) -> Perplexity:
    """The function (records, texts) → ``Likelihood`` of the texts given the records' queries, under ``model``.

    A query that does not fit the model's context together with its texts is cut from the left. All lengths are
    checked before the first forward pass. Texts to one query are read together.

    Args:
        show: whether a progress bar is shown.
        said: (query, text, finish) → its number: what is there is not computed again, what is computed is put there.
            Texts whose query was cut are not.
        what: the progress bar's name.

    Raises (the function):
        UserError: a text alone does not fit the model's context.
    """
    import torch

    from rrhf.common.progress import progress
    from rrhf.models.batching import plan_forwards
    from rrhf.models.out_of_memory import run_forwards
    from rrhf.models.path_check import usable_path

    format = TextFormat(tokenizer, text)
    path = usable_path(model)
    context = context_length(model)

    @torch.inference_mode()
    def measure(records: Sequence[Record], texts: Sequence[Text]) -> Likelihood:
        keys = [(json.dumps(record.query), *text) for record, text in zip(records, texts, strict=True)]
        known = {key: said[key] for key in keys if key in said} if said else {}
        groups: dict[str, tuple[Record, list[TextKey]]] = {}  # what is to be read, by query
        for record, key in zip(records, keys, strict=True):
            if key not in known and key not in (group := groups.setdefault(key[0], (record, []))[1]):
                group.append(key)
        encoded = [format.encode_record(_with_texts(record, group)) for record, group in groups.values()]
        fitting = fit_context(encoded, context, tokenizer.bos_token_id)
        asked = {id(fits): group for fits, (_, group) in zip(fitting, groups.values(), strict=True)}
        passes = run_forwards(model, fitting, SCORING_TOKENS, path, lambda forward: _numbers(model, forward, path))
        total = len(plan_forwards(fitting, SCORING_TOKENS, path))
        for forward, numbers in progress(passes, what, total, "batches") if show else passes:
            found = iter(numbers)
            known |= {key: next(found) for record in forward.records for key in asked[id(record)]}
        cut = {key for fits, whole in zip(fitting, encoded, strict=True) if len(fits.query) < len(whole.query)
               for key in asked[id(fits)]}  # fmt: skip
        if said is not None:
            for key in dict.fromkeys(keys):
                if key not in cut:
                    said[key] = known[key]
        of_text = [known[key] for key in keys]
        nll, tokens = sum(nll for nll, _ in of_text), sum(tokens for _, tokens in of_text)
        return Likelihood(nll, tokens, sum(key in cut for key in keys), of_text)

    return measure


def _numbers(model: PreTrainedModel, forward: Forward, path: str) -> list[tuple[float, int]]:
    """−Σ log P and the number of tokens of every response, in order."""
    from rrhf.models.passes import response_logprobs

    parts = [response_logprobs(model, part, path) for part in forward.parts()]
    return [
        (-logprob, int(length))
        for found in parts
        for logprob, length in zip(found.sums.double().tolist(), found.lengths.tolist(), strict=True)
    ]


def _with_texts(record: Record, keys: Sequence[TextKey]) -> Record:
    texts, finishes = [text for _, text, _ in keys], [finish for _, _, finish in keys]
    tags = [f"evaluated/{number}" for number in range(len(keys))]
    return replace(record.without_responses(), responses=texts, finish=finishes, sources=tags)


def fit_context(encoded: Sequence[EncodedRecord], context: int | None, bos: int | None = None) -> list[EncodedRecord]:
    """Cut queries from the left until each fits ``context`` tokens with its longest response.

    Args:
        encoded: token ids of the records.
        context: the most tokens of a row; None where there is no limit.
        bos: the token that begins a text; a query that has it in front keeps it there.

    Raises:
        UserError: a response leaves no room for a token of its query.
    """
    if context is None:
        return list(encoded)
    fitting: list[EncodedRecord] = []
    for record in encoded:
        longest = max(map(len, record.responses), default=0)
        room = context - longest
        if room < 1:
            raise UserError(
                f"record {record.id!r}: a response of {longest} tokens does not fit the perplexity model's context of "
                f"{context} with a token of its query: lower --max_new_tokens, or name a --perplexity_model with a "
                "longer context"
            )
        if len(record.query) > room:
            record = replace(record, query=cut_left(record.query, room, bos))
        fitting.append(record)
    return fitting


def refuse_short_context(judge: str, max_new_tokens: int) -> None:
    """Refuse, before any work, a perplexity model whose context a response of ``max_new_tokens`` fills.

    The model's configuration is read, not its weights. Its tokenizer may cut a text in more tokens than the policy's
    does, so that ``fit_context`` looks again.

    Raises:
        UserError: the context is too short, or no configuration can be read.
    """
    from transformers import AutoConfig

    try:
        context = context_length(AutoConfig.from_pretrained(locate(judge).source))
    except (OSError, ValueError, ImportError, KeyError) as error:
        key = "evaluate.perplexity_model, as a flag --perplexity_model; by default ρ"
        raise UserError(f"perplexity model {judge} ({key}): cannot be loaded: {error}{no_folder(judge)}") from error
    if context is not None and max_new_tokens >= context:
        raise UserError(
            f"responses of --max_new_tokens {max_new_tokens} do not fit the context of {context} tokens of the "
            f"perplexity model {judge}: lower --max_new_tokens, or name another --perplexity_model"
        )
