"""The paper's workflow in a run folder: sample once, score, train, evaluate, report. Run again, it goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.cluster.pool import open_pool
from rrhf.common.errors import UserError
from rrhf.common.imports import code_digest
from rrhf.common.launch import is_first, wait_for_first
from rrhf.common.remote import push_finished
from rrhf.evaluation.stage import draw_texts, evaluate_models, reward_context
from rrhf.models.cache import PolicyCache
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings, tokenizer_and_config
from rrhf.models.locate import locate
from rrhf.recipes.config import RunConfig
from rrhf.recipes.data import data_digests, write_queries
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Require
from rrhf.report.card import write_card
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.stage import rewards_digests, score_file
from rrhf.sampling.settings import policy_named
from rrhf.sampling.sources.parsing import parse_source
from rrhf.training.folder import is_trained, last_checkpoint
from rrhf.training.windows import last_window

if TYPE_CHECKING:
    from rrhf.training.online import Online

log = logging.getLogger("rrhf")


@dataclass(frozen=True)
class Stage:
    """One arrow of the data flow.

    ``inputs``: what the result depends on beside the settings, each with a digest. ``work`` makes the result.
    """

    name: str
    result: Path
    inputs: Callable[[], dict[str, str]]
    work: Callable[[], object]
    beside: Path | None = None  # another file that it makes
    shared: bool = True  # whether several processes do it together; else the first does

    def is_complete(self) -> bool:
        if self.beside is not None and not self.beside.exists():
            return False
        return is_trained(self.result) if self.name == "train" else self.result.exists()

    def is_kept(self) -> bool:
        """Whether something made before is taken up. Parts look after their inputs themselves, checkpoints do not."""
        return self.is_complete() or (self.name == "train" and last_checkpoint(self.result) is not None)


@dataclass(frozen=True)
class Pass:
    """One pass through the stages: a whole run, or a round of one that iterates.

    Attributes:
        run: the folder of its files.
        config: its settings; ``config.model`` is what samples and what is trained.
        rho: ρ, the model that the trained one is compared with; it stays the first over all rounds.
        policies: where models are kept between stages.
    """

    run: RunFolder
    config: RunConfig
    rho: ModelSettings
    policies: PolicyCache

    @property
    def evaluated(self) -> dict[str, ModelSettings]:
        return {"rho": self.rho, "pi": replace(self.rho, model=str(self.run.model))}


def run_offline(run: RunFolder, config: RunConfig, policies: PolicyCache) -> dict[str, Any]:
    """Bring the run to its end, stage by stage; a stage whose file is complete is not done again.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: a stage cannot be done, or a result was made of other data or another model than stand there now.
    """
    if run.rounds.exists():
        raise UserError(f"{run.folder} holds a run in rounds: give its iterations, or choose another --output")
    whole = Pass(run, config, config.model, policies)
    check_evaluation(whole)
    carry_out([make(whole) for make in (data_stage, sample_stage, score_stage, train_stage, evaluate_stage)], run)
    return finish(run, [run])


def carry_out(stages: Sequence[Stage], run: RunFolder, *clocks: RunFolder) -> None:
    """Do the stages in ``run`` that are not complete, and note there, and in ``clocks``, how long they took."""
    for stage in stages:
        run.remember_inputs(stage.name, stage.result, stage.inputs(), stage.is_kept())
        if stage.is_complete():
            log.info(f"{stage.name}: {stage.result.name} is complete")
            # A process may have been stopped while it cleared up.
            shutil.rmtree(stage.result.with_name(stage.result.name + ".parts"), ignore_errors=True)
            push_finished(run.folder)  # or before it was sent
            continue
        log.info(f"{stage.name}: begins")
        with ExitStack() as timed:
            for folder in (run, *clocks):
                folder.remember_environment(stage.name)
                timed.enter_context(folder.timed(stage.name))
            if stage.shared or is_first():
                stage.work()
            wait_for_first(stage.is_complete)
        push_finished(run.folder)


def finish(run: RunFolder, reported: Sequence[RunFolder]) -> dict[str, Any]:
    """Write the card and the report over the folders ``reported``; returns the content of ``evaluation.json``."""
    from rrhf.report import write_report

    if is_first():
        write_card(run.model, refresh=True)  # now with the evaluation
        with run.timed("report"):
            write_report([folder.folder for folder in reported], run.report)
    wait_for_first(run.evaluation.exists)  # of rounds, a link
    evaluation: dict[str, Any] = json.loads(run.evaluation.read_text(encoding="utf-8"))
    return evaluation


# -- the stages


def data_stage(at: Pass) -> Stage:
    return Stage(
        "data",
        at.run.held_out,
        lambda: data_digests(at.config.data),
        lambda: write_queries(at.config.data, at.run.queries, at.run.held_out),
        beside=at.run.queries,
        shared=False,
    )


def sample_stage(at: Pass) -> Stage:
    return Stage(
        "sample",
        at.run.responses,
        lambda: {**_files(at.run.queries), **_sampled(at.config)},
        lambda: _sample(at.run, at.config, at.policies),
        shared=at.config.sample is not None,
    )


def score_stage(at: Pass, data: Path | None = None) -> Stage:
    """``data``: what is scored, where it is not the sampled responses; some of its queries may have none."""
    config, responses = at.config, data or at.run.responses
    require: Require = "responses" if data is None else "query"
    return Stage(
        "score",
        at.run.scored,
        lambda: {**_files(responses), **_scored(config, responses)},
        lambda: _score(at, responses, require),
    )


def train_stage(at: Pass, data: Path | None = None, online: Online | None = None) -> Stage:
    """``data``: what is trained on, where it is not the scored responses; ``online``: how they are sampled then."""
    scored, model = data or at.run.scored, at.config.model.model
    return Stage(
        "train",
        at.run.model,
        lambda: {
            **_files(scored),
            model: model_digest(model),
            **_trained(at.config),
            **(_scored(at.config, scored) if online else {}),
        },
        lambda: _train(at, scored, online),
    )


def evaluate_stage(at: Pass, held_out: Path | None = None) -> Stage:
    """``held_out``: the prompts, where they are not the run's."""
    config, prompts = at.config, held_out or at.run.held_out
    context = _evaluation_context(config)

    def models() -> dict[str, str]:
        return {name: model_digest(name) for name in (at.rho.model, config.evaluate.judge(at.evaluated))}

    def work() -> None:
        ranking = _ranking(at)
        if not is_first():  # it helps with the texts; the first measures them, as each would pay the judges again
            draw_texts(
                prompts, at.run.evaluation, at.evaluated, config.evaluate_sampling, config.text, policies=at.policies
            )
            return
        evaluate_models(
            prompts,
            at.run.evaluation,
            at.evaluated,
            config.evaluate_rewards,
            config.evaluate_sampling,
            config.text,
            config.evaluate,
            context=context,
            policies=at.policies,
            more=ranking,
        )

    return Stage(
        "evaluate",
        at.run.evaluation,
        lambda: {
            **_files(prompts),
            **models(),
            at.run.model.name: model_digest(str(at.run.model)),
            **rewards_digests(config.evaluate_rewards, context),
        },
        work,
    )


def _ranking(at: Pass) -> dict[str, Any]:
    """How ρ and π order what π was trained on, as ``evaluation.json`` has it; nothing where there are no samples."""
    from rrhf.evaluation.pairs import rank_samples

    config, samples = at.config, last_window(at.run.model) or at.run.scored
    if not config.evaluate_ranked.ranked_samples or not samples.exists():
        return {}
    at.policies.release()
    # Cut as training cut them, so that p_i is what it was there.
    context = replace(_evaluation_context(config), text=config.train.text, max_length=config.train.max_length)
    most = config.evaluate_ranked.ranked_samples
    found = rank_samples(samples, at.run.evaluation, at.evaluated, context, most)
    return {} if found is None else {"ranking": found}


def _files(*paths: Path) -> dict[str, str]:
    return {path.name: checksum_of_file(path) for path in paths}


def _sampled(config: RunConfig) -> dict[str, str]:
    """The digests of the models and files that responses come from; nobody knows a server's."""
    if config.sample is None:
        return {}
    if not config.sources.source:
        return {config.model.model: model_digest(config.model.model), **_policy_code(config.sample.policy)}
    from rrhf.sampling.sources.build import source_digest

    digests = {}
    for written in config.sources.source:
        with suppress(UserError):  # a file that is no more there: sampling says so, where it is still to be done
            spec = parse_source(written)
            digests[spec.name] = source_digest(spec) or ""
            digests |= _policy_code(spec.policy) if spec.kind == "local" else {}
    return digests


def _policy_code(policy: str) -> dict[str, str]:
    """The digest of the code of a policy that is a function of the user's; where it is gone nobody knows it."""
    with suppress(UserError):
        return {f"the code of {policy}": digest for digest in policy_named(policy).code().values()}
    return {}


def _trained(config: RunConfig) -> dict[str, str]:
    """The digests of a loss of the user's own, and of a reference that the loss reads and that is another model."""
    loss, reference, digests = config.train.ranking_loss, config.train.reference_model, {}
    with suppress(UserError):  # the loss is no more there
        if ":" in loss:
            from rrhf.losses import ranking_loss

            digests[f"the code of {loss}"] = code_digest(ranking_loss(loss))
        if reference and any("reference" in name for name in loss_needs(config)):
            digests[f"the reference {reference}"] = model_digest(reference)
    return digests


def _sample(run: RunFolder, config: RunConfig, policies: PolicyCache) -> None:
    if config.sample is None:
        write_records(run.responses, read_records(run.queries, require="responses"))
        return
    from rrhf.sampling.stage import sample_file

    sample_file(
        run.queries,
        run.responses,
        config.model,
        config.sample,
        config.text,
        sources=config.sources.source,
        remote=config.remote,
        policies=policies,
        pool=open_pool(config.cluster, config.model.device),
    )


def _scored(config: RunConfig, responses: Path) -> dict[str, str]:
    """The digests of the rewards, and of the models whose log-probabilities shape their scores."""
    context = config.scoring.context(config.text, config.score_remote, records=responses)
    columns = {model: name for name, model in config.scoring.sums_columns(context).items()}
    return {**rewards_digests(config.score, context), **columns}


def _score(at: Pass, responses: Path, require: Require) -> None:
    config, scored = at.config, at.run.scored
    at.policies.release()  # free the sampling weights
    pool = open_pool(config.cluster, config.scoring.device)
    score_file(
        responses, scored, config.score, config.scoring, config.text, config.score_remote, require=require, pool=pool
    )


def _train(at: Pass, data: Path, online: Online | None) -> None:
    from rrhf.cluster.training import training_on
    from rrhf.report.hub import card_of_training

    config = at.config
    at.policies.release()  # free the sampling weights
    watch = config.watch.filled(at.run.held_out, config.evaluate_rewards.reward)
    train = training_on(config.cluster)
    train(
        data, config.model, config.train, config.adapter, watch=watch, watch_remote=config.evaluate_remote,
        saved=card_of_training, online=online,
    )  # fmt: skip


def loss_needs(config: RunConfig) -> frozenset[str]:
    """What the training's loss reads beside sums, lengths and scores."""
    from rrhf.losses import needed_by, ranking_loss

    return needed_by(ranking_loss(config.train.ranking_loss), config.train.loss)


def check_loss(config: RunConfig) -> None:
    """Refuse, before any work, a loss over tokens whose sampling does not keep how likely each was.

    Responses of the data or of a file may bring that with them.

    Raises:
        UserError: the loss needs it.
    """
    if config.sample is None or config.train.resample_steps or "old_token_logprobs" not in loss_needs(config):
        return
    if {parse_source(source).kind for source in config.sources.source} != {"file"}:
        raise UserError(
            f"train.ranking_loss: {config.train.ranking_loss}: it needs how likely each token was when it was drawn, "
            "which responses that are sampled before the training do not have: set train.resample_steps, to 1 for "
            "example, in a run without iterations, or choose another loss"
        )


def _evaluation_context(config: RunConfig) -> RewardContext:
    return reward_context(
        config.model,
        config.evaluate_sampling,
        config.text,
        config.evaluate,
        config.evaluate_remote,
        config.scoring.reference_model,
    )


def check_evaluation(at: Pass) -> None:
    """Refuse, before any work, what would end the evaluation after all of it."""
    from rrhf.evaluation.perplexity import refuse_short_context
    from rrhf.evaluation.stage import refuse_unusable

    if not at.run.evaluation.exists():
        config = at.config
        # First: where no other is named it is the perplexity model too, and would be refused by that name.
        tokenizer_and_config(locate(at.rho.model), at.rho.model)
        refuse_unusable(config.evaluate_rewards, config.evaluate_sampling, _evaluation_context(config))
        refuse_short_context(config.evaluate.judge(at.evaluated), config.evaluate_sampling.max_new_tokens)
