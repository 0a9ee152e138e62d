"""OP-k: a data set whose responses the policy itself writes while it trains (arXiv 2304.05302, Table 1).

Every k optimiser steps a window begins: responses to the queries of the next k steps are drawn from the policy as it is
now, joined with those that the data provides, and scored. The steps of the window train on them. It is a data set like
another to ``RRHFTrainer``: optimiser, schedule and random states live on, and sampling disturbs none of them.

The records of a window are kept on disk (``rrhf.training.windows``) and made in parts, so that a training that was
killed goes on bit for bit: within a window with its very samples, at the beginning of one with weights that are the
same. A signal while a window is made writes a checkpoint of those first.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from rrhf.common.errors import UserError
from rrhf.models.batching import SIZES
from rrhf.models.identity import weights_digest
from rrhf.models.load import tokenizer_and_config
from rrhf.models.locate import locate
from rrhf.models.tokenization import TextFormat
from rrhf.records.checksums import checksum_of_records
from rrhf.records.duplicates import merge_duplicates
from rrhf.records.files import read_records
from rrhf.records.ids import Ids
from rrhf.records.parts import in_parts
from rrhf.records.parts_folder import Work
from rrhf.records.record import TOKEN_COLUMNS, Record, record_from_row
from rrhf.records.sources import source_names
from rrhf.rewards.combination import Combination
from rrhf.rewards.functions import RewardFunction
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.kl import Shaping, adapted_beta, log_ratios
from rrhf.rewards.logprob import DIGITS, SUM, ResponseSums, fill_sums, logprob_model, reference_sums_name
from rrhf.rewards.scoring import Rewards, is_provided, reward_digest, reward_name
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.batching import MicroBatchSampler, Steps, shares
from rrhf.training.callbacks import StopOnSignal, Stopped
from rrhf.training.config import RRHFConfig
from rrhf.training.dataset import EncodedRecords, TrainingRecord
from rrhf.training.reference import refuse_other_tokenizer
from rrhf.training.undisturbed import undisturbed
from rrhf.training.windows import FOLDER, SECONDS, WEIGHTS, Windows

log = logging.getLogger("rrhf")

OLD, OF_REFERENCE = TOKEN_COLUMNS
BETA = "kl_beta"  # of a window
MEASURED = ("sample_reward_mean", "kl", BETA)  # in a window's note, and in the trainer's metrics


@dataclass(frozen=True)
class Online:
    """Where the responses of OP-k come from, and what scores them; k is ``RRHFConfig.resample_steps``.

    ρ is ``context.reference_model``, for losses that need a reference and for ``kl_beta``: β (log π(y|x) − log ρ(y|x)),
    where π is the policy that samples, is taken off each score. It stays in memory beside the policy.

    Raises:
        UserError: a reward cannot score new texts, or ρ is missing.
    """

    sampling: SamplingSettings
    rewards: Sequence[str | RewardFunction]
    reward_weights: Sequence[float] | None = None
    reward_normalisation: Sequence[str] = ("none",)
    context: RewardContext = field(default_factory=RewardContext)
    kl_beta: float = 0.0

    def __post_init__(self) -> None:
        if "data" in self.reward_normalisation:
            raise UserError(
                "--reward_normalisation data: there are no data to normalise over before they are sampled: query"
            )
        if self.kl_beta and not self.context.reference_model:
            raise UserError(f"--kl_beta {self.kl_beta} needs --reference_model: ρ")
        for reward in self.rewards:
            if is_provided(reward):
                raise UserError(f"--reward {reward}: cannot score new texts; give pkg.module:function")

    @property
    def reference(self) -> str | None:
        """The column of ρ's log-probability sums; None without ρ."""
        context = self.context
        if context.reference_model is None:
            return None
        return reference_sums_name(context.reference_model, context.text, context.max_length)

    def settings(self) -> dict[str, Any]:
        """What the samples and their scores depend on, beside the policy and the queries."""
        sampling = {f"sample.{name}": value for name, value in asdict(self.sampling).items() if name != "batch_size"}
        codes = {f"code of {reward_name(reward)}": reward_digest(reward, self.context) for reward in self.rewards}
        drawn_by = {f"sample.{name}": value for name, value in self.sampling.how.code().items()}
        return {
            **sampling,
            **drawn_by,
            **codes,
            "score.reward_weights": list(self.reward_weights or []),
            "score.reward_normalisation": list(self.reward_normalisation),
            "score.kl_beta": self.kl_beta,
            "score.reference": self.reference,
        }


class OnlineRecords(Dataset):
    """Queries whose responses are sampled from the policy that trains on them.

    Args:
        rows: records with queries; responses that they have are trained on too, and scored where they have no score of
            these rewards in ``rewards`` yet.
        online: how to sample and to score.

    Raises:
        UserError: there is no query, or a reward is unknown.
    """

    def __init__(self, rows: Iterable[Record | Mapping[str, Any]], online: Online) -> None:
        ids = Ids()
        records = (
            row if isinstance(row, Record) else record_from_row(dict(row), f"row {number}")
            for number, row in enumerate(rows)
        )
        self.queries = [replace(record, id=ids.claim(record.id, n)) for n, record in enumerate(records, 1)]
        if not self.queries:
            raise UserError("no query is left to sample responses to")
        self.online = online
        self.rewards = Rewards(
            online.rewards,
            weights=online.reward_weights,
            normalisation=online.reward_normalisation,
            missing_only=True,
            context=online.context,
        )
        named = online.context.reference_model
        self._rho = None if named is None else logprob_model(named, online.context)
        self.skipped: Counter[str] = Counter()
        self.unranked = self.left_out = self.queries_cut = self.responses_cut = 0
        self.records: list[TrainingRecord] = []  # as large as they can get: what memory is planned with
        self._number: int | None = None  # of the window at hand
        self._shares: dict[int, list[list[TrainingRecord]]] = {}  # step → this process's micro-batches
        self._seconds: dict[str, float] = defaultdict(float)  # since the last line of metrics
        self._of_window: dict[str, float] = defaultdict(float)
        self._since: float | None = None
        self._measured: dict[str, float] = {}

    # -- what the trainer asks for

    @property
    def provides(self) -> tuple[str, ...]:
        """What its records bring for losses that need more than sums and scores (``rrhf.losses.OPTIONAL``)."""
        return (OLD, *(() if self._rho is None else ("reference_sums", OF_REFERENCE)))

    def prepare(self, format: TextFormat, args: RRHFConfig, only_best: bool) -> None:
        """Take over how texts become tokens; ``only_best``: no loss reads more than the best response."""
        if args.resample_steps < 1:
            raise UserError("OnlineRecords are sampled every --resample_steps steps: give it")
        self.format, self.args, self.only_best = format, args, only_best
        most = args.max_length
        for record in self.queries:
            encoded = format.encode_record(record, most)
            length = max(0, min(self.online.sampling.max_new_tokens, most - len(encoded.query)))
            new: list[Sequence[int]] = [array("i", [0]) * length] * self.online.sampling.responses
            responses = [*encoded.responses, *new]
            longest = len(encoded.query) + max(map(len, responses))
            if len(encoded.query) < most:
                self.records.append(
                    TrainingRecord(record.id, encoded.query, responses, [0.0] * len(responses), longest)
                )
        format.queries_cut = format.responses_cut = 0  # counted where they are trained on

    def attach(self, trainer: Any) -> None:
        """Sample from this trainer's policy from now on. It is not training yet, and its model is as it was loaded."""
        if trainer.is_fsdp_enabled:
            raise UserError("--resample_steps: the policy cannot be sampled from while its weights are sharded (FSDP)")
        args, self.trainer = self.args, trainer
        if args.kl_target is not None and not self.online.kl_beta:
            raise UserError(f"--kl_target {args.kl_target}: adapts --kl_beta: give its first value too")
        named = self.online.context.reference_model
        if named is not None and {"reference_sums", OF_REFERENCE} & set(trainer.needed):
            theirs, _ = tokenizer_and_config(locate(named), named)
            refuse_other_tokenizer(theirs, trainer.processing_class, named, otherwise="")
        self.sampler = Sampler(trainer.model, trainer.processing_class, self.online.sampling, args.text)
        seed = args.data_seed if args.data_seed is not None else args.seed
        self.steps = Steps(
            len(self.queries), args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size, seed
        )
        context = self.online.context
        self._pi = ResponseSums(
            trainer.model, trainer.processing_class, context.text, max_length=context.max_length,
            max_tokens_per_forward=context.max_tokens_per_forward,
        )  # fmt: skip
        self.windows = Windows(Path(str(args.output_dir)) / FOLDER)

    def loader(self) -> DataLoader:
        """This process's micro-batches, as lists of encoded records."""
        # A generator of its own: an epoch's first step begins in the random state that the one before it ended in.
        generator = torch.Generator()
        return DataLoader(self, batch_sampler=MicroBatchSampler(self.steps), collate_fn=_only, generator=generator)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, name: tuple[int, int]) -> list[TrainingRecord]:
        """A micro-batch of this process: the number of a step of the whole training, and its place in it."""
        step, batch = name
        self._since = self._since or time.perf_counter()
        window = step // self.args.resample_steps
        if window != self._number:
            self._enter(window, step)
        return self._shares[step][batch]

    def metrics(self) -> dict[str, float]:
        """The window's means, and the shares of time since the last call in sampling, scoring and training."""
        if self._since is None:
            return {}
        now = time.perf_counter()
        passed = max(now - self._since, 1e-9)
        sampling, scoring = (self._seconds[name] / passed for name in SECONDS)
        self._since, self._seconds = now, defaultdict(float)
        times = {"sampling_share": sampling, "scoring_share": scoring, "training_share": 1 - sampling - scoring}
        return {**self._measured, **{name: round(share, 4) for name, share in times.items()}}

    def summary(self) -> str:
        """What is trained on, in one line."""
        provided = sum(len(record.responses) for record in self.queries)
        return (
            f"{len(self)} queries; every {self.args.resample_steps} steps {self.online.sampling.responses} "
            f"responses each are sampled from the policy ({self.online.sampling.policy})"
            + (f", beside {provided} that the data provides" if provided else "")
        )

    def close(self) -> None:
        """Let go of what the rewards and the reference hold."""
        self.rewards.close()
        if self._rho is not None:
            self._rho.close()

    # -- a window

    def _enter(self, number: int, step: int) -> None:
        """Make the window ready whose steps are asked for now, beginning with ``step``."""
        k = self.args.resample_steps
        begin, end = number * k, min((number + 1) * k, int(self.trainer.state.max_steps))
        asked = [
            replace(self.queries[index], id=f"{self.queries[index].id}@{place}")  # other draws at each step
            for place in range(begin, max(end, step + 1))
            for index in self.steps.step(place)
        ]
        if self.trainer.is_world_process_zero():
            self._prepare(number, asked, begun=step > begin)
        self.trainer.accelerator.wait_for_everyone()
        with suppress(Stopped):  # of this process: all stop together, below
            if not self.windows.is_whole(number):
                self._make(number, asked)
        self.trainer.accelerator.wait_for_everyone()
        self._stop_together()
        records = list(read_records(self.windows.records(number)))
        self._measured = {name: value for name, value in self.windows.note(number).items() if name in MEASURED}
        self._number, self._shares = number, {}
        trained = 0
        for place, rows in groupby(records, key=lambda record: int(record.id.rpartition("@")[2])):
            encoded = self._encoded(rows)
            trained += len(encoded)
            mine = shares([SIZES[self.trainer.path](record) for record in encoded], self.steps.world)
            share = [encoded[i] for i in mine[self.args.process_index]]
            self._shares[place] = self.steps.split(share, self.steps.micro_batches(place))
        if not trained:
            raise UserError(f"{self.windows.records(number)}: no response that was sampled could be scored")

    def _encoded(self, rows: Iterable[Record]) -> list[TrainingRecord]:
        encoded = EncodedRecords(
            rows, self.format, self.args.max_length, self.only_best, self.online.reference, self.args.select
        )
        self.skipped.update(encoded.skipped)
        self.unranked += encoded.unranked
        self.left_out += encoded.left_out
        self.queries_cut, self.responses_cut = self.format.queries_cut, self.format.responses_cut
        return list(encoded.records)

    def _prepare(self, number: int, asked: Sequence[Record], begun: bool) -> None:
        """See whether the window stands on disk already; else note what it is going to be made of.

        ``begun``: steps of it are done, by a training that was stopped. Only its very samples will do then: the weights
        that wrote them are gone.
        """
        made_of = self._made_of(number, asked)
        if begun:
            del made_of[WEIGHTS]
            made_of = {**made_of, WEIGHTS: self.windows.note(number).get("made_of", {}).get(WEIGHTS)}
        different = self.windows.differences(number, made_of)
        if not different and self.windows.is_whole(number):
            log.info(f"window {number}: its samples are there")
            return
        if begun:
            why = "; ".join(different) or f"{self.windows.records(number)} is not as it was written"
            raise UserError(
                f"the checkpoint stands within window {number}, whose samples cannot be used ({why}), and "
                "the weights that wrote them are gone: put them back, or remove the checkpoints within this window"
            )
        self.windows.begin(number, made_of)

    def _made_of(self, number: int, asked: Sequence[Record]) -> dict[str, Any]:
        return {
            **self.online.settings(),
            **asdict(self.args.text),
            BETA: self._beta(number),
            "queries": checksum_of_records(asked),
            WEIGHTS: weights_digest(self.trainer.model),
        }

    def _beta(self, number: int) -> float:
        """β of a window: fixed, or adapted to the KL of the one before, an update for each of its steps."""
        target = self.args.kl_target
        if target is None or number == 0 or not self.online.kl_beta:
            return self.online.kl_beta
        before = self.windows.note(number - 1)
        if "kl" not in before:
            raise UserError(f"window {number - 1} has no note of its KL, which β is adapted to: remove the checkpoints")
        beta = float(before["made_of"][BETA])
        for _ in range(self.args.resample_steps):
            beta = adapted_beta(beta, before["kl"], target)
        return beta

    def _make(self, number: int, asked: Sequence[Record]) -> None:
        """Sample and score in parts: what a killed process has done is taken up again, and processes share them."""
        made_of, file = self.windows.note(number)["made_of"], self.windows.records(number)
        self._of_window.clear()
        works: dict[str, Work] = {"sample": self._sample, "score": partial(self._score, self._combination(made_of))}
        if not file.exists():
            in_parts(
                lambda: asked,
                file,
                {f"window {number}: {name}": work for name, work in works.items()},
                made_of,
                part_size=self.online.sampling.block_size,
                overwrite=True,
                total=len(asked),
            )
        if self.trainer.is_world_process_zero():
            seconds = {f"{name}_seconds": round(value, 3) for name, value in self._of_window.items()}
            self.windows.finish(number, {**seconds, **self._means(list(read_records(file)), made_of)})

    def _combination(self, made_of: Mapping[str, Any]) -> Combination:
        """How a window's scores are made of its rewards."""
        reference = self.online.reference
        if reference is None or not self.online.kl_beta:
            return self.rewards.combination
        return replace(self.rewards.combination, shaping=Shaping(made_of[BETA], _policy_column(made_of), reference))

    def _sample(self, block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        drawn = {}
        # A ratio of tokens is of those that were drawn, and a baseline over responses of all of them, equal ones too.
        over_tokens = OLD in self.trainer.needed
        with self._timed("sample"), undisturbed(self.trainer.model):
            for index, record in self.sampler.extend(block, tokens=over_tokens):
                drawn[index] = record if over_tokens else merge_duplicates(record)[0]
                done(1)
                self._heed_signals()
        return (drawn[index] for index in range(len(block)))

    def _heed_signals(self) -> None:
        """Stop within a window, which may take hours: its parts are kept. Else a signal waits for the step's end."""
        stop = self._stop()
        if stop is not None and stop.signal is not None:
            raise Stopped(128 + stop.signal)

    def _stop_together(self) -> None:
        """Where a signal came to one of the processes: keep the steps that are done, and stop in all of them."""
        stop = self._stop()
        signal = None if stop is None else stop.agree(self.args)
        if signal is not None:
            self.trainer.save_between_steps()
            raise Stopped(128 + signal)

    def _stop(self) -> StopOnSignal | None:
        return next((c for c in self.trainer.callback_handler.callbacks if isinstance(c, StopOnSignal)), None)

    def _score(self, combination: Combination, block: list[Record], done: Callable[[int], None]) -> list[Record]:
        with self._timed("score"), undisturbed(self.trainer.model):
            self.trainer.model.eval()
            if combination.shaping is not None:
                block = fill_sums(block, combination.shaping.policy, self._pi)
            if self._rho is not None:
                block = fill_sums(block, str(self.online.reference), self._rho)
            if OLD in self.trainer.needed:
                block = self._with_tokens(block, OLD)
            if OF_REFERENCE in self.trainer.needed and self._rho is not None:
                block = self._with_tokens(block, OF_REFERENCE, under=self._rho.model())
            scored = [combination.score(record) for record in self.rewards.judge(block)]
        done(len(block))
        return scored

    def _with_tokens(self, block: Sequence[Record], column: str, **options: Any) -> list[Record]:
        filled = iter(self.trainer.with_token_logprobs([r for r in block if r.responses], column, **options))
        return [next(filled) if record.responses else record for record in block]

    def _means(self, records: Sequence[Record], made_of: Mapping[str, Any]) -> dict[str, float]:
        """Of the responses that were sampled: their mean reward, without the KL term, and their mean log π − log ρ."""
        sampled = [[self.sampler.source in source_names(tag) for tag in record.sources] for record in records]
        rewards = [self.rewards.combination.score(record).scores for record in records]
        means = {"sample_reward_mean": _mean(rewards, sampled)}
        if self.online.kl_beta:
            names = _policy_column(made_of), str(self.online.reference)
            sums = [[record.rewards.get(name, []) for name in names] for record in records]
            means |= {"kl": _mean([log_ratios(*pair) for pair in sums], sampled), BETA: made_of[BETA]}
        return {name: value for name, value in means.items() if value is not None}

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - began
            self._of_window[what] += time.perf_counter() - began


def _only(batches: list[list[TrainingRecord]]) -> list[TrainingRecord]:
    (batch,) = batches
    return batch


def _policy_column(made_of: Mapping[str, Any]) -> str:
    """Where the log-probability sums of the policy that sampled stand, beside those of the reference."""
    return f"{SUM}:policy#{made_of[WEIGHTS][:DIGITS]}"


def _mean(values: Iterable[Sequence[float | None]], chosen: Iterable[Sequence[bool]]) -> float | None:
    """The mean of those of ``values`` that are chosen and not None."""
    found = [v for row, flags in zip(values, chosen) for v, flag in zip(row, flags) if flag and v is not None]
    return sum(found) / len(found) if found else None
