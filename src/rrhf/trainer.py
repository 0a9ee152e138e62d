"""``RRHFTrainer``: a ``transformers.Trainer`` whose batches are records and whose loss is Eq. 5."""

from __future__ import annotations

import contextlib
import math
import time
import types
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from rrhf.adapters import load_policy_or_adapter, with_adapter
from rrhf.attention import our_attention, takes_layouts
from rrhf.batching import Forward, StepSampler, plan_forwards, tree_tokens
from rrhf.errors import UserError
from rrhf.launch import check_connected, launched_processes
from rrhf.losses import LossSettings, best_response, ordered_pairs, rrhf_loss
from rrhf.models import ModelSettings, native_bfloat16, resolve_device
from rrhf.precision import MasterWeights, has_low_precision
from rrhf.records import Record, record_from_row
from rrhf.text import EncodedRecord, TextFormat, TextSettings
from rrhf.tree import causal_lm, response_logprobs, usable_path

LEARNING_RATE = 2e-5  # the paper's
ADAPTER_LEARNING_RATE = 2e-4  # ten times as much: docs/adapters.md


# The default of --max_tokens_per_forward; who asks for less wants memory, and logits are then not kept.
ROOMY = 2048


@dataclass
class RRHFConfig(TrainingArguments, LossSettings):
    """Every argument of ``transformers.TrainingArguments``, with the paper's values as defaults, and those of RRHF.

    ``per_device_train_batch_size`` counts queries, each with all its responses.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate; default: 2e-5, and 2e-4 where --peft trains an adapter"}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "steps of warm-up, or below 1 their share of all steps"}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "passes over the records"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "queries a device and micro-batch"})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "micro-batches an optimiser step"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of metrics"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a non-finite loss stops the run instead"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "records keep their columns"})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast over fp32 weights; default: for fp32 weights, where the hardware has it"},
    )
    max_length: int = field(
        default=192, metadata={"help": "most tokens of query and response together; the response is cut from the right"}
    )
    max_query_length: int | None = field(
        default=None, metadata={"help": "most tokens of a query; longer ones are cut from the left and counted"}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "put before queries that are messages"})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "arguments of the chat template, as JSON"})
    max_tokens_per_forward: int = field(
        default=ROOMY,
        metadata={"help": "rows of one forward pass; a record with more is computed in two passes, slice by slice"},
    )

    def __post_init__(self) -> None:
        faults = [
            f"--{name} {getattr(self, name)}: must be at least {least}"
            for name, least in (("max_length", 2), ("max_tokens_per_forward", 1), ("per_device_train_batch_size", 1))
            if getattr(self, name) < least
        ]
        faults += self.faults()
        try:
            _ = self.text
        except UserError as error:
            faults.append(str(error))
        if faults:
            raise UserError("\n".join(faults))
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        if not accelerated:
            self.use_cpu = True  # else processes started together on a CPU do not find each other
        self.learning_rate_by_default = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE
        self.bf16_by_default = self.bf16 is None
        if self.bf16 is None:
            self.bf16 = not self.fp16 and native_bfloat16(resolve_device("cpu" if self.use_cpu else "auto"))
        self.output_dir: str | None = self.output_dir or "rrhf-model"
        processes = launched_processes()
        super().__post_init__()
        check_connected(processes, self.world_size)

    @property
    def text(self) -> TextSettings:
        return TextSettings(self.system_prompt, self.chat_template_kwargs, self.max_query_length)

    @property
    def loss(self) -> LossSettings:
        return LossSettings(**{f.name: getattr(self, f.name) for f in fields(LossSettings)})


class EncodedRecords(Dataset):
    """Records as token ids in memory, without those that cannot be trained on; ``skipped`` counts them by reason."""

    def __init__(self, rows: Iterable[Record | Mapping[str, Any]], format: TextFormat, max_length: int) -> None:
        self.records: list[EncodedRecord] = []
        self.skipped: Counter[str] = Counter()
        self.unranked = 0
        for number, row in enumerate(rows):
            record = row if isinstance(row, Record) else _as_record(dict(row), f"row {number}")
            encoded = format.encode_record(record, max_length)
            reason = _unusable(encoded, max_length)
            if reason is not None:
                self.skipped[reason] += 1
                continue
            self.unranked += sum(score is not None for score in encoded.scores) < 2
            responses: list[Sequence[int]] = [array("i", response) for response in encoded.responses]
            self.records.append(EncodedRecord(encoded.id, array("i", encoded.query), responses, encoded.scores))
        self.queries_cut, self.responses_cut = format.queries_cut, format.responses_cut

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EncodedRecord:
        return self.records[index]

    def summary(self) -> str:
        """What became of the records, in one line."""
        parts = [f"{len(self)} records to train on"]
        parts += [f"{count} skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        if self.unranked:
            parts.append(f"{self.unranked} with fewer than two scored responses (fitted, not ranked)")
        parts += [f"{self.queries_cut} queries cut"] * bool(self.queries_cut)
        parts += [f"{self.responses_cut} responses cut"] * bool(self.responses_cut)
        return "; ".join(parts)


def _as_record(row: dict[str, Any], where: str) -> Record:
    if "chosen" in row and "rejected" in row:
        from rrhf.datasets import FORMATS, SkipRowError

        try:
            converted = FORMATS["preference"](row)
        except SkipRowError as error:
            raise UserError(f"{where}: {error}") from error
        if converted is None:
            raise UserError(f"{where}: no record can be made of this preference row")
        row = converted
    return record_from_row(row, where, require="scores")


def _unusable(record: EncodedRecord, max_length: int) -> str | None:
    if len(record.query) >= max_length:
        return f"the query leaves no room for a response (--max_length {max_length}; cut it with --max_query_length)"
    if all(score is None for score in record.scores):
        return "no response is scored"
    return None


class RRHFTrainer(Trainer):
    """Train a policy so that its length-normalised log-probabilities rank responses as their scores do (Eq. 5).

    Args:
        model: a ``PreTrainedModel``, or the name of one (hub id, folder, GGUF file).
        args: an ``RRHFConfig``.
        train_dataset, eval_dataset: a ``datasets.Dataset`` or any iterable of records (``query``, ``responses``,
            ``scores``); TRL preference rows (``prompt``, ``chosen``, ``rejected``) are taken too.
        processing_class: the tokenizer; default: the one that comes with ``model``.
        peft_config: a PEFT configuration; the adapter alone is then trained.

    The loss is the mean over the queries of an optimiser step, whatever the batching, accumulation and number of
    processes. Every other argument is ``transformers.Trainer``'s.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: RRHFConfig | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **options: Any,
    ) -> None:
        args = args or RRHFConfig()
        if isinstance(model, str):
            device = "cpu" if args.use_cpu else "auto"
            model, tokenizer = load_policy_or_adapter(ModelSettings(model=model, device=device), training=True)
            processing_class = processing_class or tokenizer
        if processing_class is None:
            raise UserError("RRHFTrainer needs the tokenizer: processing_class=AutoTokenizer.from_pretrained(…)")
        if peft_config is not None:
            if args.learning_rate_by_default:
                args.learning_rate = ADAPTER_LEARNING_RATE
            model = with_adapter(model, peft_config)
            if args.gradient_checkpointing:
                model.enable_input_require_grads()

        def encode(rows: Iterable[Any] | None) -> EncodedRecords | None:
            if rows is None or isinstance(rows, EncodedRecords):
                return rows
            return EncodedRecords(rows, TextFormat(processing_class, args.text), args.max_length)

        train, held_out = encode(train_dataset), encode(eval_dataset)
        if train is not None and not len(train):
            raise UserError(f"no record is left to train on: {train.summary()}")
        sizes = [tree_tokens(r) for data in (train, held_out) if data is not None for r in data.records]
        self.path = usable_path(model, longest_row=max(sizes, default=0))
        self.loss_settings = args.loss
        if args.bf16_by_default and has_low_precision(model):  # nothing is left to cast
            args.bf16, args.mixed_precision = False, "no"
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._tokens, self._seconds = 0, 0.0
        _take_records(model)
        with _missing_tracker_said(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=processing_class,
                data_collator=list,
                **options,
            )

    # -- batches

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches, as lists of encoded records; see ``StepSampler``."""
        args = self.args
        seed = args.data_seed if args.data_seed is not None else args.seed
        sampler = StepSampler(
            len(self.train_dataset), self._train_batch_size, args.world_size, args.process_index, seed
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[EncodedRecord]], num_batches: int, device: torch.device
    ) -> tuple[list[list[EncodedRecord]], int]:
        """The micro-batches of one optimiser step, merged into its last so that its forwards can be filled.

        Returns the batches and how many queries the step has over all processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        merged = [record for batch in batches for record in batch]
        queries = self._sum_over_processes(float(len(merged)))
        return [[] for _ in batches[:-1]] + [merged] * bool(batches), int(queries)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def _sum_over_processes(self, value: float) -> float:
        if self.args.world_size == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.args.device)).sum())

    def _max_over_processes(self, value: int) -> int:
        if self.args.world_size == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.args.device)).max())

    # -- one optimiser step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser asked for; bfloat16 weights get fp32 masters in it (see ``rrhf.precision``)."""
        # FSDP and DeepSpeed exchange the parameters later and keep their own masters.
        apart = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.optimizer is None and not apart and has_low_precision(self.model):
            asked: Any = self.__dict__.get("optimizer_cls_and_kwargs")
            kind, options = asked or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs: Any = (MasterWeights, {"optimiser": kind, **options})
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Held for the whole run: gradient checkpointing looks the attention up again in the backward pass.
        model = causal_lm(self.model)
        with our_attention(model) if self.path == "tree" and takes_layouts(model) else contextlib.nullcontext():
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: list[EncodedRecord], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward over the records of a step, a token budget at a time; returns its share of the loss."""
        device = self.args.device
        if not self.accelerator.sync_gradients and not inputs:
            return torch.zeros((), device=device)  # merged into the last micro-batch of the step
        began = time.perf_counter()
        model.train()
        # Gradients are averaged over processes, the loss is a mean over all their queries.
        weight = self.args.world_size / max(int(num_items_in_batch or 1), 1)
        forwards = plan_forwards(inputs, self.args.max_tokens_per_forward, self.path)
        total = torch.zeros((), device=device)
        # Where weights are sharded every pass is a collective operation: all processes make equally many without a
        # graph, and then equally many with one. How many is settled before the first of them.
        first = sum(len(forward.slices) for forward in forwards)
        idle_first = self._max_over_processes(first) - first
        second = sum(len(forward.slices) or 1 for forward in forwards)
        idle_second = self._max_over_processes(second) - second
        backward: list[Callable[[], Tensor]] = []
        for forward in forwards:
            if forward.slices:
                share, slices = self._first_pass(model, forward, weight)
                total += share
                backward += [partial(self._second_pass, model, *part) for part in slices]
            else:
                backward.append(partial(self._one_pass, model, forward, weight))
        with torch.no_grad():
            for _ in range(idle_first):
                self._logprobs(model, [_IDLE])
        backward += [partial(self._idle_pass, model)] * idle_second
        for left, run in zip(range(len(backward) - 1, -1, -1), backward, strict=True):
            with self._gradients_shared(model, left == 0):
                total += run()
        self._tokens += sum(tree_tokens(record) for record in inputs)
        self._seconds += time.perf_counter() - began
        return total.detach()

    def _logprobs(self, model: nn.Module, records: Sequence[EncodedRecord]) -> dict[str, Any]:
        roomy = self.args.max_tokens_per_forward >= ROOMY
        outputs: dict[str, Any] = model(rrhf_records=records, rrhf_path=self.path, rrhf_keep_logits=roomy)
        return outputs

    def _gradients_shared(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or self.args.world_size == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def _one_pass(self, model: nn.Module, forward: Forward, weight: float) -> Tensor:
        outputs = self._logprobs(model, forward.records)
        loss = self._loss(forward.records, outputs["sums"], outputs["lengths"], outputs["router_loss"]) * weight
        self._check_finite(loss, forward)
        self.accelerator.backward(loss)
        return loss.detach()

    def _first_pass(self, model: nn.Module, forward: Forward, weight: float) -> tuple[Tensor, list[tuple[Any, ...]]]:
        """The first of two passes that give the gradient of ``_one_pass`` with one slice of responses in memory.

        The loss sees a response through its log-probability alone, so ∂L/∂θ = Σ_i ∂L/∂s_i · ∂s_i/∂θ: the sums s_i are
        computed without a graph, ∂L/∂s_i is taken, and each slice runs again with its weights. Random states are kept,
        so that dropout draws the same masks in both passes. Returns the loss and the arguments of ``_second_pass``.
        """
        states, sums, lengths, router = [], [], [], 0.0
        with torch.no_grad():
            for part in forward.slices:
                states.append(_random_state(self.args.device))
                outputs = self._logprobs(model, [part])
                sums.append(outputs["sums"])
                lengths.append(outputs["lengths"])
                if outputs["router_loss"] is not None:
                    router += float(outputs["router_loss"]) / len(forward.slices)
        leaf = torch.cat(sums).detach().requires_grad_()
        loss = self._loss(forward.records, leaf, torch.cat(lengths), None) * weight
        self._check_finite(loss, forward)
        (gradient,) = torch.autograd.grad(loss, leaf)
        self._sums["router_loss"] += router
        gradients = gradient.split([len(part.responses) for part in forward.slices])
        router_weights = [weight / len(forward.slices)] * len(forward.slices)
        slices = list(zip(forward.slices, states, gradients, router_weights, strict=True))
        return loss.detach() + router * weight, slices

    def _second_pass(
        self, model: nn.Module, part: EncodedRecord, state: Any, gradient: Tensor, router_weight: float
    ) -> Tensor:
        after = _random_state(self.args.device)
        _set_random_state(state, self.args.device)
        outputs = self._logprobs(model, [part])
        objective = (outputs["sums"] * gradient).sum()
        if outputs["router_loss"] is not None:
            objective = objective + outputs["router_loss"] * router_weight
        self.accelerator.backward(objective)
        _set_random_state(after, self.args.device)
        return torch.zeros_like(objective.detach())  # the first pass counted it

    def _idle_pass(self, model: nn.Module) -> Tensor:
        """Other processes compute: collective operations must match."""
        nothing = self._logprobs(model, [_IDLE])["sums"].sum() * 0
        self.accelerator.backward(nothing)
        return nothing.detach()

    def _loss(self, records: Sequence[EncodedRecord], sums: Tensor, lengths: Tensor, router: Tensor | None) -> Tensor:
        """The sum of the records' losses; their metrics are added up on the way."""
        total = sums.new_zeros(())
        sizes = [len(record.responses) for record in records]
        for record, part, length in zip(records, sums.split(sizes), lengths.split(sizes), strict=True):
            scores = torch.tensor(
                [math.nan if score is None else score for score in record.scores], dtype=torch.float64
            ).to(sums.device)
            padded = len(record.query) + max(len(response) for response in record.responses)
            loss = rrhf_loss(part, length, scores, self.loss_settings, padded)
            total = total + loss.total
            self._measure(loss.rank, loss.sft, loss.logprobs, scores)
        if router is not None:
            total = total + router * len(records)
            self._sums["router_loss"] += float(router.detach()) * len(records)
        return total

    @torch.no_grad()
    def _measure(self, rank: Tensor, fit: Tensor, logprobs: Tensor, scores: Tensor) -> None:
        worse, better = ordered_pairs(scores)
        best = best_response(scores)
        self._sums["queries"] += 1
        self._sums["rank_loss"] += float(rank)
        self._sums["sft_loss"] += float(fit)
        self._sums["pairs"] += len(worse)
        self._sums["ordered"] += float((logprobs[worse] < logprobs[better]).sum())
        self._sums["violated_pairs"] += float((logprobs[worse] > logprobs[better]).sum())
        if best is not None:
            self._sums["best_logprob"] += float(logprobs[best])

    def _check_finite(self, loss: Tensor, forward: Forward) -> None:
        if not bool(torch.isfinite(loss)):
            ids = ", ".join(record.id for record in forward.records)
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on the records {ids}. "
                "Nothing was updated; the last checkpoint is whole. "
                "Lower --learning_rate, or look at these records with `rrhf inspect`"
            )

    # -- metrics

    def _metrics(self) -> dict[str, float]:
        """Means since the last call, over all processes; the sums start anew."""
        means = ("rank_loss", "sft_loss", "violated_pairs", "best_logprob")
        names = ("queries", "pairs", "ordered", "router_loss", *means)
        totals = {name: self._sum_over_processes(self._sums[name]) for name in names}
        self._sums.clear()
        queries = totals["queries"]
        if not queries:
            return {}
        metrics = {name: totals[name] / queries for name in means}
        if totals["pairs"]:
            metrics["rank_accuracy"] = totals["ordered"] / totals["pairs"]
        if totals["router_loss"]:
            metrics["router_loss"] = totals["router_loss"] / queries
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the steps since the last line to what the trainer logs."""
        if "loss" in logs:
            logs.update(self._metrics())
            tokens = self._sum_over_processes(float(self._tokens))
            logs["tokens_per_second"] = round(tokens / max(self._seconds, 1e-9), 2)
            self._tokens, self._seconds = 0, 0.0
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The losses and ranking metrics on held-out records, without generation."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(data, EncodedRecords):
            data = EncodedRecords(data, TextFormat(self.processing_class, self.args.text), self.args.max_length)
        kept, self._sums = self._sums, defaultdict(float)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        share = data.records[self.args.process_index :: self.args.world_size]
        for forward in plan_forwards(share, self.args.max_tokens_per_forward, self.path):
            parts = forward.slices or forward.records
            outputs = [self._logprobs(model, [part]) for part in parts]
            sums, lengths = torch.cat([o["sums"] for o in outputs]), torch.cat([o["lengths"] for o in outputs])
            self._loss(forward.records, sums, lengths, None)
        model.train(was_training)
        found, self._sums = self._metrics(), kept
        if not found:
            raise UserError(f"no record is left to evaluate on: {data.summary()}")
        settings = self.loss_settings
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_loss"] = (
            settings.rank_weight * found["rank_loss"] + settings.sft_weight * found["sft_loss"]
        )
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """6 operations a parameter outside the embedding and token of the tree."""
        if not isinstance(inputs, list):
            return 0
        model = causal_lm(self.model)
        parameters = model.num_parameters(exclude_embeddings=True)
        return 6 * parameters * sum(tree_tokens(record) for record in inputs)


@contextlib.contextmanager
def _missing_tracker_said(args: RRHFConfig) -> Iterator[None]:
    """Turn what transformers raises for a tracker that it does not know or that is not installed into a message."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(sign in str(error) for sign in ("to be installed", "is not supported, only")):
            raise
        raise UserError(f"--report_to {' '.join(args.report_to)}: {error}") from error


_IDLE = EncodedRecord("idle", [0], [[0]], [None])


def _take_records(model: PreTrainedModel) -> None:
    """Teach this model's ``forward`` the keyword ``rrhf_records``.

    Wrappers for several processes (DDP, FSDP) and autocast act on calls of the model, so the ranking pass must be one.
    """
    # A function of the model, not bound to this one: a copy's forward pass must be that of the copy.
    bound = model.forward
    plain = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))

    def forward(
        self: PreTrainedModel,
        *args: Any,
        rrhf_records: Any = None,
        rrhf_path: str = "tree",
        rrhf_keep_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        if rrhf_records is None:
            return plain(self, *args, **kwargs)
        found = response_logprobs(self, rrhf_records, rrhf_path, rrhf_keep_logits)
        return {"sums": found.sums, "lengths": found.lengths, "router_loss": found.router_loss}

    model.forward = types.MethodType(forward, model)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
