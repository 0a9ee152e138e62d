"""Evaluate policies that are in memory: draw one response a prompt from each, then judge the texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rrhf.evaluation.perplexity import nll_under
from rrhf.evaluation.texts import Text, evaluate_texts
from rrhf.models.tokenization import TextSettings
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrhf.rewards.functions import RewardFunction


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
    context: RewardContext | None = None,
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
        context: what rewards need beside their names.

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
        context=context,
    )
    return {**result, "generations": rows}
