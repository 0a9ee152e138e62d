"""OP-k: a data set whose responses the policy itself writes while it trains (arXiv 2304.05302, Table 1).

Every k optimiser steps a window begins: responses to the queries of the next k steps are drawn from the policy as it is
now, joined with those that the data provides, and scored. The steps of the window train on them. It is a data set like
another to ``RRHFTrainer``: optimiser, schedule and random states live on, and sampling disturbs none of them.

The records of a window are kept on disk (``rrhf.training.windows``) and made in parts, so that a training that was
killed goes on bit for bit: within a window with its very samples, at the beginning of one with weights that are the
same.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from rrhf.common.errors import UserError
from rrhf.models.batching import SIZES
from rrhf.models.identity import weights_digest
from rrhf.models.tokenization import TextFormat
from rrhf.records.checksums import checksum_of_records
from rrhf.records.duplicates import merge_duplicates
from rrhf.records.files import Ids, read_records
from rrhf.records.parts import in_parts
from rrhf.records.record import Record, record_from_row
from rrhf.records.sources import source_names
from rrhf.rewards.functions import RewardFunction
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import Rewards, is_provided, reward_digest, reward_name
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.batching import MicroBatchSampler, Steps, shares
from rrhf.training.config import RRHFConfig
from rrhf.training.dataset import EncodedRecords, TrainingRecord
from rrhf.training.undisturbed import undisturbed
from rrhf.training.windows import FOLDER, SECONDS, WEIGHTS, Windows

log = logging.getLogger("rrhf")


@dataclass(frozen=True)
class Online:
    """Where the responses of OP-k come from, and what scores them; k is ``RRHFConfig.resample_steps``.

    Raises:
        UserError: a reward cannot score new texts.
    """

    sampling: SamplingSettings
    rewards: Sequence[str | RewardFunction]
    reward_weights: Sequence[float] | None = None
    context: RewardContext | None = None

    def __post_init__(self) -> None:
        for reward in self.rewards:
            if is_provided(reward):
                raise UserError(f"--reward {reward}: cannot score new texts; give pkg.module:function")

    def codes(self) -> dict[str, str]:
        """Each reward's name → the digest of its code or weights."""
        return {reward_name(reward): reward_digest(reward, self.context) for reward in self.rewards}

    def settings(self) -> dict[str, Any]:
        """What the samples and their scores depend on, beside the policy and the queries."""
        sampling = {f"sample.{name}": value for name, value in asdict(self.sampling).items() if name != "batch_size"}
        codes = {f"code of {name}": code for name, code in self.codes().items()}
        return {**sampling, **codes, "score.reward_weights": list(self.reward_weights or [])}


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
        self.rewards = Rewards(online.rewards, weights=online.reward_weights, missing_only=True, context=online.context)
        self.skipped: Counter[str] = Counter()
        self.unranked = self.queries_cut = self.responses_cut = 0
        self.records: list[TrainingRecord] = []  # as large as they can get: what memory is planned with
        self._number: int | None = None  # of the window at hand
        self._shares: dict[int, list[list[TrainingRecord]]] = {}  # step → this process's micro-batches
        self._seconds: dict[str, float] = defaultdict(float)  # since the last line of metrics
        self._of_window: dict[str, float] = defaultdict(float)
        self._since: float | None = None
        self._measured: dict[str, float] = {}

    # -- what the trainer asks for

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
        self.sampler = Sampler(trainer.model, trainer.processing_class, self.online.sampling, args.text)
        seed = args.data_seed if args.data_seed is not None else args.seed
        self.steps = Steps(
            len(self.queries), args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size, seed
        )
        self.windows = Windows(Path(str(args.output_dir)) / FOLDER)

    def loader(self) -> DataLoader:
        """This process's micro-batches, as lists of encoded records."""
        return DataLoader(self, batch_sampler=MicroBatchSampler(self.steps), collate_fn=_only)

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
        """Let go of what the rewards hold."""
        self.rewards.close()

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
        if not self.windows.is_whole(number):
            self._of_window.clear()
            self._make(number, asked)
        self.trainer.accelerator.wait_for_everyone()
        records = list(read_records(self.windows.records(number)))
        self._measured = _means(records, self.sampler.source)
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
        encoded = EncodedRecords(rows, self.format, self.args.max_length, self.only_best, select=self.args.select)
        self.skipped.update(encoded.skipped)
        self.unranked += encoded.unranked
        self.queries_cut, self.responses_cut = self.format.queries_cut, self.format.responses_cut
        return encoded.records

    def _prepare(self, number: int, asked: Sequence[Record], begun: bool) -> None:
        """See whether the window stands on disk already; else note what it is going to be made of.

        ``begun``: steps of it are done, by a training that was stopped. Only its very samples will do then: the weights
        that wrote them are gone.
        """
        made_of = self._made_of(asked)
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

    def _made_of(self, asked: Sequence[Record]) -> dict[str, Any]:
        return {
            **self.online.settings(),
            **asdict(self.args.text),
            "queries": checksum_of_records(asked),
            WEIGHTS: weights_digest(self.trainer.model),
        }

    def _make(self, number: int, asked: Sequence[Record]) -> None:
        """Sample and score in parts: what a killed process has done is taken up again, and processes share them."""
        in_parts(
            lambda: asked,
            self.windows.records(number),
            {f"window {number}: sample": self._sample, f"window {number}: score": self._score},
            self.windows.note(number)["made_of"],
            part_size=self.online.sampling.block_size,
            overwrite=True,
            total=len(asked),
        )
        if self.trainer.is_world_process_zero():
            self.windows.finish(number, {f"{name}_seconds": round(s, 3) for name, s in self._of_window.items()})

    def _sample(self, block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
        drawn = {}
        with self._timed("sample"), undisturbed(self.trainer.model):
            for index, record in self.sampler.extend(block):
                drawn[index] = merge_duplicates(record)[0]
                done(1)
        return (drawn[index] for index in range(len(block)))

    def _score(self, block: list[Record], done: Callable[[int], None]) -> list[Record]:
        with self._timed("score"), undisturbed(self.trainer.model):
            scored = list(self.rewards.score(block))
        done(len(block))
        return scored

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


def _means(records: Iterable[Record], source: str) -> dict[str, float]:
    """The mean score of the responses that were sampled."""
    scores = [
        score
        for record in records
        for tag, score in zip(record.sources, record.scores)
        if score is not None and source in source_names(tag)
    ]
    return {"sample_reward_mean": sum(scores) / len(scores)} if scores else {}
