"""Watch a policy while it trains: what it writes to a fixed set of prompts, and alarms when it collapses.

``Watch`` is a ``transformers`` callback. Every n optimiser steps it lets the policy answer the same prompts with the
same seed, and logs reward, perplexity, length and variety of the answers as Figure 3 of the paper needs them
(arXiv 2304.05302). Training does not notice: random states and module modes are put back, so the weights are bit for
bit those of a run that is not watched.

``RULES`` are the alarms: pure functions of the first measurement, the present one and the limits.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from rrhf.adapters import load_policy_or_adapter
from rrhf.errors import UserError, nearest
from rrhf.evaluation.policies import draw_texts, nll_under
from rrhf.evaluation.texts import Perplexity, Text, evaluate_texts
from rrhf.files import write_text
from rrhf.models import ModelSettings
from rrhf.records import Record, read_records
from rrhf.rewards import make_scorer, reward_name
from rrhf.rewards.functions import RewardFunction
from rrhf.sampling import Sampler, SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rrhf.trainer import RRHFTrainer

log = logging.getLogger("rrhf")

ALARMS = ("warn", "stop", "off")
FOLDER = "watch"  # in the model's folder: what the policy wrote, one file a measurement


@dataclass(frozen=True)
class WatchSettings:
    """How a policy is watched while it trains, and what counts as collapse."""

    watch_steps: int = field(
        default=0,
        metadata={"help": "answer the watched prompts every so many optimiser steps, and before and after; 0: never"},
    )
    watch_data: str | None = field(
        default=None, metadata={"help": "records whose queries are watched; in a run, default: the held-out prompts"}
    )
    watch_prompts: int = field(default=32, metadata={"help": "how many of them, from the front"})
    watch_reward: list[str] = field(
        default_factory=list,
        metadata={"help": "pkg.module:function …, the first counts; in a run, default: those of the evaluation",
                  "nargs": "+"},
    )  # fmt: skip
    watch_policy: str = field(default="greedy", metadata={"help": "sampling policy of the answers, one a prompt"})
    watch_max_new_tokens: int = field(
        default=64, metadata={"help": "most tokens of an answer; twice the usual length lets growing ones be seen"}
    )
    watch_perplexity_model: str | None = field(
        default=None,
        metadata={"help": "under which perplexity is taken: a model, or none; default: the starting weights; with "
                  "--peft they are the trained model without its adapter, else a second copy in memory (weights only)"},
    )  # fmt: skip
    alarm: str = field(
        default="warn", metadata={"help": "what a collapse does: warn, stop (with a checkpoint), or off"}
    )
    alarm_distinct: float = field(
        default=0.5, metadata={"help": "alarm when distinct-2 falls below this share of what it was at the start"}
    )
    alarm_length: float = field(
        default=2.0, metadata={"help": "alarm when the mean length is this factor longer or shorter than at the start"}
    )
    alarm_perplexity: float = field(
        default=2.0, metadata={"help": "alarm when perplexity is this many times its start while the reward is up"}
    )
    alarm_correlation: float = field(
        default=0.6, metadata={"help": "alarm when reward and length correlate this much, and more than at the start"}
    )

    def __post_init__(self) -> None:
        faults = []
        if self.alarm not in ALARMS:
            faults.append(f"--alarm {self.alarm}: {nearest(self.alarm, ALARMS)}")
        if self.alarm == "stop" and self.watch_steps == 0:
            faults.append("--alarm stop: nothing is watched; give --watch_steps")
        for name, least in (("watch_steps", 0), ("watch_prompts", 1)):
            if getattr(self, name) < least:
                faults.append(f"--{name} {getattr(self, name)}: must be at least {least}")
        for name, low, high in (
            ("alarm_distinct", 0.0, 1.0), ("alarm_correlation", 0.0, 1.0),
            ("alarm_length", 1.0, math.inf), ("alarm_perplexity", 1.0, math.inf),
        ):  # fmt: skip
            if not low < getattr(self, name) < high:
                faults.append(f"--{name} {getattr(self, name)}: must lie between {low:g} and {high:g}")
        try:
            _ = self.sampling(0)
        except UserError as error:
            faults += [f"--watch_{line.removeprefix('--')}" for line in str(error).splitlines()]
        if faults:
            raise UserError("\n".join(faults))

    def sampling(self, seed: int) -> SamplingSettings:
        """How the answers are drawn: with the same seed each time, so that only the policy changes."""
        return SamplingSettings(
            policy=self.watch_policy, num_responses=1, max_new_tokens=self.watch_max_new_tokens, seed=seed
        )

    def filled(self, data: Path, rewards: Sequence[str]) -> WatchSettings:
        """With these prompts and rewards where none are named; rewards that need provided scores are left out."""
        usable = [reward for reward in rewards if not _is_provided(reward)]
        return replace(self, watch_data=self.watch_data or str(data), watch_reward=self.watch_reward or usable)


def _is_provided(reward: str | RewardFunction) -> bool:
    return isinstance(reward, str) and reward.partition(":")[0] == "provided"


# --- alarms


@dataclass(frozen=True)
class Measurement:
    """What the answers of one step came to.

    ``reward_mean`` is of the first reward, ``perplexity`` under the frozen model, ``length_mean`` in tokens of the
    policy (the end token counted), ``distinct_2`` the share of different pairs of neighbouring words,
    ``score_length_correlation`` Pearson's r over the ``prompts`` that have a score. None where there is none.
    """

    step: int
    reward_mean: float | None
    perplexity: float | None
    length_mean: float
    distinct_2: float
    score_length_correlation: float | None
    prompts: int

    def logs(self) -> dict[str, float]:
        """As the trainer logs it."""
        values = {f"eval_{f.name}": getattr(self, f.name) for f in fields(self) if f.name != "step"}
        return {name: value for name, value in values.items() if value is not None}


def measurements(log_history: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """The measurements that a trainer's ``log_history`` holds, in order."""
    names = [f.name for f in fields(Measurement) if f.name != "step"]

    def values(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row.get(f"eval_{name}") for name in names}

    return [Measurement(step=int(row["step"]), **values(row)) for row in log_history if "eval_distinct_2" in row]


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary or there are fewer than three pairs."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))


def _variety(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    # Downwards only: more variety than at the start is no collapse, and a salad of words shows in the perplexity.
    if now.distinct_2 >= limits.alarm_distinct * start.distinct_2:
        return None
    return (
        f"distinct-2 is {now.distinct_2:.3f}, was {start.distinct_2:.3f} at step {start.step} (the limit is "
        f"{limits.alarm_distinct:g} of that): the policy repeats itself. Lower --learning_rate or raise --sft_weight"
    )


def _length(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    factor, before = limits.alarm_length, max(start.length_mean, 1.0)
    if before / factor <= now.length_mean <= before * factor:
        return None
    return (
        f"answers have {now.length_mean:.1f} tokens on average, had {start.length_mean:.1f} at step {start.step} (the "
        f"limit is a factor of {factor:g}). See whether the best-scored training responses are that "
        f"{'long' if now.length_mean > before else 'short'}; if not, lower --learning_rate"
    )


def _over_optimised(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    if start.perplexity is None or now.perplexity is None or start.reward_mean is None or now.reward_mean is None:
        return None
    if now.reward_mean <= start.reward_mean or now.perplexity < limits.alarm_perplexity * start.perplexity:
        return None
    return (
        f"the reward is up ({start.reward_mean:.4g} to {now.reward_mean:.4g}) while perplexity went from "
        f"{start.perplexity:.2f} to {now.perplexity:.2f} (the limit is a factor of {limits.alarm_perplexity:g}): the "
        "reward is being exploited. Take an earlier checkpoint, lower --learning_rate, or train fewer epochs"
    )


LEAST_PROMPTS = 10  # fewer say nothing of a correlation
SIGNIFICANT = 2.576  # standard errors from zero, 1 % on two sides
RISEN = 1.645  # standard errors above the start, 5 % on one side


def _length_paid(start: Measurement, now: Measurement, limits: WatchSettings) -> str | None:
    """|r| at the limit, differing from 0 and, in its own direction, above the start, both by Fisher's z = artanh r.

    z of n pairs has the standard error 1/√(n − 3), a difference of two √(1/(n_1 − 3) + 1/(n_0 − 3)). A start without
    a correlation (all answers equally long) counts as 0.
    """
    r, before = now.score_length_correlation, start.score_length_correlation or 0.0
    if r is None or min(now.prompts, start.prompts) < LEAST_PROMPTS or abs(r) < limits.alarm_correlation:
        return None
    z, z_before = (math.atanh(max(-0.999999, min(0.999999, value))) for value in (r, before))
    variance = 1 / (now.prompts - 3)
    risen = (z - z_before) * math.copysign(1.0, r)
    if abs(z) < SIGNIFICANT * math.sqrt(variance) or risen < RISEN * math.sqrt(variance + 1 / (start.prompts - 3)):
        return None
    return (
        f"reward and length of the answers correlate with r = {r:.2f} over {now.prompts} prompts, with {before:.2f} at "
        f"step {start.step} (the limit is {limits.alarm_correlation:g}): the policy wins by "
        f"{'longer' if r > 0 else 'shorter'} answers. Check what the reward pays for"
    )


RULES: dict[str, Callable[[Measurement, Measurement, WatchSettings], str | None]] = {
    "variety": _variety,
    "length": _length,
    "perplexity": _over_optimised,
    "correlation": _length_paid,
}


def alarms(start: Measurement, now: Measurement, limits: WatchSettings) -> dict[str, str]:
    """The rules that fire, each with its sentence: figures and what to do."""
    found = {name: rule(start, now, limits) for name, rule in RULES.items()}
    return {name: text for name, text in found.items() if text is not None}


# --- measuring


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put back every random state, and which modules were in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if torch.backends.mps.is_available():
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            for module, training in modes:
                module.training = training


class Watch(TrainerCallback):
    """Measure the policy of ``trainer`` every ``settings.watch_steps`` steps, before the first and after the last.

    Metrics go through ``trainer.log``, so into ``trainer_state.json`` and to whatever ``report_to`` names:
    ``eval_reward_mean`` (the first reward; others as ``eval_reward_mean_NAME``), ``eval_perplexity``,
    ``eval_length_mean``, ``eval_distinct_2``, ``eval_score_length_correlation``, ``eval_prompts``. The answers stand in
    ``output_dir/watch/step-N.jsonl`` with the keys of ``generations.jsonl``.

    Process 0 alone measures; the others wait for it at the next exchange of gradients. Sharded weights (FSDP,
    DeepSpeed) cannot be read by one process, so there nothing is measured and a warning says so. After a resume the
    start is the one in the log.

    Args:
        trainer: made, not yet training.
        records: the prompts; their responses are not looked at.
        rewards: names or functions, as ``rrhf.score`` takes them.
        settings: how often, how, and the alarms' limits.
        perplexity: (records, texts) → (negative log-likelihood, tokens) under one frozen model. Default: with an
            adapter the model without it; else none is measured.

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
    ) -> None:
        self.trainer, self.records, self.rewards, self.settings = trainer, list(records), list(rewards), settings
        self.found: list[Measurement] = []
        self.ringing: set[str] = set()
        self.stopped: str | None = None
        self.active = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if not self.active:
            why = "the policy cannot be watched while its weights are sharded over processes"
            if settings.alarm == "stop":
                raise UserError(f"--alarm stop: {why}; train without sharding, or evaluate checkpoints instead")
            log.warning(f"watch: {why}: nothing is measured; evaluate checkpoints instead")
            return
        if not self.records:
            raise UserError("--watch_steps needs prompts: give --watch_data FILE with at least one record")
        if not self.rewards:
            raise UserError("--watch_steps needs a reward: give --watch_reward pkg.module:function")
        for reward in self.rewards:
            if _is_provided(reward):
                raise UserError(f"--watch_reward {reward}: cannot score new texts; give pkg.module:function")
            make_scorer(reward)  # an unknown one is refused before any work
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

        def perplexity(records: Sequence[Record], texts: Sequence[Text]) -> tuple[float, int]:
            with model.disable_adapter():
                return under(records, texts)

        return perplexity

    # -- events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the log of a resumed run, or measure the start."""
        self.found = measurements(state.log_history)
        if self.found and self.settings.alarm != "off":
            fired = alarms(self.found[0], self.found[-1], self.settings)
            self.ringing = set(fired)
            if fired and self.settings.alarm == "stop":
                raise UserError(self._why(self.found[-1], fired))
        if not self.found:
            self._look(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.settings.watch_steps == 0 or state.global_step >= state.max_steps:
            self._look(state, control)

    def _look(self, state: Any, control: Any) -> None:
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
            self.found.append(now)
            self._judge(now)
        if self._any_process(self.stopped is not None):
            self.stopped = self.stopped or "training was stopped by an alarm; process 0 says which"
            control.should_save = control.should_training_stop = True

    def _any_process(self, here: bool) -> bool:
        if self.trainer.args.world_size == 1 or self.settings.alarm != "stop":
            return here
        mine = torch.tensor([float(here)], device=self.trainer.args.device)
        return bool(self.trainer.accelerator.gather(mine).sum() > 0)

    def _judge(self, now: Measurement) -> None:
        if self.settings.alarm == "off":
            return
        fired = alarms(self.found[0], now, self.settings)
        for name in fired.keys() - self.ringing:  # once, until it was silent in between
            log.warning(f"alarm ({name}), step {now.step}: {fired[name]}. {self._where(now.step)}")
        self.ringing = set(fired)
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
        main, *others = map(reward_name, self.rewards)
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


def _no_perplexity(records: Sequence[Record], texts: Sequence[Text]) -> tuple[float, int]:
    return 0.0, 0  # no tokens: evaluate_texts then gives none


def watch_training(trainer: RRHFTrainer, settings: WatchSettings, model: ModelSettings) -> Watch | None:
    """The ``Watch`` that ``settings`` ask for, with its prompts read and the frozen model loaded; None without one.

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
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if named != "none" and not (named is None and adapted) and not sharded and trainer.is_world_process_zero():
        perplexity = _frozen(replace(model, model=named or model.model), trainer)
    return Watch(trainer, records, settings.watch_reward, settings, perplexity=perplexity)


def _frozen(settings: ModelSettings, trainer: RRHFTrainer) -> Perplexity:
    frozen: PreTrainedModel
    frozen, tokenizer = load_policy_or_adapter(settings)
    frozen.requires_grad_(False)
    return nll_under(frozen.to(trainer.args.device), tokenizer, trainer.args.text, show=False)
