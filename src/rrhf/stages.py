"""The stages of the data flow as functions over files: what the commands and the recipes share.

queries → ``sample_file`` → responses → ``score_file`` → scores → ``train_model`` → policy → ``evaluate_models``.
Each writes its output whole or not at all, and goes on where a stopped run was.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.adapters import load_policy_or_adapter
from rrhf.files import write_text
from rrhf.models import ModelSettings
from rrhf.parts import in_parts
from rrhf.records import Record, count_records, read_records
from rrhf.sampling.settings import SamplingSettings
from rrhf.text import TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("rrhf")

SCORING_PART = 512  # records in a part


@dataclass
class Loaded:
    """Loads policies on demand and keeps the last one, since consecutive stages often share it."""

    settings: ModelSettings | None = None
    policy: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def get(self, settings: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.settings != settings or self.policy is None:
            self.policy = None  # free the one before
            self.policy, self.settings = load_policy_or_adapter(settings), settings
            model = self.policy[0]
            log.info(
                f"{settings.model}: {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype}, on {model.device}"
            )
        return self.policy


@dataclass(frozen=True)
class RewardSettings:
    """What scores responses."""

    reward: list[str] = field(
        metadata={"help": "pkg.module:function, provided, or provided:NAME; several are summed", "nargs": "+"}
    )
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "one factor a reward; default: 1 each", "nargs": "*"}
    )


def score_file(data: Path, output: Path, settings: RewardSettings, *, overwrite: bool = False) -> None:
    """Score the responses of ``data`` and write the records with ``rewards`` and ``scores`` to ``output``."""
    from rrhf.rewards import score_records

    weights = settings.reward_weights or None
    score_records([], settings.reward, weights=weights)  # an unknown reward is refused before any work

    def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        for record in score_records(block, settings.reward, weights=weights):
            yield record
            done(1)

    in_parts(
        lambda: read_records(data, require="responses"),
        output,
        {"score": work},
        asdict(settings),
        part_size=SCORING_PART,
        overwrite=overwrite,
        total=count_records(data),
    )


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
    loaded: Loaded | None = None,
) -> dict[str, Any]:
    """Draw one response a prompt from each of ``models`` (``rho``, ``pi`` or one of them) and measure them.

    Writes ``output`` (evaluation.json), and beside it ``generations.jsonl`` and each model's ``NAME.jsonl``.
    """
    from rrhf.evaluation import evaluate_texts
    from rrhf.evaluation.policies import nll_under
    from rrhf.sampling.sources import sample_file

    loaded = loaded or Loaded()
    folder = output.parent
    sampling = replace(sampling, num_responses=1)
    texts: dict[str, list[tuple[str, str]]] = {}
    records: list[Record] = []
    for name, model in models.items():
        drawn = folder / f"{output.stem}.{name}.jsonl"
        if overwrite:
            drawn.unlink(missing_ok=True)
        if not drawn.exists():
            prompts = [
                replace(r, responses=[], sources=[], finish=[], scores=[], rewards={}) for r in read_records(held_out)
            ]
            sample_file(
                prompts,
                drawn,
                model,
                sampling,
                text,
                loaded=loaded,
                description=f"responses of {name}",
                merge=False,
            )
        records = list(read_records(drawn, require="query"))
        texts[name] = [(record.responses[0], record.finish[0]) for record in records]
    judge = settings.perplexity_model or models.get("rho", models.get("pi", ModelSettings(""))).model
    perplexity = nll_under(*loaded.get(replace(next(iter(models.values())), model=judge)), text)
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


TRAINED = "training.json"  # written last: a model folder that has it is complete


def is_trained(folder: Path) -> bool:
    """Whether a training run in ``folder`` came to its end."""
    return (folder / TRAINED).exists()


def describe_counts(counts: Counter[str]) -> str:
    """``3 empty response dropped; 1 …`` for the reasons counted."""
    return "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
