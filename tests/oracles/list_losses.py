"""Ranking losses beyond those of p alone, as naive loops over plain Python floats, written from their papers' formulas.

Each is f(record, settings): lists of numbers, and the settings by name. Nothing here is shared with ``rrhf.losses``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from oracles.losses import Scores, best, listmle, logistic, logprobs, pairs


@dataclass
class Plain:
    """A record in plain numbers; the lists have an entry a response, those of tokens one a token."""

    sums: list[float]
    lengths: list[int]
    scores: Scores
    reference: list[float] = field(default_factory=list)
    kl: float = 0.0
    tokens: list[list[float]] = field(default_factory=list)
    old: list[list[float]] = field(default_factory=list)
    reference_tokens: list[list[float]] = field(default_factory=list)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def p_of(record: Plain, settings: dict[str, Any]) -> list[float]:
    return logprobs(record.sums, record.lengths, settings["length_exponent"])


def ratios(record: Plain) -> list[float]:
    return [own - other for own, other in zip(record.sums, record.reference, strict=True)]


def simpo(record: Plain, settings: dict[str, Any]) -> float:
    return logistic(p_of(record, settings), record.scores, settings["margin"], settings["logprob_scale"])


def cpo(record: Plain, settings: dict[str, Any]) -> float:
    return sum(softplus(settings["dpo_beta"] * (record.sums[i] - record.sums[j])) for i, j in pairs(record.scores))


def orpo(record: Plain, settings: dict[str, Any]) -> float:
    p = [min(value, -1e-6) for value in p_of(record, settings)]
    odds = [value - math.log(-math.expm1(value)) for value in p]
    return sum(softplus(odds[i] - odds[j]) for i, j in pairs(record.scores))


def dpo(record: Plain, settings: dict[str, Any]) -> float:
    h, total = ratios(record), 0.0
    for i, j in pairs(record.scores):
        if settings["dpo_pairs"] == "all" or j == best(record.scores):
            total += softplus(settings["dpo_beta"] * (h[i] - h[j]))
    return total


def ipo(record: Plain, settings: dict[str, Any]) -> float:
    h, total = logprobs(ratios(record), record.lengths, settings["length_exponent"]), 0.0
    for i, j in pairs(record.scores):
        if settings["dpo_pairs"] == "all" or j == best(record.scores):
            total += (h[j] - h[i] - 0.5 / settings["dpo_beta"]) ** 2
    return total


def mean_score(scores: Scores) -> float:
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if known else 0.0


def side(score: float | None, scores: Scores) -> int:
    """1 above the mean of the scores, −1 below it, 0 at it."""
    mean = mean_score(scores)
    largest = max((abs(other) for other in scores if other is not None), default=0.0)
    if score is None or abs(score - mean) <= 1e-9 * largest:
        return 0
    return 1 if score > mean else -1


def kto(record: Plain, settings: dict[str, Any]) -> float:
    losses = []
    for h, score in zip(ratios(record), record.scores, strict=True):
        z = settings["dpo_beta"] * (h - record.kl)
        if side(score, record.scores) > 0:
            losses.append(1 - sigmoid(z))
        elif side(score, record.scores) < 0:
            losses.append(1 - sigmoid(-z))
    return sum(losses) / len(losses) if losses else 0.0


def dpo_listmle(record: Plain, settings: dict[str, Any]) -> float:
    return listmle(ratios(record), record.scores, scale=settings["dpo_beta"])


def gains(scores: Scores, scale: float) -> dict[int, float]:
    """2^ψ − 1 of each scored response, ψ the mean of σ(scale·(r_i − r_j)) over the others."""
    known = [i for i, score in enumerate(scores) if score is not None]
    found = {}
    for i in known:
        beats = [sigmoid(scale * (scores[i] - scores[j])) for j in known if j != i]  # type: ignore[operator]
        found[i] = 2 ** (sum(beats) / max(len(beats), 1)) - 1
    return found


def lipo_lambda(record: Plain, settings: dict[str, Any]) -> float:
    s, gain, total = (
        [settings["dpo_beta"] * h for h in ratios(record)],
        gains(record.scores, settings["score_scale"]),
        0.0,
    )
    place = {i: n for n, i in enumerate(sorted(gain, key=lambda i: -s[i]), 1)}
    for i, j in pairs(record.scores):
        swap = abs(gain[i] - gain[j]) * abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
        total += swap * softplus(s[i] - s[j])
    return total


def swepo(record: Plain, settings: dict[str, Any]) -> float:
    mean, weighted = mean_score(record.scores), {}
    for i, (h, score) in enumerate(zip(ratios(record), record.scores, strict=True)):
        if score is not None:
            weighted[i] = settings["dpo_beta"] * h + settings["score_scale"] * abs(score - mean)
    above = [i for i in weighted if side(record.scores[i], record.scores) > 0]
    if not above:
        return 0.0
    return log_sum_exp(list(weighted.values())) - log_sum_exp([weighted[i] for i in above])


def log_sum_exp(values: list[float]) -> float:
    return max(values) + math.log(math.fsum(math.exp(value - max(values)) for value in values))


def ndcg(record: Plain, settings: dict[str, Any]) -> float:
    """Bubble the soft gains through the network, a swap of two neighbours at a time."""
    gain = gains(record.scores, settings["score_scale"])
    if len(gain) < 2:
        return 0.0
    values = [settings["logprob_scale"] * p_of(record, settings)[i] for i in gain]
    soft = list(gain.values())
    for layer in range(len(values)):
        for a in range(layer % 2, len(values) - 1, 2):
            stay = 0.5 + math.atan(values[a] - values[a + 1]) / math.pi
            for row in (values, soft):
                upper, lower = row[a], row[a + 1]
                row[a], row[a + 1] = stay * upper + (1 - stay) * lower, (1 - stay) * upper + stay * lower
    dcg = sum(value / math.log2(2 + place) for place, value in enumerate(soft))
    ideal = sum(value / math.log2(2 + place) for place, value in enumerate(sorted(gain.values(), reverse=True)))
    return 1 - dcg / ideal


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def lire(record: Plain, settings: dict[str, Any]) -> float:
    known = [i for i, score in enumerate(record.scores) if score is not None]
    if not known:
        return 0.0
    chances = softmax([settings["logprob_scale"] * p_of(record, settings)[i] for i in known])
    rewards = softmax([settings["score_scale"] * float(record.scores[i] or 0.0) for i in known])
    return -sum(chance * (reward - 1 / len(known)) for chance, reward in zip(chances, rewards, strict=True))


def surrogate(ratio: float, advantage: float, clip: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def k3(own: float, reference: float) -> float:
    return math.exp(reference - own) - (reference - own) - 1


def grpo(record: Plain, settings: dict[str, Any]) -> float:
    known = [i for i, score in enumerate(record.scores) if score is not None]
    if not known:
        return 0.0
    scores = [float(record.scores[i] or 0.0) for i in known]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / max(len(scores) - 1, 1))
    total = 0.0
    for i, score in zip(known, scores, strict=True):
        advantage = (score - mean) / (std + 1e-4) if len(known) > 1 else 0.0
        losses = []
        for t, own in enumerate(record.tokens[i]):
            loss = -surrogate(math.exp(own - record.old[i][t]), advantage, settings["clip_range"])
            if settings["token_kl"]:
                loss += settings["token_kl"] * k3(own, record.reference_tokens[i][t])
            losses.append(loss)
        total += sum(losses) / max(len(losses), 1)
    return total / len(known)


def rloo(record: Plain, settings: dict[str, Any]) -> float:
    known = [i for i, score in enumerate(record.scores) if score is not None]
    if not known:
        return 0.0
    total = 0.0
    for i in known:
        others = [float(record.scores[j] or 0.0) for j in known if j != i]
        advantage = float(record.scores[i] or 0.0) - sum(others) / len(others) if others else 0.0
        ratio = math.exp(sum(record.tokens[i]) - sum(record.old[i]))
        total -= surrogate(ratio, advantage, settings["clip_range"])
        if settings["token_kl"]:
            pairs_of_tokens = zip(record.tokens[i], record.reference_tokens[i], strict=True)
            total += settings["token_kl"] * sum(k3(own, reference) for own, reference in pairs_of_tokens)
    return total / len(known)


LOSSES = {
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "ndcg": ndcg,
    "lire": lire,
    "dpo": dpo,
    "ipo": ipo,
    "kto": kto,
    "dpo-listmle": dpo_listmle,
    "lambda": lipo_lambda,
    "swepo": swepo,
    "grpo": grpo,
    "rloo": rloo,
}
