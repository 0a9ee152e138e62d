"""One arm from one seed at one learning rate, carried out in a run folder by the stages there are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rrhf.common.files import replacing, write_text
from rrhf.common.logging import set_up_logging
from rrhf.evaluation.generations import draw_to_file
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.recipes.baselines.best_of_n import BestOfN, BestOfNSettings, run_best_of_n
from rrhf.recipes.baselines.ppo import Job, train_ppo
from rrhf.recipes.baselines.sft import write_responses_of
from rrhf.recipes.config import merge, parse_config
from rrhf.recipes.offline import Pass, carry_out, data_stage, evaluate_stage, sample_stage, score_stage, train_stage
from rrhf.recipes.recipe import run_recipe
from rrhf.recipes.reproduce import measure
from rrhf.recipes.reproduce.arms import AFTER_SFT, BEST_OF, NLPO, PPO, RUN, SFT, START
from rrhf.recipes.reproduce.item import Work
from rrhf.recipes.reproduce.result import result_of
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records
from rrhf.training.folder import is_trained
from rrhf.training.ppo_settings import NLPOSettings, PPOConfig

log = logging.getLogger("rrhf")

DATA_STAGES = ("data", "sample", "score")  # what arms share


def carry(work: Work) -> dict[str, Any]:
    """Bring an item to its end; what is complete is not done again.

    Returns:
        Its result, a row of the table.
    """
    arm, run = work.item.arm, work.run
    log.info(f"{arm.name}: seed {work.item.seed}" + (f", learning rate {work.item.rate:g}" if work.item.rate else ""))
    measure.reset_peak_memory()
    if run.folder.exists() and not run.config.exists():
        shutil.rmtree(run.folder)  # it was removed, or a part of it, while the arm ran: the configuration stands first
    run.remember_config(work.noted)
    set_up_logging(run.log)
    trained_before = arm.has_rate and is_trained(work.last.model)
    with _rho_texts(work):
        KINDS[arm.kind](work)
        result = result_of(work, trained_before)
    set_up_logging(work.place.log)
    return result


# -- the kinds of arms


def _run(work: Work) -> None:
    """A configuration, as `rrhf run` has it; samples that other arms train on too are drawn once."""
    if not work.item.arm.online:
        _take_shared(work)
    run_recipe(work.run, work.config, PolicyCache(work.place.said))


def _sft(work: Work) -> None:
    whole = work.whole
    if not whole.run.scored.exists():
        write_responses_of(work.scale.chosen, work.place.prompts.queries, whole.run.scored)
    carry_out([train_stage(whole), evaluate_stage(whole)], whole.run)


def _after_sft(work: Work) -> None:
    """RRHF from the model of an SFT of its own, which has the same rate and as many steps; ρ stays the first model."""
    whole, config = work.whole, work.config
    first = RunFolder(whole.run.folder / "sft")
    sft = parse_config(merge(work.values, {"train": {"ranking_loss": "none"}}), first.model)
    if not first.scored.exists():
        write_responses_of(work.scale.chosen, work.place.prompts.queries, first.scored)
    carry_out([train_stage(Pass(first, sft, config.model, whole.policies))], first, whole.run)
    _take_shared(work)
    then = replace(whole, config=replace(config, model=replace(config.model, model=str(first.model))))
    stages = (data_stage, sample_stage, score_stage, train_stage, evaluate_stage)
    carry_out([make(then) for make in stages], whole.run)


def _ppo(work: Work) -> None:
    whole, arm, rate = work.whole, work.item.arm, work.item.rate
    assert rate is not None
    nlpo = NLPOSettings() if arm.kind == NLPO else None
    ppo = PPOConfig(**work.scale.ppo_settings(arm, work.item.seed, rate))
    config = work.config  # whose queries are cut as other arms train on them
    job = Job(work.place.prompts.queries, whole.run.model, config.model, config.score, ppo, config.train.text,
              config.adapter, nlpo, config.score_remote)  # fmt: skip
    if not is_trained(whole.run.model):
        with whole.run.timed("train"):
            train_ppo(job)
        spent = dict.fromkeys(("sample", "score"), 0.0)
        for line in measure.ppo_history(whole.run.model):
            spent["sample"] += line["sampling_share"] * line["seconds"]
            spent["score"] += line["scoring_share"] * line["seconds"]
        whole.run.split_time("train", spent)
    carry_out([evaluate_stage(whole)], whole.run)


def _start(work: Work) -> None:
    whole = work.whole
    if not whole.run.evaluation.exists():
        with whole.run.timed("evaluate"):
            _evaluate(work, {"rho": whole.rho, "pi": whole.rho})


def _best_of(work: Work) -> None:
    """`rrhf baseline best-of-n` on the held-out prompts; what it keeps is judged beside ρ's texts as all arms' are."""
    whole, config = work.whole, work.config
    run, inner = whole.run, work.best_of_n
    if run.evaluation.exists():
        return
    sampling = config.evaluate_sampling
    if sampling.policy == "greedy":  # of which all samples would be one
        sampling = measure.from_all(sampling)
    gold = BestOfNSettings(config.evaluate_rewards.reward[1:])
    run_best_of_n(
        BestOfN(
            run.held_out, inner.folder, config.model, replace(sampling, num_responses=work.item.arm.number),
            config.score, config.scoring, config.text, config.score_remote, config.evaluate, gold,
        )
    )  # fmt: skip
    spent = {name: took for name, took in measure.seconds(inner.timings).items() if name in DATA_STAGES}
    write_text(run.timings, json.dumps(spent, indent=1) + "\n")
    best = list(read_records(inner.folder / "best.jsonl"))
    with run.timed("evaluate"):
        _evaluate(work, {"rho": whole.rho, "pi": whole.rho}, [(one.responses[0], one.finish[0]) for one in best])


KINDS = {RUN: _run, SFT: _sft, PPO: _ppo, NLPO: _ppo, BEST_OF: _best_of, START: _start, AFTER_SFT: _after_sft}


def _evaluate(work: Work, models: Mapping[str, ModelSettings], texts: list[tuple[str, str]] | None = None) -> None:
    """Write the evaluation of ``texts``, or of what ``models["pi"]`` writes, beside what ρ wrote."""
    from rrhf.evaluation.perplexity import nll_under
    from rrhf.evaluation.texts import evaluate_texts

    whole, config = work.whole, work.config
    run, sampling, policies = whole.run, replace(config.evaluate_sampling, num_responses=1), whole.policies
    prompts = [record.without_responses() for record in read_records(run.held_out)]
    drawn = draw_to_file(run.folder / "evaluation.rho.jsonl", prompts, models["rho"], sampling, config.text, "rho",
                         policies=policies)  # fmt: skip
    judge = config.evaluate.judge(dict(models))
    result, rows = evaluate_texts(
        prompts, drawn, drawn if texts is None else texts, config.evaluate_rewards.reward,
        perplexity=nll_under(*policies.get(replace(whole.rho, model=judge)), config.text, said=policies.said(judge)),
        perplexity_model=judge,
        seed=sampling.seed, cut_markers=config.evaluate.cut_markers, generations="evaluation.generations.jsonl",
    )  # fmt: skip
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(run.folder / "evaluation.generations.jsonl", lines)
    write_text(run.evaluation, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


# -- what arms share


def _take_shared(work: Work) -> None:
    """Put the samples and scores that other arms with the same settings have too into the run, made now or before.

    Their seconds count in the times of every arm that takes them.
    """
    config, run = work.config, work.run
    first = run.round(1) if config.rounds.iterations > 1 else run
    if first.scored.exists():
        return
    same = {key: value for key, value in work.values.items() if key not in ("train", "evaluate", "iterations")}
    name = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    shared = RunFolder(work.place.shared / name)
    with work.place.claimed(f"shared/{name}", wait=True):
        once = Pass(shared, config, config.model, PolicyCache())
        carry_out([data_stage(once), sample_stage(once), score_stage(once)], shared)
    timings = {name: took for name, took in measure.seconds(shared.timings).items() if name in DATA_STAGES}
    for inner in {run.folder: run, first.folder: first}.values():
        inner.folder.mkdir(parents=True, exist_ok=True)
        write_text(inner.timings, json.dumps(timings, indent=1) + "\n")
    for source, target in (
        (shared.queries, run.queries), (shared.held_out, run.held_out), (shared.responses, first.responses),
        (shared.scored, first.scored),
    ):  # fmt: skip
        _copy(source, target)


@contextlib.contextmanager
def _rho_texts(work: Work) -> Iterator[None]:
    """Give the run what ρ wrote to the held-out prompts from this seed, where another arm has it; else keep its own."""
    names = ("evaluation.rho.jsonl", "evaluation.rho.made-of.json")
    kept, folder = work.place.shared / f"rho-seed-{work.item.seed}", work.last.folder
    for name in names:
        if (kept / name).exists() and not (folder / name).exists():
            _copy(kept / name, folder / name)
    yield
    for name in names:
        if not (kept / name).exists():
            _copy(folder / name, kept / name)


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
