"""The evaluation stage: a file of held-out queries and one or two models → a file of numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.evaluation.generations import draw_to_file
from rrhf.evaluation.metrics import TURN_MARKERS
from rrhf.evaluation.texts import Text
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.settings import SamplingSettings

log = logging.getLogger("rrhf")


REFUSED = ("num_responses", "reward_weights")  # flags of what samples and scores: see ``refuse_unusable``


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation measures beside the rewards."""

    perplexity_model: str | None = field(
        default=None, metadata={"help": "whose perplexity is reported; default: the reference's, or the model's own"}
    )
    cut_markers: list[str] = field(
        default_factory=lambda: list(TURN_MARKERS),
        metadata={"help": "dialogue responses are cut at the first of these before they are scored", "nargs": "*"},
    )
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "most tokens of a reward model's forward pass; default: by the device"}
    )

    def judge(self, models: dict[str, ModelSettings]) -> str:
        """The name of the model whose perplexity is reported where ``models`` (``rho``, ``pi``) are evaluated."""
        return self.perplexity_model or models.get("rho", models["pi"]).model


def reward_context(
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    settings: EvaluationSettings,
    remote: EndpointLimits | None = None,
    reference_model: str | None = None,
) -> RewardContext:
    """What an evaluation's rewards are given: the device and type of the policy, its seed and its texts."""
    return RewardContext(
        device=model.device,
        dtype=model.dtype,
        max_tokens_per_forward=settings.max_tokens_per_forward,
        text=text,
        reference_model=reference_model,
        remote=remote or EndpointLimits(),
        seed=sampling.seed,
    )


def refuse_unusable(rewards: RewardSettings, sampling: SamplingSettings, context: RewardContext | None = None) -> None:
    """Refuse, before any work, what cannot judge new texts or would be ignored.

    Raises:
        UserError: a reward is unknown or reads scores that records bring; weights, or several responses, are asked for.
    """
    from rrhf.rewards.scoring import is_provided, score_records

    if rewards.reward:
        score_records([], rewards.reward, context=context)
    faults = [
        f"--reward {reward}: reads scores that records bring, which new texts lack and pairs are judged by: name "
        "pkg.module:function"
        for reward in rewards.reward
        if is_provided(reward)
    ]
    if rewards.reward_weights:
        faults.append("--reward_weights: an evaluation shows every reward by itself: leave it out")
    if sampling.num_responses not in (None, 1):
        faults.append(f"--num_responses {sampling.num_responses}: an evaluation draws one response a prompt")
    if faults:
        raise UserError("\n".join(faults))


def draw_texts(
    held_out: Path,
    output: Path,
    models: Mapping[str, ModelSettings],
    sampling: SamplingSettings,
    text: TextSettings,
    *,
    policies: PolicyCache,
    overwrite: bool = False,
) -> tuple[list[Record], dict[str, list[Text]]]:
    """The prompts, and what each of ``models`` writes to them, in its file beside ``output``; see ``draw_to_file``."""
    prompts = [record.without_responses() for record in read_records(held_out)]
    one = replace(sampling, num_responses=1)
    places = {name: output.with_name(f"{output.stem}.{name}.jsonl") for name in models}
    return prompts, {
        name: draw_to_file(places[name], prompts, model, one, text, name, policies=policies, overwrite=overwrite)
        for name, model in models.items()
    }


def evaluate_models(
    held_out: Path,
    output: Path,
    models: dict[str, ModelSettings],
    rewards: RewardSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    settings: EvaluationSettings,
    *,
    context: RewardContext | None = None,
    more: dict[str, Any] | None = None,
    overwrite: bool = False,
    policies: PolicyCache | None = None,
) -> dict[str, Any]:
    """Draw one response a prompt from each of ``models`` (``rho`` and ``pi``, or ``pi`` alone) and measure them.

    Writes ``output`` (evaluation.json), and beside it, with the stem of its name in front, ``.generations.jsonl`` and
    each model's ``.NAME.jsonl``, which a stopped evaluation takes up again where it was made of the same.

    Args:
        context: what the rewards need beside their names; see ``reward_context``.
        more: what else stands in ``output``.

    Raises:
        UserError: a model, a reward or a prompt is not usable; the perplexity model's context is too short.
    """
    from rrhf.evaluation.perplexity import nll_under, refuse_short_context
    from rrhf.evaluation.texts import evaluate_texts

    policies = policies or PolicyCache()
    judge = settings.judge(models)
    context = context or reward_context(models["pi"], sampling, text, settings)
    context = replace(context, journals=context.journals or output.with_name(f"{output.stem}.journals"))
    refuse_unusable(rewards, sampling, context)
    refuse_short_context(judge, sampling.max_new_tokens)
    sampling = replace(sampling, num_responses=1)
    prompts, texts = draw_texts(held_out, output, models, sampling, text, policies=policies, overwrite=overwrite)
    result, rows = evaluate_texts(
        prompts,
        texts.get("rho"),
        texts["pi"],
        rewards.reward,
        perplexity=nll_under(*policies.get(replace(models["pi"], model=judge)), text, said=policies.said(judge)),
        perplexity_model=judge,
        seed=sampling.seed,
        cut_markers=settings.cut_markers,
        settings={"sampling": asdict(sampling), "models": {name: model.model for name, model in models.items()}},
        generations=f"{output.stem}.generations.jsonl",
        context=context,
    )
    for name in models:
        if queries_cut := result[name]["perplexity_queries_cut"]:
            log.info(f"perplexity of {name}: {queries_cut} queries were cut from the left to the context of {judge}")
    result |= more or {}
    _write(output, result, rows)
    return result


def _write(output: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(output.with_name(result["generations"]), lines)
    write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
