"""PPO on responses of language models, and NLPO: the paper's rivals (Eq. 6 of arXiv 2304.05302, Table 10).

The equations, with their symbols, stand in ``ppo_terms``. Responses are drawn from all of π at temperature 1 without
dropout: u_t is 1 at the first step of a rollout. With ``NLPOSettings`` tokens are drawn from π_M, π on the top-p tokens
of a copy of the policy that lags; u_t is then π_M / π_M,old under the rollout's masks, and the penalty still π's,
as in the authors' code (RL4LMs; it adds the 100 likeliest tokens and all special ones to every mask: not done here).
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from rrhf.common.errors import UserError
from rrhf.models.batching import plan_forwards
from rrhf.models.forward import causal_lm
from rrhf.models.out_of_memory import attempt, smaller_forwards
from rrhf.models.passes import response_hidden, response_logprobs
from rrhf.models.path_check import usable_path
from rrhf.models.tokenization import EncodedRecord, TextSettings
from rrhf.records.record import Record
from rrhf.rewards.kl import adapted_beta
from rrhf.rewards.scoring import Rewards
from rrhf.sampling.nucleus import Nucleus, log_mass, nucleus_of
from rrhf.sampling.sampler import Sampler
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.master_weights import MasterWeights, has_low_precision, refuse_float16
from rrhf.training.ppo_settings import NLPOSettings, PPOConfig
from rrhf.training.ppo_terms import advantages, explained_variance, surrogate, token_rewards, value_loss, whitened

T = TypeVar("T")


@dataclass(frozen=True)
class Models:
    """``reference``: ρ, frozen; None where the policy has an adapter and ρ is the policy without it.

    ``value``: a model of its own for V; None where V reads the policy's hidden states.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None
    value: PreTrainedModel | None = None


@dataclass(frozen=True)
class Rollout:
    """Scored samples, with what is known of their N tokens before the first update.

    ``records``: a query each, whose id says where its first token stands in the tensors of shape (N,). ``logprobs``:
    log π_old, under the mask where there is one. ``masks``: see ``nucleus_of``.
    """

    records: list[EncodedRecord]
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    masks: np.ndarray | None
    metrics: dict[str, float]


class PPO:
    """A policy in training: ``step`` samples a rollout and trains on it.

    ``done`` rollouts are behind it; the samples of the next depend on the seed, on ``done`` and on the weights alone.
    ``trained`` are the modules that are trained, by name; ``lagged`` is NLPO's copy of the policy.

    Raises:
        UserError: a query and a response do not fit the model's context, or weights are float16.
    """

    def __init__(
        self, models: Models, rewards: Rewards, queries: Sequence[Record], config: PPOConfig,
        text: TextSettings | None = None, nlpo: NLPOSettings | None = None,
    ) -> None:  # fmt: skip
        self.models, self.rewards, self.queries, self.config, self.nlpo = models, rewards, queries, config, nlpo
        policy = models.policy.eval()
        refuse_float16(policy)
        self.device = policy.get_input_embeddings().weight.device
        names = ("num_responses", "max_new_tokens", "batch_size", "seed")
        sampling = SamplingSettings(**{name: getattr(config, name) for name in names})
        self.sampler = Sampler(policy, models.tokenizer, sampling, text)
        row = max(len(self.sampler.format.encode_query(query.query)) for query in queries)
        row += config.num_responses * config.max_new_tokens
        others = [model for model in (models.reference, models.value) if model is not None]
        paths = [usable_path(model, row) for model in (policy, *others)]
        self.path = "tree" if all(path == "tree" for path in paths) else "padded"
        self.budget = config.max_tokens_per_forward or (2048 if self.device.type == "cpu" else 8192)
        trunk = causal_lm(policy if models.value is None else models.value.eval())
        self.head = _value_head(trunk.get_input_embeddings().weight.shape[-1]).to(self.device)
        self.trained: dict[str, nn.Module] = {"policy": policy, "value_head": self.head}
        if models.value is not None:
            self.trained["value_model"] = models.value
        self.lagged: PreTrainedModel | None = None
        if nlpo is not None:
            self.lagged = copy.deepcopy(policy).requires_grad_(False)
            self.sampler.nucleus = Nucleus(self.lagged, nlpo.nlpo_top_p)
        self.done, self.steps, self.beta = 0, 0, config.kl_beta
        self.total = config.rollouts(len(queries))
        self.optimiser = _optimiser(self.parameters, has_low_precision(policy), config)
        most = self.total * config.steps_per_rollout
        warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * most
        self.schedule = get_scheduler(config.lr_scheduler_type, self.optimiser, math.ceil(warmup), most)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.trained.values() for p in module.parameters() if p.requires_grad]

    @property
    def models_resident(self) -> int:
        """Models in memory: policy, reference, value model, lagged copy, and rewards that hold something."""
        held = [self.models.policy, self.models.reference, self.models.value, self.lagged]
        rewards = sum(hasattr(scorer, "close") for scorer in self.rewards.scorers.values())
        return sum(model is not None for model in held) + rewards

    def step(self) -> dict[str, float]:
        """One rollout: sampled, scored, trained on. Returns what it came to."""
        # What draws from the global random states, such as a reward, draws what it would in an undisturbed run.
        set_seed(random.Random(f"{self.config.seed}/{self.done}").randrange(2**32))
        if self.lagged is not None and self.nlpo is not None and self.done % self.nlpo.nlpo_refresh_steps == 0:
            self.lagged.load_state_dict(self.models.policy.state_dict())
        began = time.perf_counter()
        scored, spent = self._sampled(began)
        rollout = self._measured(*scored)
        if self.config.kl_target is not None:
            self.beta = adapted_beta(self.beta, rollout.metrics["kl"], self.config.kl_target)
        updates = self._updated(rollout)
        self.done += 1
        seconds = time.perf_counter() - began
        shares = {name: took / seconds for name, took in spent.items()}
        shares["training_share"] = 1 - sum(shares.values())
        return {**rollout.metrics, **updates, **shares, "tokens_per_second": len(rollout.logprobs) / seconds}

    # -- sampling and scoring

    def rollout_queries(self) -> list[Record]:
        """The queries of the next rollout, from all of them shuffled, and shuffled anew each time all were there."""
        count, size = len(self.queries), self.config.rollout_queries
        places = range(self.done * size, (self.done + 1) * size)
        orders = {
            passed: random.Random(f"{self.config.seed}/queries/{passed}").sample(range(count), count)
            for passed in {place // count for place in places}
        }
        chosen = [self.queries[orders[place // count][place % count]].without_responses() for place in places]
        return [replace(x, id=f"{x.id} (rollout {self.done}, query {place})") for x, place in zip(chosen, places)]

    def _sampled(self, began: float) -> tuple[tuple[list[EncodedRecord], Tensor, int], dict[str, float]]:
        """Responses in tokens, their scores, and how many had none; and the seconds that both took."""
        queries = self.rollout_queries()
        drawn = {i: (ids, responses) for i, ids, responses in self.sampler.respond_in_tokens(queries)}
        sampled = time.perf_counter()
        texts = [
            query.with_responses(
                [self.sampler.text(response) for response in drawn[i][1]],
                [response.finish for response in drawn[i][1]],
                [f"{self.sampler.source}/{k}" for k in range(self.config.num_responses)],
            )
            for i, query in enumerate(queries)
        ]
        records, scores, unscored, start = [], [], 0, 0
        for i, record in enumerate(self.rewards.score(texts)):
            kept = [k for k, score in enumerate(record.scores) if score is not None]
            unscored += len(record.scores) - len(kept)
            ids, responses = drawn[i]
            tokens = [responses[k].drawn for k in kept]
            scores += [record.scores[k] for k in kept]
            if kept:
                records.append(EncodedRecord(str(start), ids, tokens, [None] * len(kept)))
            start += sum(map(len, tokens))
        if not records:
            raise UserError(f"rollout {self.done}: the rewards scored no response: nothing can be learnt from it")
        spent = {"sampling_share": sampled - began, "scoring_share": time.perf_counter() - sampled}
        return (records, torch.tensor(scores, dtype=torch.float32), unscored), spent

    @torch.no_grad()
    def _measured(self, records: list[EncodedRecord], scores: Tensor, unscored: int) -> Rollout:
        """What is known of the tokens before the first update."""
        lengths = torch.tensor([len(response) for record in records for response in record.responses])
        logprobs, reference, old, values = (torch.zeros(int(lengths.sum())) for _ in range(4))

        def measure() -> np.ndarray | None:
            masks = None
            for part, places in self._passes(records):
                mask = self._masks(part)
                if mask is not None:
                    masks = np.zeros((len(old), mask.shape[1]), np.uint8) if masks is None else masks
                    masks[places.numpy()] = mask
                logprobs[places], old[places], values[places], _ = self._forward(part, mask)
                reference[places] = self._reference(part)
            return masks

        masks = self._within_memory(measure, records)
        rewards = token_rewards(logprobs, reference, scores, lengths, self.beta)
        if self.config.whiten_rewards:
            rewards = whitened(rewards, shift=False)
        if self.done == 0:
            values.fill_(self._begin_values(rewards, lengths))
        advantage = advantages(rewards, values, lengths, self.config.gamma, self.config.gae_lambda)
        returns = advantage + values
        kl = float((logprobs - reference).sum()) / len(lengths)
        metrics = {
            "reward_mean": float(scores.mean()), "reward_std": float(scores.std(unbiased=False)), "kl": kl,
            "kl_beta": self.beta, "entropy": -float(old.mean()), "length_mean": float(lengths.float().mean()),
            "explained_variance": explained_variance(values, returns), "responses": len(lengths), "unscored": unscored,
        }  # fmt: skip
        if self.config.whiten_advantages:
            advantage = whitened(advantage)
        return Rollout(records, old, values, advantage, returns, masks, metrics)

    def _begin_values(self, rewards: Tensor, lengths: Tensor) -> float:
        """V of the first rollout, everywhere: the mean of what its tokens' returns come to, put into the head's bias.

        A V of 0 under scores that are all positive would leave (γλ)^(T − t) R as advantages. Whitened, they would say
        no more than how near a token stands to its response's end.
        """
        mean = float(advantages(rewards, torch.zeros_like(rewards), lengths, self.config.gamma, 1.0).mean())
        nn.init.constant_(self.head.bias, mean)
        return mean

    def _masks(self, records: Sequence[EncodedRecord]) -> np.ndarray | None:
        """The tokens that the lagged policy allows, at each token of the records."""
        if self.lagged is None or self.nlpo is None:
            return None
        targets = torch.tensor([t for record in records for y in record.responses for t in y], device=self.device)
        hidden = response_hidden(self.lagged, records, self.path)
        return nucleus_of(causal_lm(self.lagged), hidden, targets, self.nlpo.nlpo_top_p)

    def _reference(self, records: Sequence[EncodedRecord]) -> Tensor:
        """log ρ of the tokens."""
        model = self.models.reference
        policy: Any = self.models.policy
        with policy.disable_adapter() if model is None else contextlib.nullcontext():
            found = response_logprobs(policy if model is None else model, records, self.path).token_logprobs
        assert found is not None
        return found.cpu()

    # -- training

    def _updated(self, rollout: Rollout) -> dict[str, float]:
        """``ppo_epochs`` passes over the rollout; returns means over its tokens and optimiser steps."""
        size, before, tokens = self.config.per_device_train_batch_size, self.steps, 0
        sums = torch.zeros(5, dtype=torch.float64)
        for epoch in range(self.config.ppo_epochs):
            order = list(range(len(rollout.records)))
            random.Random(f"{self.config.seed}/{self.done}/{epoch}").shuffle(order)
            for start in range(0, len(order), size):
                records = [rollout.records[i] for i in order[start : start + size]]
                count = sum(len(response) for record in records for response in record.responses)
                sums[:4] += self._gradient(records, rollout, count)
                sums[4] += self._optimise()
                self.steps, tokens = self.steps + 1, tokens + count
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
        means = dict(zip(names, (sums[:4] / tokens).tolist(), strict=True))
        return {
            **means,
            "grad_norm": float(sums[4]) / (self.steps - before),
            "learning_rate": self.schedule.get_last_lr()[0],
        }

    def _gradient(self, records: list[EncodedRecord], rollout: Rollout, count: int) -> Tensor:
        """The gradient of an optimiser step, in smaller passes where memory runs out; returns sums over its tokens."""

        def backward() -> Tensor:
            parts = [self._backward(part, places, rollout, count) for part, places in self._passes(records)]
            return torch.stack(parts).sum(0)

        return self._within_memory(backward, records)

    def _within_memory(self, work: Callable[[], T], records: list[EncodedRecord]) -> T:
        """``work`` over passes of the records, begun again with smaller ones where memory runs out."""
        while True:
            done, lack = attempt(work)
            if lack is None:
                return done  # type: ignore[return-value]
            self.budget, _ = smaller_forwards(records, self.budget, self.path, lack)
            self.optimiser.zero_grad()

    def _backward(self, records: Sequence[EncodedRecord], places: Tensor, rollout: Rollout, count: int) -> Tensor:
        """Add the gradient of some of an optimiser step's ``count`` tokens; returns sums over them, [4]."""
        config, old, advantage = self.config, rollout.logprobs[places], rollout.advantages[places]
        masks = None if rollout.masks is None else rollout.masks[places.numpy()]
        _, logprobs, values, router = self._forward(records, masks)
        policy, held = surrogate(logprobs, old, advantage, config.clip_range)
        value = value_loss(values, rollout.values[places], rollout.returns[places], config.value_clip_range)
        loss = (policy.sum() + config.value_coefficient * value.sum()) / count
        if router is not None:
            loss = loss + router.cpu() * len(places) / count
        loss.backward()
        with torch.no_grad():
            change = logprobs - old
            approx_kl = torch.exp(change) - 1 - change  # of π_old and π, from samples of π_old; never negative
            return torch.stack([x.double().sum() for x in (policy, value, held, approx_kl)])

    def _optimise(self) -> float:
        """An optimiser step; returns the gradient's norm."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise UserError(
                f"rollout {self.done}: the gradient's norm is {norm}: this step was not made, and the last checkpoint "
                "is whole. Lower --learning_rate, or look at the rewards"
            )
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()
        return norm

    # -- passes

    def _passes(self, records: Sequence[EncodedRecord]) -> Iterator[tuple[Sequence[EncodedRecord], Tensor]]:
        """The records of each forward pass, and where their tokens stand in a rollout's tensors."""
        for forward in plan_forwards(records, self.budget, self.path):
            parts: list[Sequence[EncodedRecord]] = [[part] for part in forward.slices] or [forward.records]
            begin = int(parts[0][0].id)
            for part in parts:
                begins = [begin] if forward.slices else [int(record.id) for record in part]
                sizes = [sum(map(len, record.responses)) for record in part]
                begin += sizes[0]  # where the next slice of the record is
                yield part, torch.cat([torch.arange(a, a + n) for a, n in zip(begins, sizes, strict=True)])

    def _forward(
        self, records: Sequence[EncodedRecord], masks: np.ndarray | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log π, log π under the mask (the same without one), V and the router's loss, with the graph."""
        found = response_logprobs(self.models.policy, records, self.path, keep_logits=True, keep_hidden=True)
        hidden, logprobs = found.hidden, found.token_logprobs
        assert hidden is not None and logprobs is not None
        masked = logprobs
        if masks is not None:
            masked = logprobs - log_mass(causal_lm(self.models.policy), hidden, masks)
        if self.models.value is not None:
            hidden = response_hidden(self.models.value, records, self.path)
        values = self.head(hidden.float())[:, 0]
        return logprobs.cpu(), masked.cpu(), values.cpu(), found.router_loss


def _value_head(width: int) -> nn.Linear:
    """V from hidden states, the same everywhere at first: random values would drown rewards of an unknown size."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _optimiser(parameters: Sequence[nn.Parameter], low_precision: bool, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW; norms and biases are not pulled towards 0. Weights of low precision get fp32 masters."""
    decay, plain = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    options: dict[str, Any] = {"lr": config.learning_rate, "eps": config.adam_epsilon}
    return (
        MasterWeights(groups, torch.optim.AdamW, **options) if low_precision else torch.optim.AdamW(groups, **options)
    )
