"""``RewardTrainer``: a ``transformers.Trainer`` whose batches are queries with their ranked responses."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rrhf.common.errors import UserError
from rrhf.evaluation.ranking import Ranked, ranking_report
from rrhf.models.attention import our_attention
from rrhf.models.out_of_memory import attempt
from rrhf.rewards.reward_models.passes import CausalReward, RewardModel
from rrhf.training.forward import where_scaled
from rrhf.training.master_weights import refuse_no_masters, settle_precision, use_masters
from rrhf.training.reward_model.config import RewardModelConfig
from rrhf.training.reward_model.data import RankedRecords, RankedRows
from rrhf.training.reward_model.loss import bradley_terry
from rrhf.training.saving import SavingTrainer
from rrhf.training.two_pass import RandomState

log = logging.getLogger("rrhf")

MEASURED_AT_ONCE = 64  # queries whose rows are sorted by length together when they are measured


class RewardTrainer(SavingTrainer):
    """Train a sequence classification model with one label so that its logits rank responses as their scores do.

    Args:
        model: the ``…ForSequenceClassification`` model.
        reward: the same model as rows go through it (``rewards.reward_models``).
        args: a ``RewardModelConfig``.
        train_dataset, eval_dataset: records with rows of this model.
        processing_class: the tokenizer.

    The loss is the mean of ``bradley_terry`` over the queries of a micro-batch. Every other argument is
    ``transformers.Trainer``'s.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward: RewardModel,
        args: RewardModelConfig,
        train_dataset: RankedRecords,
        eval_dataset: RankedRecords | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        settle_precision(args, model)
        if args.n_gpu > 1:
            args._n_gpu = 1  # transformers would split lists over GPUs
        self.reward = reward
        self._most_queries = args.per_device_train_batch_size * max(args.n_gpu, 1)  # that fit the memory at a time
        self._share = 1.0  # of the micro-batch's queries, in the part at hand
        self._forwards = 0  # of the micro-batch, that ended
        _accept_rows(model, reward, args.max_tokens_per_forward)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            **options,
        )
        refuse_no_masters(self)
        self.model_accepts_loss_kwargs = False  # the loss is a mean of the micro-batch

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser asked for; bfloat16 weights get fp32 masters in it (see ``rrhf.training.master_weights``)."""
        use_masters(self)
        return super().create_optimizer(model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step; none where a checkpoint of the last step is gone on from."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        found: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return found

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Held for the whole run: gradient checkpointing looks the attention up again in the backward pass.
        tree = isinstance(self.reward, CausalReward) and self.reward.path == "tree"
        with our_attention(self.reward.backbone) if tree else contextlib.nullcontext():  # type: ignore[union-attr]
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: list[RankedRows], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; in halves of its queries where memory runs out."""
        begun = any(parameter.grad is not None for parameter in model.parameters())
        device = torch.device(self.args.device)
        random = RandomState.now(device)
        while True:
            self._forwards, size = 0, min(self._most_queries, len(inputs))
            loss, lack = attempt(lambda: self._in_parts(model, inputs, size, num_items_in_batch))  # noqa: B023
            if lack is None:
                assert loss is not None
                return loss
            if size == 1 or self.args.world_size > 1 or (begun and self._forwards):
                raise UserError(
                    f"step {self.state.global_step + 1}: out of memory ({lack}) with {size} queries at a time. The "
                    "last checkpoint is whole; give a smaller --per_device_train_batch_size (with --overwrite: it is "
                    "another training), --max_length or model"
                )
            if not begun:  # else the forward pass failed, which leaves the gradients of other micro-batches alone
                model.zero_grad()
            self._most_queries = size // 2
            log.warning(f"out of memory ({lack}): {self._most_queries} queries at a time from here on")
            random.restore(device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm over all parameters, which must be finite: it is asked for before every update."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(float(norm)) and self.accelerator.scaler is None:  # a scaler (fp16) skips such a step
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is finite, but its gradient's norm is {norm}. Nothing "
                "was updated; the last checkpoint is whole. Lower --learning_rate, or look at the data"
            )
        return norm

    def _in_parts(
        self, model: nn.Module, inputs: list[RankedRows], size: int, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        try:
            for start in range(0, len(inputs), size):
                part = inputs[start : start + size]
                self._share = len(part) / len(inputs)
                total = total + super().training_step(model, part, num_items_in_batch)
        finally:
            self._share = 1.0
        return total

    def compute_loss(
        self, model: nn.Module, inputs: list[RankedRows], return_outputs: bool = False, **options: Any
    ) -> Any:
        """The mean of ``bradley_terry`` over the queries of a micro-batch."""
        rewards = split_rewards(model, inputs)
        losses = [self._loss(part, query) for part, query in zip(rewards, inputs, strict=True)]
        loss = torch.stack(losses).mean()
        if not bool(torch.isfinite(loss)):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on the records "
                f"{', '.join(query.id for query in inputs)}. Nothing was updated; the last checkpoint is whole. "
                "Lower --learning_rate, or look at these records in the data"
            )
        self._forwards += 1
        loss = where_scaled(self, loss * self._share)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _loss(self, rewards: Tensor, query: RankedRows) -> Tensor:
        loss = bradley_terry(rewards, query.truth(), self.args.ties, self.args.center_rewards)
        assert loss is not None, query.id  # records without a pair were left out
        return loss

    @torch.no_grad()
    def ranked(self, data: RankedRecords) -> list[Ranked]:
        """The true scores and the model's rewards of every query, in order."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        found: list[Ranked] = []
        for start in range(0, len(data), MEASURED_AT_ONCE):
            queries = data.records[start : start + MEASURED_AT_ONCE]
            with self.compute_loss_context_manager():
                rewards = split_rewards(model, queries)
            found += [(query.scores, part.tolist()) for query, part in zip(queries, rewards, strict=True)]
        model.train(was_training)
        return found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and accuracy on held-out queries; the loss of those that have a pair by ``ties``, NaN where none has."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        ranked = self.ranked(data)
        rewards = [torch.tensor(part, dtype=torch.float64) for _, part in ranked]
        found = [
            bradley_terry(part, query.truth(), self.args.ties, self.args.center_rewards)
            for part, query in zip(rewards, data.records, strict=True)
        ]
        losses = [float(loss) for loss in found if loss is not None]
        report: dict[str, Any] = ranking_report(ranked)
        metrics = {
            f"{metric_key_prefix}_loss": math.fsum(losses) / len(losses) if losses else math.nan,
            f"{metric_key_prefix}_accuracy": report["accuracy"]["mean"],
        }
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def split_rewards(model: nn.Module, queries: Sequence[RankedRows]) -> list[Tensor]:
    """One call of ``model``, prepared by ``_accept_rows``: the rewards of each query's responses, on the CPU, with the
    graph. Tensors of shape (k,)."""
    rewards: Tensor = model(rrhf_rows=[row for query in queries for row in query.rows])["rewards"].cpu()
    return list(rewards.split([len(query.scores) for query in queries]))


def _accept_rows(model: PreTrainedModel, reward: RewardModel, budget: int) -> None:
    """Teach this model's ``forward`` the keyword ``rrhf_rows``: wrappers and autocast act on calls of the model."""
    plain = model.forward

    def forward(*args: Any, rrhf_rows: Any = None, **kwargs: Any) -> Any:
        if rrhf_rows is None:
            return plain(*args, **kwargs)
        return {"rewards": reward.compute(rrhf_rows, budget)[:, 0]}

    model.forward = forward
