"""The stages of the data flow as functions over files: what the commands and the recipes share.

queries → ``sample_file`` → responses → ``score_file`` → scores → ``train_model`` → policy → ``evaluate_models``.
Each writes its output whole or not at all, and goes on where a stopped run was.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rrhf.common.files import write_text
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.settings import SamplingSettings

log = logging.getLogger("rrhf")


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation measures beside the rewards."""

    perplexity_model: str | None = field(
        default=None, metadata={"help": "whose perplexity is reported; default: the reference's, or the model's own"}
    )
    cut_markers: list[str] = field(
        default_factory=lambda: ["Human:", "Assistant:"],
        metadata={"help": "dialogue responses are cut at the first of these before they are scored", "nargs": "*"},
    )


def evaluate_models(
    held_out: Path,
    output: Path,
    models: dict[str, ModelSettings],
    rewards: RewardSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    settings: EvaluationSettings,
    *,
    overwrite: bool = False,
    policies: PolicyCache | None = None,
) -> dict[str, Any]:
    """Draw one response a prompt from each of ``models`` (``rho``, ``pi`` or one of them) and measure them.

    Writes ``output`` (evaluation.json), and beside it ``generations.jsonl`` and each model's ``NAME.jsonl``.
    """
    from rrhf.evaluation import evaluate_texts
    from rrhf.evaluation.policies import nll_under
    from rrhf.sampling.stage import sample_file

    policies = policies or PolicyCache()
    folder = output.parent
    sampling = replace(sampling, num_responses=1)
    texts: dict[str, list[tuple[str, str]]] = {}
    records: list[Record] = []
    for name, model in models.items():
        drawn = folder / f"{output.stem}.{name}.jsonl"
        if overwrite:
            drawn.unlink(missing_ok=True)
        if not drawn.exists():
            prompts = [record.without_responses() for record in read_records(held_out)]
            sample_file(
                prompts,
                drawn,
                model,
                sampling,
                text,
                policies=policies,
                description=f"responses of {name}",
                merge=False,
            )
        records = list(read_records(drawn, require="query"))
        texts[name] = [(record.responses[0], record.finish[0]) for record in records]
    judge = settings.perplexity_model or models.get("rho", models.get("pi", ModelSettings(""))).model
    perplexity = nll_under(*policies.get(replace(next(iter(models.values())), model=judge)), text)
    result, rows = evaluate_texts(
        records,
        texts.get("rho"),
        texts.get("pi"),
        rewards.reward,
        perplexity=perplexity,
        perplexity_model=judge,
        seed=sampling.seed,
        cut_markers=settings.cut_markers,
        settings={"sampling": asdict(sampling), "models": {name: model.model for name, model in models.items()}},
        generations=f"{output.stem}.generations.jsonl",
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / result["generations"], lines)
    write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result
