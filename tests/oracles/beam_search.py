"""Diverse beam search, one query at a time, in lists and dicts: what the fast decoder is compared with.

Written from Vijayakumar et al. 2018 (arXiv 1610.02424, Algorithm 1 with Hamming diversity): groups advance in order
and are beam searches of their own; a group's scores at a step are lowered by the diversity penalty times how often
earlier groups chose that token at this step. Within a group, which beams finish, when, and which finished ones are
kept follows transformers 5 (``GenerationMixin._beam_search``). Every step runs the model over the whole row, without
a cache. With one group it is plain beam search.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Tokens = tuple[int, ...]
LogProbs = Callable[[Tokens], torch.Tensor]


@dataclass
class Group:
    """One group's beams: (tokens, sum of log-probabilities), and its finished ones: (tokens, normalised score)."""

    running: list[tuple[Tokens, float]] = field(default_factory=lambda: [((), 0.0)])
    finished: list[tuple[Tokens, float]] = field(default_factory=list)
    done: bool = False


@dataclass
class Outcome:
    """Per group the kept sequences, best first, as (tokens, score), and the narrowest decision on the way."""

    groups: list[list[tuple[Tokens, float]]]
    closest: float

    def ranked(self) -> list[Tokens]:
        """All groups' sequences, best score first; of equals the earlier group's."""
        return [tokens for tokens, _ in sorted(itertools.chain(*self.groups), key=lambda kept: -kept[1])]


def model_logprobs(model: torch.nn.Module, query: Sequence[int], temperature: float = 1.0) -> LogProbs:
    """Return the function from a response's first tokens to the log-probabilities [V] of the next one."""

    @functools.cache
    def next_logprobs(tokens: Tokens) -> torch.Tensor:
        row = torch.tensor([[*query, *tokens]])
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[0, -1]
        return torch.log_softmax(logits / temperature, dim=-1).double()

    return next_logprobs


def diverse_beam_search(
    next_logprobs: LogProbs,
    *,
    num_beams: int,
    num_groups: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    diversity_penalty: float = 0.0,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Outcome:
    """Search until every group is done. A kept sequence carries its end token, where it has one."""
    size = num_beams // num_groups
    groups = [Group() for _ in range(num_groups)]
    gaps: list[float] = []
    for length in range(1, max_new_tokens + 1):
        chosen: Counter[int] = Counter()
        for group in groups:
            if group.done:
                continue  # what is done chooses nothing
            penalties = {token: diversity_penalty * count for token, count in chosen.items()}
            chosen.update(
                advance(
                    group,
                    next_logprobs,
                    penalties,
                    size,
                    set(end_ids),
                    length,
                    max_new_tokens,
                    length_penalty,
                    early_stopping,
                    gaps,
                )
            )
        if all(group.done for group in groups):
            break
    return Outcome([group.finished for group in groups], min(gaps, default=float("inf")))


def advance(
    group: Group,
    next_logprobs: LogProbs,
    penalties: dict[int, float],
    size: int,
    end_ids: set[int],
    length: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool,
    gaps: list[float],
) -> list[int]:
    """Take one step with one group; return the tokens its beams went on with."""
    candidates: list[tuple[Tokens, float]] = []
    for tokens, total in group.running:
        scores = next_logprobs(tokens).clone()
        for token, penalty in penalties.items():
            scores[token] -= penalty
        # No beam can give more than this many of the candidates that count; one more shows the gap below them.
        many = min(len(scores), max(2, 1 + len(end_ids)) * size + 1)
        best = torch.topk(scores, many)
        candidates += [((*tokens, t), total + s) for s, t in zip(best.values.tolist(), best.indices.tolist())]
    candidates.sort(key=lambda candidate: -candidate[1])
    candidates = candidates[: max(2, 1 + len(end_ids)) * size + 1]
    ends = [tokens[-1] in end_ids for tokens, _ in candidates]
    last = length == max_new_tokens

    going_on = [candidate for candidate, end in zip(candidates, ends) if not end]
    gaps.append(_gap(going_on, size))
    # Only the best `size` of all candidates may finish; the others are there so that enough can go on.
    finishing = [c for c, end in zip(candidates[:size], ends[:size]) if end or last]
    if last or any(ends[: size + 1]):
        gaps.append(_gap(candidates, size))
    group.finished += [(tokens, total / length**length_penalty) for tokens, total in finishing]
    group.finished.sort(key=lambda kept: -kept[1])
    gaps += [_gap(group.finished, rank) for rank in range(1, size + 1)]
    group.finished = group.finished[:size]
    group.running = going_on[:size]

    full = len(group.finished) == size
    hope = group.running[0][1] / length**length_penalty  # the best running beam, were it to end here
    if full and not last:
        gaps.append(abs(hope - group.finished[-1][1]))
    group.done = last or (full and (early_stopping or hope <= group.finished[-1][1]))
    return [tokens[-1] for tokens, _ in group.running]


def _gap(ranked: list[tuple[Tokens, float]], rank: int) -> float:
    """How much better the last of the first ``rank`` is than the next one."""
    return ranked[rank - 1][1] - ranked[rank][1] if len(ranked) > rank else float("inf")
