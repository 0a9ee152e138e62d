"""``RRHFTrainer``: a ``transformers.Trainer`` whose batches are records and whose loss is Eq. 5."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rrhf.common.errors import UserError
from rrhf.losses import Loss, best_response, needed_by, ordered_pairs, ranking_loss, rrhf_loss
from rrhf.models.adapters import load_policy_or_adapter, with_adapter
from rrhf.models.attention import our_attention, takes_layouts
from rrhf.models.batching import SIZES, Forward, plan_forwards, tree_tokens
from rrhf.models.devices import free_memory
from rrhf.models.forward import causal_lm
from rrhf.models.interpolation import interpolated
from rrhf.models.load import ModelSettings, positions_in_table
from rrhf.models.out_of_memory import attempt, smaller_forwards
from rrhf.models.path_check import KeptPath, usable_path
from rrhf.models.tokenization import EncodedRecord, TextFormat
from rrhf.records.record import Record
from rrhf.training.batching import StepSampler
from rrhf.training.config import ADAPTER_LEARNING_RATE, RRHFConfig
from rrhf.training.dataset import EncodedRecords, TrainingRecord
from rrhf.training.folder import last_checkpoint
from rrhf.training.forward import (
    IDLE,
    Compute,
    ForwardOutputs,
    accept_records,
    forward_records,
    measure,
    where_scaled,
)
from rrhf.training.master_weights import refuse_no_masters, settle_precision, use_masters
from rrhf.training.memory import MemoryPlan, plan_memory, token_budget
from rrhf.training.needs import optional_tensors, refuse_unmet
from rrhf.training.online import OnlineRecords
from rrhf.training.reference import fill_in_memory, reference_pass
from rrhf.training.saving import SavingTrainer
from rrhf.training.two_pass import RandomState, SecondPass, first_pass

log = logging.getLogger("rrhf")

RATES = {"dropout", "activation_dropout", "layerdrop"}  # as layers call what they drop by, where that is no module
NAMED = 20  # a message names at most so many records


class RRHFTrainer(SavingTrainer):
    """Train a policy so that its length-normalised log-probabilities rank responses as their scores do (Eq. 5).

    Args:
        model: a ``PreTrainedModel``, or the name of one (hub id, folder, GGUF file).
        args: an ``RRHFConfig``.
        train_dataset, eval_dataset: a ``datasets.Dataset`` or any iterable of records (``query``, ``responses``,
            ``scores``); TRL preference rows (``prompt``, ``chosen``, ``rejected``) are taken too. Or ``OnlineRecords``,
            whose responses the policy samples every ``args.resample_steps`` steps.
        processing_class: the tokenizer; default: the one that comes with ``model``.
        peft_config: a PEFT configuration; the adapter alone is then trained.
        reference_sums: for losses with a reference, the name in the records' ``rewards`` of its log-probability sums.
            Where they do not have it, the trainer computes them before the first step, under ``args.reference_model``
            or the model as it is given.

    The loss is the mean over the queries of an optimiser step, whatever the batching, accumulation and number of
    processes. Every other argument is ``transformers.Trainer``'s.
    """

    _start: Mapping[str, Tensor] | None = None  # see ``save_between``

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: RRHFConfig | None = None,
        train_dataset: Iterable[Any] | OnlineRecords | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        reference_sums: str | None = None,
        **options: Any,
    ) -> None:
        args = args or RRHFConfig()
        _use_one_gpu(args)
        self.needed = needed_by(ranking_loss(args.ranking_loss), args.loss)
        self.reference_sums = reference_sums
        _refuse_missing_optimiser(str(args.optim.value))
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
        settle_precision(args, model)
        # Held-out records keep all their scored responses: how they are ranked is measured whatever trains.
        train = _encoded(
            train_dataset, args, processing_class, reference_sums, args.ranking_loss == "none", args.select
        )
        held_out = _encoded(eval_dataset, args, processing_class, reference_sums)
        _refuse_unusable(train, held_out, args.ranking_loss, self.needed, model, len(processing_class))
        sizes = [tree_tokens(r) for data in (train, held_out) if data is not None for r in data.records]
        self.path = usable_path(model, longest_row=max(sizes, default=0))
        self.loss_settings = args.loss
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._tokens, self._seconds = 0, 0.0
        self._step_ids: list[str] = []  # of the records of the step at hand
        self._paths: WeakKeyDictionary[PreTrainedModel, KeptPath] = WeakKeyDictionary()  # of models beside it
        self._not_finite_losses: list[tuple[float, list[str]]] = []  # of its forwards, with their records' ids
        accept_records(model)
        if args.max_tokens_per_forward is None:
            args.max_tokens_per_forward = _default_budget(model, args)
        with _naming_missing_tracker(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=processing_class,
                data_collator=list,
                **options,
            )
        refuse_no_masters(self)
        _keep_sums_exact(self.accelerator)
        if isinstance(train, OnlineRecords):
            train.attach(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy; with ``args.interpolation`` below 1, after ``save_between``.

        Raises:
            UserError: it was not called; `rrhf train` does.
        """
        missing = self.args.interpolation < 1 and self._start is None and self.is_world_process_zero()
        if missing and not _internal_call:  # checkpoints have the weights that training goes on from
            raise UserError(f"--interpolation {self.args.interpolation}: call save_between(start) with the state_dict "
                            "of the model that training began with before save_model")  # fmt: skip
        super().save_model(output_dir, _internal_call)

    def save_between(self, start: Mapping[str, Tensor]) -> None:
        """Save weights at ``args.interpolation`` of the way from ``start``, which training began with, from now on."""
        self._start = start

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._start is not None:
            weights = self.model.state_dict() if state_dict is None else state_dict
            state_dict = interpolated(self._start, weights, self.args.interpolation)
        super()._save(output_dir, state_dict)

    def save_between_steps(self) -> None:
        """Write a checkpoint of the steps that are done, unless it stands there; all processes take part.

        For who stops the training between two steps: no random number of the training's was drawn since.
        """
        step, folder = self.state.global_step, Path(str(self.args.output_dir))
        if not step or last_checkpoint(folder) == str(folder / f"checkpoint-{step}"):
            return
        self.control.should_log = self.control.should_save = True
        self.control.should_evaluate = False
        model, epoch = self.model, float(self.state.epoch or 0)
        self._maybe_log_save_evaluate(self._tr_loss, None, model, None, epoch, None, time.time())

    # -- batches

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches, as lists of encoded records; see ``StepSampler``."""
        args = self.args
        if isinstance(self.train_dataset, OnlineRecords):
            return self.train_dataset.loader()
        seed = args.data_seed if args.data_seed is not None else args.seed
        tokens = [SIZES[self.path](record) for record in self.train_dataset.records]
        sampler = StepSampler(
            tokens,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            world=args.world_size,
            rank=args.process_index,
            seed=seed,
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
        if (
            self.state.global_step >= self.state.max_steps
        ):  # gone on from a checkpoint of the last step: nothing is left
            self.control.should_training_stop = True
            return [], 0
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        merged = [record for batch in batches for record in batch]
        self._step_ids = [record.id for record in merged]
        queries = self._over_processes(len(merged)).sum()
        return [[] for _ in batches[:-1]] + [merged] * bool(batches), int(queries)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def _over_processes(self, *values: float) -> Tensor:
        """The values of every process, on the CPU. Tensor of shape (processes, values)."""
        if self.args.world_size == 1:
            return torch.tensor([values], dtype=torch.float64)
        mine = torch.tensor([values], dtype=torch.float32, device=self.args.device)
        gathered: Tensor = self.accelerator.gather(mine)
        return gathered.cpu()

    def memory_plan(self) -> MemoryPlan:
        """What this run will need against what the device has; before ``train``."""
        records = self.train_dataset.records
        shards = self.args.world_size if self.is_fsdp_enabled else 1
        return plan_memory(self.model, records, self.args, self.path, self.accelerator.autocast, shards)

    # -- one optimiser step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser asked for; bfloat16 weights get fp32 masters in it (see ``rrhf.training.master_weights``)."""
        use_masters(self)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Held for the whole run: gradient checkpointing looks the attention up again in the backward pass.
        model = causal_lm(self.model)
        with our_attention(model) if self.path == "tree" and takes_layouts(model) else contextlib.nullcontext():
            self._fill_reference_sums(self.train_dataset, self.eval_dataset)
            return super().train(*args, **kwargs)

    def _fill_reference_sums(self, *datasets: Any) -> None:
        """Before the first step, when the model is still the one it started as: what the records do not bring of ρ."""
        lacking = [
            data
            for data in datasets
            if isinstance(data, EncodedRecords) and any(record.reference_sums is None for record in data.records)
        ]
        if "reference_sums" not in self.needed or not lacking:
            return
        if self.state.global_step:
            raise UserError("evaluation on new records needs the reference's sums: give them before training starts")
        own = partial(self._compute, self.model)
        args, model = self.args, self.model
        with reference_pass(model, args, self.processing_class, own) as reference:
            for data in lacking:
                budget: int = args.max_tokens_per_forward
                fill_in_memory(data, reference, budget, self.path, args.process_index, args.world_size)

    def with_token_logprobs(
        self, records: Sequence[Record], column: str = "old_token_logprobs", under: PreTrainedModel | None = None
    ) -> list[Record]:
        """The records with the log-probability of every response token under the policy as it is now, or ``under``.

        It stands in ``extra[column]``: k lists of ‖y_i‖ numbers, for the token ids that training sees. Dropout is off.
        Losses over tokens (grpo, rloo) read it from the records that they train on.
        """
        format = TextFormat(self.processing_class, self.args.text)
        encoded = [format.encode_record(record, self.args.max_length) for record in records]
        model, path = self.model, self.path
        if under is not None:
            accept_records(under)
            model, path = under, self._paths.setdefault(under, KeptPath())(under, encoded)
        was_training = model.training
        model.eval()
        compute = partial(forward_records, model, path=path, tokens=True)
        outputs = measure(model, encoded, compute, self.args.max_tokens_per_forward, path)
        model.train(was_training)
        filled = []
        for record, ids, output in zip(records, encoded, outputs, strict=True):
            assert output.token_logprobs is not None
            each = output.token_logprobs.split([len(response) for response in ids.responses])
            filled.append(replace(record, extra={**record.extra, column: [row.tolist() for row in each]}))
        return filled

    def training_step(
        self, model: nn.Module, inputs: list[EncodedRecord], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward over the records of a step, a token budget at a time; returns its share of the loss."""
        if not self.accelerator.sync_gradients and not inputs:
            return torch.zeros((), device=self.args.device)  # merged into the last micro-batch of the step
        began = time.perf_counter()
        self._set_training(model)
        device = torch.device(self.args.device)
        random, sums = RandomState.now(device), dict(self._sums)
        while True:
            total, lack = attempt(lambda: self._whole_step(model, inputs, num_items_in_batch))
            if lack is None:
                break
            self._take_smaller_forwards(inputs, lack)  # all of the step again: its gradients begin with it
            model.zero_grad()
            random.restore(device)
            self._sums = defaultdict(float, sums)
            self._not_finite_losses = []
        assert total is not None
        self._refuse_not_finite()
        self._tokens += sum(tree_tokens(record) for record in inputs)
        self._seconds += time.perf_counter() - began
        return total.to(self.args.device)

    def _set_training(self, model: nn.Module) -> None:
        """Training mode; without dropout where log π is held against log ρ or log π_old, which were taken without.

        Such a loss needs that until training ends: rates that are set to 0 stay so, but in the model's configuration.
        """
        model.train()
        if {"reference_sums", "old_token_logprobs"} & set(self.needed):
            for module in model.modules():  # activations are checkpointed in training mode alone
                module.training = bool(getattr(module, "gradient_checkpointing", False))
                if module.training:  # OPT's layers, and others', have rates of their own, not modules
                    vars(module).update(dict.fromkeys(RATES & vars(module).keys(), 0.0))

    def _take_smaller_forwards(self, inputs: Sequence[EncodedRecord], lack: str) -> None:
        """Lower the token budget after memory ran out.

        Raises:
            UserError: no lower one helps, or other processes are in the middle of their passes.
        """
        if self.args.world_size > 1:
            raise UserError(
                f"step {self.state.global_step + 1}: out of memory ({lack}). Other processes take part in this step, "
                f"so it is not begun again: give a --max_tokens_per_forward below {self.args.max_tokens_per_forward}; "
                "the last checkpoint is whole, and the same command goes on from there"
            )
        self.args.max_tokens_per_forward, _ = smaller_forwards(
            inputs, self.args.max_tokens_per_forward, self.path, lack
        )

    def _whole_step(
        self, model: nn.Module, inputs: list[EncodedRecord], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        # Gradients are averaged over processes, the loss is a mean over all their queries.
        weight = self.args.world_size / max(int(num_items_in_batch or 1), 1)
        compute = partial(self._compute, model)
        forwards = plan_forwards(inputs, self.args.max_tokens_per_forward, self.path)
        kl = self._kl_of_step(model, compute, forwards) if "batch_kl" in self.needed else None
        # Where weights are sharded every pass is a collective operation: all processes make equally many without a
        # graph, and then equally many with one. How many is settled before the first of them.
        without = sum(len(forward.slices) for forward in forwards)
        graphs = sum(len(forward.slices) or 1 for forward in forwards)
        most_without, most_graphs = map(int, self._over_processes(without, graphs).amax(0))
        total = torch.zeros(())
        backward: list[Callable[[], Tensor]] = []
        for forward in forwards:
            if forward.slices:
                share, slices = self._first_pass(compute, forward, weight, kl)
                total = total + share
                backward += [partial(self._second_pass, compute, part) for part in slices]
            else:
                backward.append(partial(self._one_pass, compute, forward, weight, kl))
        with torch.no_grad():
            for _ in range(most_without - without):
                compute([IDLE])
        backward += [partial(self._idle_pass, compute)] * (most_graphs - graphs)
        for left, run in zip(range(len(backward) - 1, -1, -1), backward, strict=True):
            with self._gradients_shared(model, left == 0):
                total = total + run()
        return total

    def _compute(self, model: nn.Module, records: Sequence[EncodedRecord]) -> ForwardOutputs:
        return forward_records(model, records, self.path, self.args.keep_logits, "token_logprobs" in self.needed)

    @torch.no_grad()
    def _without_graph(self, compute: Compute, forwards: Sequence[Forward]) -> list[tuple[Tensor, Tensor | None]]:
        """The sums and, where the loss needs them, the tokens' log-probabilities of each forward.

        All processes make equally many passes, as in ``training_step``.
        """
        passes = sum(len(forward.slices) or 1 for forward in forwards)
        idle = int(self._over_processes(passes).max()) - passes
        found = []
        for forward in forwards:
            parts: list[Sequence[EncodedRecord]] = [[part] for part in forward.slices] or [forward.records]
            outputs = [compute(part) for part in parts]
            tokens = [output.token_logprobs for output in outputs if output.token_logprobs is not None]
            sums = torch.cat([output.sums for output in outputs])
            found.append((sums, torch.cat(tokens) if tokens else None))
        for _ in range(idle):
            compute([IDLE])
        return found

    def _kl_of_step(self, model: nn.Module, compute: Compute, forwards: Sequence[Forward]) -> Tensor:
        """``batch_kl`` of the records of a step: a pass of its own over all of them, without dropout."""
        model.eval()
        found = self._without_graph(compute, forwards)
        self._set_training(model)
        return self._batch_kl(forwards, [sums for sums, _ in found])

    def _batch_kl(self, forwards: Sequence[Forward], sums: Sequence[Tensor]) -> Tensor:
        """max(0, mean of log π − log ρ over all responses, those of all processes), a scalar."""
        records = [cast("TrainingRecord", record) for forward in forwards for record in forward.records]
        reference = [value for record in records for value in record.reference_sums or ()]
        total = float(torch.cat([*sums, torch.zeros(0)]).double().sum()) - math.fsum(reference)
        ratios, responses = self._over_processes(total, len(reference)).sum(0).tolist()
        return torch.tensor(max(0.0, ratios / max(responses, 1)), dtype=torch.float64)

    def _gradients_shared(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Hold the exchange of gradients back until the step's last forward: one exchange of whole gradients (DDP).

        Sharded gradients (FSDP) are exchanged at each forward: held back, every process would keep them whole.
        """
        if last or self.args.world_size == 1 or self.is_fsdp_enabled:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def _one_pass(self, compute: Compute, forward: Forward, weight: float, kl: Tensor | None) -> Tensor:
        outputs = compute(forward.records)
        loss = self._loss(forward.records, outputs.sums, outputs.router_loss, outputs.token_logprobs, kl) * weight
        self._note_finite(loss, forward)
        self._backward(loss)
        return loss.detach()

    def _first_pass(
        self, compute: Compute, forward: Forward, weight: float, kl: Tensor | None
    ) -> tuple[Tensor, list[SecondPass]]:
        """The loss of a record in slices, and what is to be run again for its gradient (``rrhf.training.two_pass``)."""
        first = first_pass(forward.slices, compute, self.args.device)
        loss = self._loss(forward.records, first.sums, None, first.token_logprobs, kl) * weight
        self._note_finite(loss, forward)
        self._sums["router_loss"] += first.router_loss
        return loss.detach() + first.router_loss * weight, first.second_passes(loss, weight)

    def _second_pass(self, compute: Compute, part: SecondPass) -> Tensor:
        part.run(compute, self._backward, self.args.device)
        return torch.zeros(())  # the first pass counted it

    def _idle_pass(self, compute: Compute) -> Tensor:
        self._backward(compute([IDLE]).sums.sum() * 0)
        return torch.zeros(())

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(where_scaled(self, loss))

    def _loss(
        self,
        records: Sequence[EncodedRecord],
        sums: Tensor,
        router: Tensor | None,
        tokens: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Tensor:
        """The sum of the records' losses; their metrics are added up on the way. All of it on the CPU."""
        total = sums.new_zeros(())
        parts = sums.split([len(record.responses) for record in records])
        sizes = [sum(map(len, record.responses)) for record in records]
        own = [None] * len(records) if tokens is None else tokens.split(sizes)
        for record, part, of_tokens in zip(cast("Sequence[TrainingRecord]", records), parts, own, strict=True):
            scores = torch.tensor(
                [math.nan if score is None else score for score in record.scores], dtype=torch.float64
            )
            lengths = torch.tensor([len(response) for response in record.responses])
            beside = optional_tensors(record, self.needed, part.detach(), of_tokens, kl)
            loss = rrhf_loss(part, lengths, scores, self.loss_settings, record.padded_length, **beside)
            total = total + loss.total
            self._measure(loss, scores)
        if kl is not None:
            self._sums["batch_kl"] += float(kl) * len(records)
        if router is not None:
            total = total + router * len(records)
            self._sums["router_loss"] += float(router.detach()) * len(records)
        return total

    @torch.no_grad()
    def _measure(self, loss: Loss, scores: Tensor) -> None:
        worse, better = ordered_pairs(scores, self.loss_settings.ties)
        best = best_response(scores)
        p = loss.logprobs
        self._sums["queries"] += 1
        self._sums["rank_loss"] += float(loss.rank)
        self._sums["sft_loss"] += float(loss.sft)
        self._sums["pairs"] += len(worse)
        self._sums["ordered"] += float((p[worse] < p[better]).sum())
        self._sums["violated_pairs"] += float((p[worse] > p[better]).sum())
        if best is not None:
            self._sums["best_logprob"] += float(p[best])

    def _note_finite(self, loss: Tensor, forward: Forward) -> None:
        if not bool(torch.isfinite(loss)):
            self._not_finite_losses.append((loss.item(), [record.id for record in forward.records]))

    def _refuse_not_finite(self) -> None:
        """Stop where a loss of this step was not finite in any process: all of them here, so that none waits."""
        mine, self._not_finite_losses = self._not_finite_losses, []
        if not self._over_processes(len(mine)).any():
            return
        losses = gather_object(mine)
        ids = [name for _, names in losses for name in names]
        raise UserError(self._not_finite(f"the loss is {losses[0][0]} on the records", ids))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm over all parameters, which must be finite: it is asked for before every update.

        All processes see the same norm, that of the gradients they share, so all of them stop here.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)) and self.accelerator.scaler is None:  # a scaler (fp16) skips such a step
            ids = gather_object(self._step_ids)
            raise UserError(
                self._not_finite(f"the loss is finite, but its gradient's norm is {norm} on the records", ids)
            )
        return norm

    def _not_finite(self, what: str, ids: Sequence[str]) -> str:
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        return (
            f"step {self.state.global_step + 1}: {what} {', '.join(ids[:NAMED])}{more}. "
            "Nothing was updated; the last checkpoint is whole. "
            "Lower --learning_rate, or look at these records in the data"
        )

    # -- metrics

    def _metrics(self) -> dict[str, float]:
        """Means since the last call, over all processes; the sums start anew."""
        means = ("rank_loss", "sft_loss", "violated_pairs", "best_logprob")
        names = ("queries", "pairs", "ordered", "router_loss", "batch_kl", *means)
        sums = self._over_processes(*(self._sums[name] for name in names)).sum(0)
        totals = dict(zip(names, sums.tolist(), strict=True))
        self._sums.clear()
        queries = totals["queries"]
        if not queries:
            return {}
        metrics = {name: totals[name] / queries for name in means}
        if totals["pairs"]:
            metrics["rank_accuracy"] = totals["ordered"] / totals["pairs"]
        elif self.loss_settings.ranking_loss == "none":  # pairs are not computed then
            del metrics["violated_pairs"]
        if "batch_kl" in self.needed:
            metrics["batch_kl"] = totals["batch_kl"] / queries
        if totals["router_loss"]:
            metrics["router_loss"] = totals["router_loss"] / queries
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the steps since the last line to what the trainer logs."""
        if "loss" in logs:
            logs.update(self._metrics())
            tokens = float(self._over_processes(self._tokens).sum())
            logs["tokens_per_second"] = round(tokens / max(self._seconds, 1e-9), 2)
            self._tokens, self._seconds = 0, 0.0
            if isinstance(self.train_dataset, OnlineRecords):
                logs.update(self.train_dataset.metrics())
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The losses and ranking metrics on held-out records, without generation."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(data, EncodedRecords):
            data = _encoded(data, self.args, self.processing_class, self.reference_sums)
            refuse_unmet(self.args.ranking_loss, self.needed, data, "the records to evaluate on")
        self._fill_reference_sums(data)
        kept, self._sums = self._sums, defaultdict(float)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        share = data.records[self.args.process_index :: self.args.world_size]
        forwards, found = self._held_out(model, share)
        kl = self._batch_kl(forwards, [sums for sums, _ in found]) if "batch_kl" in self.needed else None
        for forward, (sums, tokens) in zip(forwards, found, strict=True):
            self._loss(forward.records, sums, None, tokens, kl)
        model.train(was_training)
        metrics, self._sums = self._metrics(), kept
        if not metrics:
            raise UserError(f"no record is left to evaluate on: {data.summary()}")
        settings = self.loss_settings
        metrics["loss"] = settings.rank_weight * metrics["rank_loss"] + settings.sft_weight * metrics["sft_loss"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out(
        self, model: nn.Module, records: Sequence[EncodedRecord]
    ) -> tuple[list[Forward], list[tuple[Tensor, Tensor | None]]]:
        """The forwards of the records, and ``_without_graph`` of them: fewer tokens at a time where memory runs out."""
        compute = partial(self._compute, model)
        while True:
            forwards = plan_forwards(records, self.args.max_tokens_per_forward, self.path)
            found, lack = attempt(partial(self._without_graph, compute, forwards))
            if lack is None:
                return forwards, cast("list[tuple[Tensor, Tensor | None]]", found)
            self._take_smaller_forwards(records, lack)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 operations a parameter outside the embedding and token of the tree."""
        if not isinstance(inputs, list):
            return 0
        model = causal_lm(self.model)
        parameters = model.num_parameters(exclude_embeddings=True)
        return 6 * parameters * sum(tree_tokens(record) for record in inputs)


def _encoded(
    rows: Iterable[Any] | OnlineRecords | None,
    args: RRHFConfig,
    tokenizer: PreTrainedTokenizerBase,
    reference_sums: str | None = None,
    only_best: bool = False,
    select: str = "all",
) -> EncodedRecords | OnlineRecords | None:
    """Rows as token ids; what is sampled while training is encoded then."""
    if rows is None or isinstance(rows, EncodedRecords):
        return rows
    format = TextFormat(tokenizer, args.text)
    if isinstance(rows, OnlineRecords):
        rows.prepare(format, args, only_best)
        return rows
    if args.resample_steps:
        raise UserError(f"--resample_steps {args.resample_steps}: the training's records must be OnlineRecords")
    return EncodedRecords(rows, format, args.max_length, only_best, reference_sums, select)


def _refuse_unusable(
    train: EncodedRecords | OnlineRecords | None,
    held_out: EncodedRecords | OnlineRecords | None,
    loss: str,
    needed: Collection[str],
    model: PreTrainedModel,
    tokens: int,
) -> None:
    if train is not None and not train.records:
        raise UserError(f"no record is left to train on: {train.summary()}")
    for data, flag in ((train, "the data"), (held_out, "--eval_data")):
        if data is not None:
            refuse_unmet(loss, needed, data, flag)
    _refuse_without_rows(causal_lm(model), tokens, [data for data in (train, held_out) if data is not None])


def _refuse_without_rows(model: PreTrainedModel, tokens: int, datasets: Iterable[Any]) -> None:
    """Refuse records with positions or tokens that the model's tables have no row for, before a pass fails on one.

    Args:
        tokens: that the tokenizer has.
    """
    positions, rows = positions_in_table(model), len(model.get_input_embeddings().weight)
    if positions is None and tokens <= rows:
        return
    for record in (record for data in datasets for record in data.records):
        longest = len(record.query) + max(map(len, record.responses), default=0)
        if positions is not None and longest > positions:
            raise UserError(
                f"record {record.id!r}: query and response have {longest} tokens, and the model positions for "
                f"{positions}: give --max_length {positions}"
            )
        highest = max(max(ids, default=0) for ids in (record.query, *record.responses))
        if highest >= rows:
            raise UserError(
                f"record {record.id!r} has the token {highest}, and the model embeddings of {rows}: the tokenizer is "
                "another model's, or was extended: give the model's own, or resize the embeddings and save the model"
            )


def _use_one_gpu(args: RRHFConfig) -> None:
    """Keep one process to one GPU: transformers would split its batches over all of them (``nn.DataParallel``)."""
    if args.n_gpu > 1:
        log.warning(
            f"{args.n_gpu} GPUs are here and one process uses one of them. To train on all: "
            f"torchrun --nproc_per_node {args.n_gpu} -m rrhf.cli train … (docs/distributed.md)"
        )
        args._n_gpu = 1


def _default_budget(model: PreTrainedModel, args: RRHFConfig) -> int:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = model.get_input_embeddings().weight.shape[-1]
    layers = causal_lm(model).config.get_text_config().num_hidden_layers
    return token_budget(args.device.type, free_memory(args.device), trained, width, layers)


def _refuse_missing_optimiser(name: str) -> None:
    others = name.startswith("adamw_torch_")  # torchao's, which transformers asks for itself
    if ("bnb" in name or "8bit" in name) and not others and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--optim {name} needs bitsandbytes: pip install bitsandbytes, or take --optim adafactor")


def _keep_sums_exact(accelerator: Any) -> None:
    """FSDP2: leave the log-probability sums in fp32, and add gradients up in fp32.

    accelerate makes both of the type of the computation: in bfloat16 two sums near −100 are equal where they are less
    than 0.5 apart, so a violated pair would be a tie. ``output_dtype=None`` casts nothing, so layers hand on bfloat16.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


@contextlib.contextmanager
def _naming_missing_tracker(args: RRHFConfig) -> Iterator[None]:
    """Turn what transformers raises for a tracker that it does not know or that is not installed into a message."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(sign in str(error) for sign in ("to be installed", "is not supported, only")):
            raise
        raise UserError(f"--report_to {' '.join(args.report_to)}: {error}") from error
