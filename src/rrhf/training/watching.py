"""Watch a policy while it trains: what it writes to a fixed set of prompts, and alarms when it collapses.

``Watch`` is a ``transformers`` callback. Every n optimiser steps it lets the policy answer the same prompts with the
same seed, and logs reward, perplexity, length and variety of the answers as Figure 3 of the paper needs them
(arXiv 2304.05302). Training does not notice: random states and module modes are put back, so the weights are bit for
bit those of a run that is not watched.

The alarms are ``rrhf.training.alarms.RULES``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.evaluation.evaluate import draw_texts
from rrhf.evaluation.perplexity import nll_under
from rrhf.evaluation.texts import Likelihood, Perplexity, Text, evaluate_texts
from rrhf.models.adapters import load_policy_or_adapter
from rrhf.models.load import ModelSettings
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.functions import RewardFunction
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import Rewards, is_provided
from rrhf.sampling.sampler import Sampler
from rrhf.training.alarms import Measurement, alarms, measurements, pearson
from rrhf.training.undisturbed import undisturbed
from rrhf.training.watch_settings import WatchSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rrhf.training.trainer import RRHFTrainer

log = logging.getLogger("rrhf")

FOLDER = "watch"  # in the model's folder: what the policy wrote, one file a measurement


class Watch(TrainerCallback):
    """Measure the policy of ``trainer`` every ``settings.watch_steps`` steps, before the first and after the last.

    Metrics go through ``trainer.log``, so into ``trainer_state.json`` and to whatever ``report_to`` names:
    ``eval_reward_mean`` (the first reward; others as ``eval_reward_mean_NAME``), ``eval_perplexity``,
    ``eval_length_mean``, ``eval_distinct_2``, ``eval_score_length_correlation``, ``eval_prompts``. The answers stand in
    ``output_dir/watch/step-N.jsonl`` with the keys of ``generations.jsonl``.

    Process 0 alone measures; the others wait for it at the next exchange of gradients. Sharded weights
    (FSDP) cannot be read by one process, so there nothing is measured and a warning says so. After a resume the
    start is the one in the log.

    Args:
        trainer: made, not yet training.
        records: the prompts; their responses are not looked at.
        rewards: names or functions, as ``rrhf.score`` takes them.
        settings: how often, how, and the alarms' limits.
        perplexity: (records, texts) → (negative log-likelihood, tokens) under one frozen model. Default: with an
            adapter the model without it; else none is measured.
        context: what rewards need beside their names. What they hold is held from the first measurement to the last.

    Raises:
        UserError: no prompt, no reward, or a reward that cannot score new texts.
    """

    def __init__(
        self,
        trainer: RRHFTrainer,
        records: Sequence[Record],
        rewards: Sequence[str | RewardFunction],
        settings: WatchSettings,
        *,
        perplexity: Perplexity | None = None,
        context: RewardContext | None = None,
    ) -> None:
        self.trainer, self.records, self.settings = trainer, list(records), settings
        self.measured: list[Measurement] = []
        self.firing: set[str] = set()
        self.stopped: str | None = None
        self.active = not trainer.is_fsdp_enabled
        if not self.active:
            why = "the policy cannot be watched while its weights are sharded over processes"
            if settings.alarm == "stop":
                raise UserError(f"--alarm stop: {why}; train without sharding, or evaluate checkpoints instead")
            log.warning(f"watch: {why}: nothing is measured; evaluate checkpoints instead")
            return
        if not self.records:
            raise UserError("--watch_steps needs prompts: give --watch_data FILE with at least one record")
        if not rewards:
            raise UserError("--watch_steps needs a reward: give --watch_reward pkg.module:function")
        for reward in rewards:
            if is_provided(reward):
                raise UserError(f"--watch_reward {reward}: cannot score new texts; give pkg.module:function")
        self.rewards = Rewards(rewards, context=context)  # an unknown one is refused before any work
        if not trainer.is_world_process_zero():
            return
        # Made now, while the model is as it was loaded: the trainer wraps its forward in autocast later, and the
        # check of the attention path compares numbers. Decoding itself does not pass that wrapper.
        sampling = settings.sampling(trainer.args.seed)
        self.sampler = Sampler(trainer.model, trainer.processing_class, sampling, trainer.args.text)
        self.perplexity = perplexity or self._without_adapter()

    def _without_adapter(self) -> Perplexity | None:
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        if self.settings.watch_perplexity_model == "none" or not hasattr(model, "disable_adapter"):
            return None
        under = nll_under(model, tokenizer, self.trainer.args.text, show=False)

        def perplexity(records: Sequence[Record], texts: Sequence[Text]) -> Likelihood:
            with model.disable_adapter():
                return under(records, texts)

        return perplexity

    # -- events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the log of a resumed run, or measure the start."""
        self.measured = measurements(state.log_history)
        if self.measured and self.settings.alarm != "off":
            fired = alarms(self.measured[0], self.measured[-1], self.settings)
            self.firing = set(fired)
            if fired and self.settings.alarm == "stop":
                raise UserError(self._why(self.measured[-1], fired))
        if not self.measured:
            self._measure_now(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.settings.watch_steps == 0 or state.global_step >= state.max_steps:
            self._measure_now(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of what the rewards hold."""
        if self.active:
            self.rewards.close()

    def _measure_now(self, state: Any, control: Any) -> None:
        if not self.active:
            return
        if self.trainer.is_world_process_zero():
            with undisturbed(self.trainer.model):
                self.trainer.model.eval()
                now, more, rows = self.measure(state.global_step)
            should_log = control.should_log
            self.trainer.log({**now.logs(), **more})
            control.should_log = should_log  # logging takes it back, and this step's own line is still to come
            self._write(now.step, rows)
            self.measured.append(now)
            self._check_alarms(now)
        if self._any_process(self.stopped is not None):
            self.stopped = self.stopped or "training was stopped by an alarm; process 0 says which"
            control.should_save = control.should_training_stop = True

    def _any_process(self, here: bool) -> bool:
        if self.trainer.args.world_size == 1 or self.settings.alarm != "stop":
            return here
        mine = torch.tensor([float(here)], device=self.trainer.args.device)
        return bool(self.trainer.accelerator.gather(mine).sum() > 0)

    def _check_alarms(self, now: Measurement) -> None:
        if self.settings.alarm == "off":
            return
        fired = alarms(self.measured[0], now, self.settings)
        for name in fired.keys() - self.firing:  # once, until it was silent in between
            log.warning(f"alarm ({name}), step {now.step}: {fired[name]}. {self._where(now.step)}")
        self.firing = set(fired)
        if fired and self.settings.alarm == "stop":
            self.stopped = self._why(now, fired)

    def _where(self, step: int) -> str:
        return f"The answers: {self._file(step)}"

    def _why(self, now: Measurement, fired: dict[str, str]) -> str:
        rules = "; ".join(f"{name}: {text}" for name, text in fired.items())
        return (
            f"training was stopped at step {now.step} by --alarm stop ({rules}). A checkpoint is written. "
            f"{self._where(now.step)}. Go on from the checkpoint with --alarm warn (in a run: train.alarm=warn)"
        )

    def _file(self, step: int) -> Path:
        return Path(self.trainer.args.output_dir) / FOLDER / f"step-{step}.jsonl"

    def _write(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._file(step).parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file(step), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # -- one measurement

    def measure(self, step: int) -> tuple[Measurement, dict[str, float], list[dict[str, Any]]]:
        """The measurement of the present weights, the means of the other rewards, and the answers."""
        texts = draw_texts(self.sampler, self.records)
        result, rows = evaluate_texts(
            self.records,
            None,
            texts,
            self.rewards,
            perplexity=self.perplexity or _no_perplexity,
            perplexity_model="",
            seed=self.sampler.settings.seed,
        )
        main, *others = self.rewards.scorers
        format = self.sampler.format
        lengths = [
            len(format.encode_response(record.query, row["pi"], row["pi_finish"]))
            for record, row in zip(self.records, rows, strict=True)
        ]
        scored = [
            (score, float(length))
            for row, length in zip(rows, lengths, strict=True)
            if (score := row["pi_rewards"][main]) is not None
        ]
        measurement = Measurement(
            step=step,
            reward_mean=result["pi"]["reward_mean"],
            perplexity=result["pi"]["perplexity"] if self.perplexity is not None else None,
            length_mean=sum(lengths) / len(lengths),
            distinct_2=result["pi"]["distinct_2"],
            score_length_correlation=pearson([score for score, _ in scored], [length for _, length in scored]),
            prompts=len(scored),
        )
        means = {f"eval_reward_mean_{name}": result["rewards"][name]["pi"]["mean"] for name in others}
        return measurement, {name: mean for name, mean in means.items() if mean is not None}, rows


def _no_perplexity(records: Sequence[Record], texts: Sequence[Text]) -> Likelihood:
    return Likelihood(0.0, 0)  # no tokens: evaluate_texts then gives none


def watch_training(
    trainer: RRHFTrainer, settings: WatchSettings, model: ModelSettings, remote: EndpointLimits | None = None
) -> Watch | None:
    """The ``Watch`` that ``settings`` ask for, with its prompts read and the frozen model loaded; None without one.

    ``remote``: how the servers of its rewards are asked, and what they may cost.

    Without an adapter the starting weights are loaded a second time, in the type that sampling uses (bfloat16 where
    the device has it): a quarter to an eighth of what fp32 weights, gradients and optimiser take.

    Raises:
        UserError: prompts or reward are missing, or a model cannot be loaded.
    """
    if not settings.watch_steps:
        return None
    if settings.watch_data is None:
        raise UserError("--watch_steps needs prompts: give --watch_data FILE")
    records = list(islice(read_records(settings.watch_data, require="query"), settings.watch_prompts))
    named = settings.watch_perplexity_model
    adapted = hasattr(trainer.model, "disable_adapter")
    perplexity = None
    sharded = trainer.is_fsdp_enabled
    if named != "none" and not (named is None and adapted) and not sharded and trainer.is_world_process_zero():
        perplexity = _frozen(replace(model, model=named or model.model), trainer)
    context = RewardContext(
        device=str(trainer.args.device),
        dtype=model.dtype,
        text=trainer.args.text,
        remote=remote or EndpointLimits(),
        alone=True,  # process 0
        journals=Path(trainer.args.output_dir) / FOLDER,
        seed=trainer.args.seed,
    )
    return Watch(trainer, records, settings.watch_reward, settings, perplexity=perplexity, context=context)


def _frozen(settings: ModelSettings, trainer: RRHFTrainer) -> Perplexity:
    frozen: PreTrainedModel
    frozen, tokenizer = load_policy_or_adapter(settings)
    frozen.requires_grad_(False)
    return nll_under(frozen.to(trainer.args.device), tokenizer, trainer.args.text, show=False)
