"""``RRHFTrainer``: a ``transformers.Trainer`` whose batches are records and whose loss is Eq. 5."""

from __future__ import annotations

import contextlib
import math
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from rrhf.common.errors import UserError
from rrhf.losses import best_response, ordered_pairs, rrhf_loss
from rrhf.models.adapters import load_policy_or_adapter, with_adapter
from rrhf.models.attention import our_attention, takes_layouts
from rrhf.models.batching import Forward, plan_forwards, tree_tokens
from rrhf.models.forward import causal_lm
from rrhf.models.load import ModelSettings
from rrhf.models.passes import response_logprobs
from rrhf.models.path_check import usable_path
from rrhf.models.tokenization import EncodedRecord, TextFormat
from rrhf.training.batching import StepSampler
from rrhf.training.config import ADAPTER_LEARNING_RATE, ROOMY, RRHFConfig
from rrhf.training.dataset import EncodedRecords
from rrhf.training.master_weights import MasterWeights, has_low_precision


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
        """The optimiser asked for; bfloat16 weights get fp32 masters in it (see ``rrhf.training.master_weights``)."""
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
