"""Evaluate policies: draw one response a prompt from each, then judge the texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rrhf.evaluation.texts import Perplexity, Text, evaluate_texts
from rrhf.models.tokenization import TextFormat, TextSettings
from rrhf.records.record import Record
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrhf.rewards.functions import RewardFunction

SCORING_TOKENS = 4096  # tokens of one forward pass that scores texts


def nll_under(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: TextSettings | None = None, show: bool = True
) -> Perplexity:
    """A function (records, texts) → (total negative log-likelihood, total tokens) of the texts given the queries.

    ``show`` its progress; without, it is silent.
    """
    import torch

    from rrhf.common.progress import progress
    from rrhf.models.batching import plan_forwards
    from rrhf.models.passes import response_logprobs
    from rrhf.models.path_check import usable_path

    format = TextFormat(tokenizer, text)
    path = usable_path(model)

    @torch.inference_mode()
    def measure(records: Sequence[Record], texts: Sequence[Text]) -> tuple[float, int]:
        pairs = [
            format.encode_record(replace(record, responses=[t], finish=[f], sources=["evaluated/0"], scores=[]))
            for record, (t, f) in zip(records, texts, strict=True)
        ]
        nll, tokens = 0.0, 0
        forwards = plan_forwards(pairs, SCORING_TOKENS, path)
        for forward in progress(forwards, "perplexity", unit="batches") if show else forwards:
            found = response_logprobs(model, forward.records, path)
            nll -= float(found.sums.double().sum())
            tokens += int(found.lengths.sum())
        return nll, tokens

    return measure


def draw_texts(sampler: Sampler, records: Sequence[Record]) -> list[Text]:
    """One response a record, with its finish."""
    drawn = {i: (texts[0], finish[0]) for i, texts, finish in sampler.respond(records)}
    return [drawn[i] for i in range(len(records))]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record],
    rewards: Sequence[str | RewardFunction],
    *,
    reference_model: PreTrainedModel | None = None,
    sampling: SamplingSettings | None = None,
    text: TextSettings | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure ``model`` (π), and ``reference_model`` (ρ) on the same prompts where one is given.

    Args:
        model, tokenizer: the policy.
        records: held-out prompts; their own responses are not looked at.
        rewards: names or functions, as ``rrhf.score`` takes them; the first is the main one.
        reference_model: what the gain is measured against; perplexities are under it too, else under ``model``.
        sampling: how to draw; one response a prompt. Default: greedy.
        text: system prompt, template arguments, query limit.
        seed: of the draws and of the bootstrap.

    Returns:
        What ``evaluation.json`` holds, with the texts under ``"generations"``.
    """
    records = list(records)
    settings = replace(sampling or SamplingSettings(policy="greedy"), num_responses=1, seed=seed)
    policies = {"rho": reference_model, "pi": model}
    texts = {
        name: draw_texts(Sampler(policy, tokenizer, settings, text), records)
        for name, policy in policies.items()
        if policy is not None
    }
    judge = reference_model or model
    result, rows = evaluate_texts(
        records,
        texts.get("rho"),
        texts.get("pi"),
        rewards,
        perplexity=nll_under(judge, tokenizer, text),
        perplexity_model=judge.name_or_path or type(judge).__name__,
        seed=seed,
    )
    return {**result, "generations": rows}
