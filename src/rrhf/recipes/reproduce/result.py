"""The result of an arm that was carried out: a row of the table, with all that the study asks of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.common.environment import commit
from rrhf.common.files import read_object
from rrhf.evaluation.best_of_n import kl_bound
from rrhf.evaluation.pairs import evaluate_pairs, kept_scores, verdict
from rrhf.evaluation.stage import EvaluationSettings, evaluate_models
from rrhf.models.cache import PolicyCache
from rrhf.models.identity import model_digest
from rrhf.recipes.config import RunConfig
from rrhf.recipes.offline import loss_needs
from rrhf.recipes.reproduce import measure
from rrhf.recipes.reproduce.arms import AFTER_SFT, BEST_OF, NLPO, PPO, START, Arm
from rrhf.recipes.reproduce.item import Work
from rrhf.recipes.reproduce.scale import Scale, queries_a_step
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import may_hold_a_model, reward_digest
from rrhf.rewards.stage import RewardSettings, score_file
from rrhf.training.folder import TRAINED
from rrhf.training.ppo_settings import PPOConfig
from rrhf.training.windows import FOLDER as WINDOWS

KL_FILE, RATE_FILE, PAIRS_FILE = "kl.jsonl", "rate.json", "accuracy.json"


def result_of(work: Work, trained_before: bool = False) -> dict[str, Any]:
    """The row of an item that is complete.

    Args:
        work: the item.
        trained_before: whether another process trained it, whose peak of memory is not known here.
    """
    item, run, config = work.item, work.run, work.config
    arm, samples = item.arm, work.scale.held_out_samples
    generations = run.folder / "evaluation.generations.jsonl"
    rate_reward = _rate_reward(work) if arm.has_rate else None
    with run.timed("kl"):
        kl = _kl(work)
    with run.timed("accuracy"):
        accuracy = _accuracy(work)
    training = read_object(work.last.model / TRAINED) if arm.has_rate else {}
    return {
        "task": work.scale.task,
        "scale": work.scale.name,
        "arm": arm.name,
        "paper": arm.paper,
        "seed": item.seed,
        "learning_rate": item.rate,
        "rate_reward": rate_reward,
        **measure.evaluation_numbers(read_object(run.evaluation), generations, samples),
        "kl": kl,
        "accuracy": accuracy,
        "training_scores": _training_scores(work),
        "history": measure.training_history(work.last.model) if arm.has_rate else [],
        "best_of_n": read_object(work.best_of_n.evaluation).get("best_of_n"),
        "prompts": measure.rounded(measure.prompt_rewards(generations, samples=samples)),
        "looping": measure.looping(generations),
        "steps": steps_of(arm, work.scale, training),
        **_tokens(work),
        "models_resident": training.get("models_resident") or models_resident(arm, config),
        "peak_memory_bytes": None if trained_before else measure.peak_memory(config.model.device),
        "seconds": measure.seconds(run.timings),
        "load": measure.load(),
        "processors": os.cpu_count(),
        "commit": commit(),
        "trained_at": trained_at(run, trained_before) if arm.has_rate else None,
        "model": model_digest(config.model.model)[:16],
        "reward_digests": reward_digests(config),
        "held_out": measure.queries_digest(work.place.prompts.held_out, samples),
        "config": work.noted,
        "asked": list(work.scale.asked),
    }


def reward_digests(config: RunConfig) -> list[str]:
    """Of each reward that judges, a digest of the model behind it; "" for functions, whose code the commit tells."""
    anywhere = RewardContext(device="cpu", dtype="float32")  # the type that is computed in makes no other model
    rewards = config.evaluate_rewards.reward
    return [reward_digest(name, anywhere)[:16] if may_hold_a_model(name) else "" for name in rewards]


def steps_of(arm: Arm, scale: Scale, training: Mapping[str, Any]) -> int:
    """Optimiser steps of all its trainings; PPO's are rounded up to whole rollouts."""
    if not arm.has_rate:
        return 0
    if arm.kind in (PPO, NLPO):
        return int(training["steps"])
    return arm.trainings * (scale.steps // arm.rounds * arm.rounds)


def trained_at(run: RunFolder, trained_before: bool = False) -> str | None:
    """The commit that trained the model, which an evaluation anew can be later than; None where nothing kept it."""
    for environment in read_object(run.environment).get("environments", []):
        if "train" in environment["stages"]:
            return str(environment["versions"]["rrhf"])
    return None if trained_before else commit()


def _rate_reward(work: Work) -> float:
    """The mean reward that trains, on the prompts on which learning rates are chosen."""
    place, config = work.run.folder / RATE_FILE, work.config
    if not place.exists():
        with work.run.timed("rate"):
            evaluate_models(
                work.place.prompts.rates, place, {"pi": work.trained},
                RewardSettings(config.evaluate_rewards.reward[:1]), config.evaluate_sampling, config.text,
                EvaluationSettings(perplexity_model=config.model.model),
            )  # fmt: skip
    mean: float = read_object(place)["pi"]["reward_mean"]
    return mean


def _kl(work: Work) -> dict[str, Any]:
    arm, config = work.item.arm, work.config
    if arm.kind == START:
        return {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 0, "how": "ρ itself"}
    if arm.kind == BEST_OF:
        bound = kl_bound(arm.number)
        return {"mean": bound, "low": None, "high": None, "n": 0, "how": "bound log n − (n − 1)/n"}
    prompts = [record.without_responses() for record in read_records(work.place.prompts.held_out)]
    policies = PolicyCache(work.place.said)
    evaluated = work.last.folder / "evaluation.pi.jsonl"
    texts = measure.texts_for_kl(evaluated, work.run.folder / KL_FILE, prompts, work.trained,
                                 replace(config.evaluate_sampling, num_responses=1), config.text,
                                 policies)  # fmt: skip
    found = measure.kl_to_reference(
        texts, work.trained, config.model, config.text, work.item.seed, work.scale.held_out_samples, policies
    )
    return {**found, "how": "mean of log π − log ρ over responses of π"}


def _accuracy(work: Work) -> dict[str, Any] | None:
    """How often p_i of ρ and of π order two responses as people do (Table 5), or as the reward that trains does."""
    arm, config = work.item.arm, work.config
    if not arm.has_rate:
        return None
    pairs = _pairs(work)
    if not any(map(_prefers, read_records(pairs))):
        return None
    models = {"rho": config.model, "pi": work.trained}
    context = RewardContext(device=config.model.device, dtype=config.model.dtype, text=config.text,
                            seed=work.item.seed)  # fmt: skip
    of_rho = work.place.shared / PAIRS_FILE
    with work.place.claimed("shared/accuracy", wait=True):
        if not kept_scores(of_rho).exists():
            evaluate_pairs(pairs, of_rho, {"rho": config.model}, [], context)
    found = evaluate_pairs(kept_scores(of_rho), work.run.folder / PAIRS_FILE, models, [], context, brought=["rho"])
    return {name: found[name]["accuracy"] for name in models} | {"gain": found["gain"], "n": found["pi"]["n"]}


def _prefers(record: Record) -> bool:
    """Whether the record's scores prefer a response to another."""
    return verdict(record.scores or [], record.scores or []) is not None


def _pairs(work: Work) -> Path:
    """The held-out prompts whose own responses are preferred one to another; made once for all arms.

    Where the data has no such, 4 scored samples from the whole of ρ to each prompt that chooses rates.
    """
    from rrhf.sampling.stage import sample_file

    place, config = work.place, work.config
    drawn, scored = place.shared / "pairs.responses.jsonl", place.shared / "pairs.jsonl"
    with place.claimed("shared/pairs", wait=True):
        held_out = islice(read_records(place.prompts.held_out), None, None, work.scale.held_out_samples)
        if not scored.exists() and (preferred := [record for record in held_out if _prefers(record)]):
            write_records(scored, preferred)
        if scored.exists():
            return scored
        if not drawn.exists():
            prompts = [record.without_responses() for record in read_records(place.prompts.rates)]
            sampling = replace(measure.from_all(config.evaluate_sampling), num_responses=4, seed=0)
            sample_file(prompts, drawn, config.model, sampling, config.text, policies=PolicyCache())
        rewards = RewardSettings(config.evaluate_rewards.reward[:1])
        scoring = replace(config.scoring, kl_beta=0.0, reference_model=None)
        score_file(drawn, scored, rewards, scoring, config.text, config.score_remote)
    return scored


def _training_scores(work: Work) -> dict[str, float | None] | None:
    """Of the responses of the last round, or of all windows; None where nothing was trained on scores."""
    arm, run = work.item.arm, work.run
    if not arm.has_rate or arm.kind in (PPO, NLPO):
        return None
    if arm.online:
        each = [measure.training_scores(file) for file in sorted((run.model / WINDOWS).glob("*.jsonl"))]
        known = [(one["mean"], one["max"]) for one in each if one["mean"] is not None and one["max"] is not None]
        means = [sum(column) / len(known) for column in zip(*known)]
        return {"mean": means[0], "max": means[1]} if known else None
    return measure.training_scores(work.last.scored)


def _tokens(work: Work) -> dict[str, int]:
    """Responses sampled from models and their tokens, and the tokens that a training has read."""
    arm, run = work.item.arm, work.run
    count = measure.token_counter(work.config.model)
    if arm.kind == START:
        return {"samples": 0, "tokens_sampled": 0, "tokens_trained": 0}
    if arm.kind in (PPO, NLPO):
        history = measure.ppo_history(run.model)
        tokens = round(sum(line["responses"] * line["length_mean"] for line in history))
        samples = sum(line["responses"] for line in history)
        epochs = PPOConfig(**work.scale.ppo_settings(arm, work.item.seed, work.item.rate or 1.0)).ppo_epochs
        return {"samples": samples, "tokens_sampled": tokens, "tokens_trained": tokens * epochs}
    if arm.online:
        files, passes = sorted((run.model / WINDOWS).glob("*.jsonl")), 1.0
    else:
        one = work.best_of_n if arm.kind == BEST_OF else run
        folders = [run.round(n) for n in range(1, arm.rounds + 1)] if arm.rounds > 1 else [one]
        files = [folder.scored for folder in folders]
        queries = sum(1 for _ in read_records(work.place.prompts.queries))
        if arm.kind == AFTER_SFT:
            files.append(RunFolder(run.folder / "sft").scored)
        passes = work.scale.steps / arm.rounds * queries_a_step(work.scale.config["train"]) / queries
    brought = measure.sources_of(work.place.prompts.queries)
    each = [measure.response_tokens(file, count, brought) for file in files]
    trained = 0.0 if arm.kind == BEST_OF else passes * sum(file["tokens"] for file in each)
    return {
        "samples": sum(file["sampled"] for file in each),
        "tokens_sampled": sum(file["sampled_tokens"] for file in each),
        "tokens_trained": round(trained),
    }


def models_resident(arm: Arm, config: RunConfig) -> int:
    """Models in memory at once in training: the policy; while sampling as well its rewards that are models, and ρ.

    ρ is there for a KL penalty, and for a loss that ranks log π/ρ.
    """
    if not arm.online:
        return 1
    rewards = sum(":" not in reward for reward in config.score.reward)  # functions hold nothing that is counted
    return 1 + rewards + int(arm.kl or any("reference" in name for name in loss_needs(config)))
