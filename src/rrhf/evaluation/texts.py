"""Judge what ρ and π wrote to the same held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rrhf.evaluation.metrics import (
    TURN_MARKERS,
    corpus_perplexity,
    cut_at_turn,
    distinct_n,
    paired_bootstrap,
    ratio_bootstrap,
)
from rrhf.evaluation.phrases import risen_phrases
from rrhf.records.record import Query, Record
from rrhf.rewards.functions import RewardFunction
from rrhf.rewards.kind import RewardContext
from rrhf.rewards.scoring import Rewards, opened

Text = tuple[str, str]  # a generation and its finish, "stop" or "length"
Values = list[float | None]


class Likelihood(NamedTuple):
    """What one fixed model says of texts given their queries.

    ``nll``: −Σ log P over all their ``tokens``, in nats. ``queries_cut``: queries that were cut to fit its context.
    ``of_text``: both numbers of each text, in order, where they are known.
    """

    nll: float
    tokens: int
    queries_cut: int = 0
    of_text: Sequence[tuple[float, int]] = ()


Perplexity = Callable[[Sequence[Record], Sequence[Text]], Likelihood]


@dataclass(frozen=True)
class _Generations:
    """One model's texts, one a record: as written (``whole``), ``cut`` at a new turn, and the rewards of the cut ones.

    ``values``: a reward's name → its value of each text.
    """

    whole: list[Text]
    cut: list[Text]
    values: dict[str, Values]

    @property
    def measured(self) -> list[str]:
        """The cut texts without their finishes."""
        return [text for text, _ in self.cut]


def evaluate_texts(
    records: Sequence[Record],
    rho_texts: Sequence[Text] | None,
    pi_texts: Sequence[Text] | None,
    rewards: Sequence[str | RewardFunction] | Rewards,
    *,
    perplexity: Perplexity,
    perplexity_model: str,
    seed: int,
    cut_markers: Sequence[str] = TURN_MARKERS,
    settings: dict[str, Any] | None = None,
    batch_size: int = 64,
    generations: str = "generations.jsonl",
    context: RewardContext | None = None,
    known: Mapping[str, Mapping[str, Values]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of ``evaluation.json`` and the rows of ``generations.jsonl``.

    In a dialogue (a query of messages, or one whose text holds a marker) a generation is cut where it opens another
    turn, so that a model cannot please the reward by playing both sides. All is measured on the cut text, whose
    finish is then ``length``, since no end token was written there; see ``_model_numbers`` for what is measured.

    Args:
        records: the held-out prompts; their own responses are not looked at.
        rho_texts: ρ's generations, one a record; None to evaluate one model alone.
        pi_texts: π's generations, likewise.
        rewards: names or functions as ``score_records`` takes them, or open ``Rewards``; the first is the main one.
        perplexity: gives the ``Likelihood`` of texts given records.
        perplexity_model: its name, for the file.
        seed: of the bootstrap; also noted in the file.
        cut_markers: where a new turn starts; without any, no text is cut.
        settings: noted in the file.
        batch_size: prompts a call of a reward.
        generations: the name of the generations' file, noted in the file.
        context: what rewards need beside their names, where they are not ``Rewards`` yet.
        known: ``rho`` and ``pi`` → each reward → its values of the cut texts, where these were scored before.

    Raises:
        UserError: a reward cannot be found or fails.
        ValueError: no record, no texts, or not one text a record.
    """
    given = {"rho": rho_texts, "pi": pi_texts}
    texts = {name: list(of_model) for name, of_model in given.items() if of_model is not None}
    if not records or not texts or any(len(of_model) != len(records) for of_model in texts.values()):
        raise ValueError("an evaluation needs records, and one text of each model a record")
    with opened(rewards, batch_size=batch_size, context=context) as judges:
        names = list(judges.scorers)
        models = {n: _generations(records, texts[n], judges, cut_markers, (known or {}).get(n)) for n in texts}
        result: dict[str, Any] = {
            name: _model_numbers(records, model, judges, perplexity, seed) for name, model in models.items()
        }
    by_reward = {reward: _of_reward(reward, models, seed) for reward in names}
    if len(models) == 2:
        result["reward_gain"] = by_reward[names[0]]["gain"]
        result["phrases"] = risen_phrases(models["rho"].measured, models["pi"].measured)
    result |= {
        "rewards": by_reward, "seed": seed, "perplexity_model": perplexity_model, "settings": settings or {},
        "generations": generations,
    }  # fmt: skip
    return result, _rows(records, models)


def _generations(
    records: Sequence[Record],
    texts: list[Text],
    judges: Rewards,
    cut_markers: Sequence[str],
    known: Mapping[str, Values] | None,
) -> _Generations:
    cut = [_cut(record.query, text, cut_markers) for record, text in zip(records, texts)]
    values = _rewards(records, cut, judges, list(judges.scorers)) if known is None else dict(known)
    return _Generations(texts, cut, values)


def _model_numbers(
    records: Sequence[Record],
    model: _Generations,
    judges: Rewards,
    perplexity: Perplexity,
    seed: int,
) -> dict[str, Any]:
    """One model's block in ``evaluation.json``.

    ``reward_mean`` and ``reward_std`` (of the main reward, over prompts, the standard deviation with n in the
    denominator), ``reward_mean_uncut`` (of the texts as written), ``perplexity`` (None where no token was written) with
    its 95 % bootstrap interval over texts, ``perplexity_interval``, and ``perplexity_queries_cut``, ``length_mean``
    (tokens under the perplexity model, the end token of a text that ended included), ``distinct_2`` (of white-space
    tokens), ``n`` prompts and ``n_unscored`` of them to which the reward gave None: they are in no mean, and in the
    gain a prompt counts only where both texts have a score.
    """
    values = model.values[next(iter(judges.scorers))]
    return {
        **_moments(values, "reward_"),
        "reward_mean_uncut": _uncut_mean(records, model, judges),
        **_text_numbers(records, model.cut, perplexity, seed),
        "n": len(records),
        "n_unscored": values.count(None),
    }


def is_dialogue(query: Query, markers: Sequence[str] = TURN_MARKERS) -> bool:
    """Whether a query is a list of messages or a text with turn markers."""
    return not isinstance(query, str) or any(marker in query for marker in markers)


def _cut(query: Query, text: Text, markers: Sequence[str]) -> Text:
    if not is_dialogue(query, markers):
        return text
    kept = cut_at_turn(text[0], markers)
    return text if kept == text[0] else (kept, "length")


def _rewards(
    records: Sequence[Record], texts: Sequence[Text], judges: Rewards, names: Sequence[str]
) -> dict[str, Values]:
    """Each named reward's value of each text."""
    single = (
        Record(query=record.query, responses=[text], finish=[finish], id=record.id, extra=record.extra)
        for record, (text, finish) in zip(records, texts)
    )
    judged = list(judges.judge(single, names))
    return {name: [record.rewards[name][0] for record in judged] for name in names}


def _uncut_mean(records: Sequence[Record], model: _Generations, judges: Rewards) -> float | None:
    """The main reward's mean over the texts as written; only those that were cut are scored again."""
    main = next(iter(judges.scorers))
    values = list(model.values[main])
    changed = [index for index, (whole, cut) in enumerate(zip(model.whole, model.cut)) if whole != cut]
    if changed:
        again = _rewards([records[i] for i in changed], [model.whole[i] for i in changed], judges, [main])
        for index, value in zip(changed, again[main]):
            values[index] = value
    return _moments(values)["mean"]


def _moments(values: Values, prefix: str = "") -> dict[str, float | None]:
    scored = [value for value in values if value is not None]
    return {
        f"{prefix}mean": float(np.mean(scored)) if scored else None,
        f"{prefix}std": float(np.std(scored)) if scored else None,
    }


def _text_numbers(
    records: Sequence[Record], texts: Sequence[Text], perplexity: Perplexity, seed: int
) -> dict[str, Any]:
    # A text without a token, nothing written before the cut, has no likelihood; an empty one that ended has its end.
    some = [index for index, (text, finish) in enumerate(texts) if text or finish == "stop"]
    likelihood = Likelihood(0.0, 0)
    if some:
        likelihood = perplexity([records[i] for i in some], [texts[i] for i in some])
    return {
        "perplexity": corpus_perplexity(likelihood.nll, likelihood.tokens) if likelihood.tokens else None,
        "perplexity_interval": _perplexity_interval(likelihood, seed),
        "perplexity_queries_cut": likelihood.queries_cut,
        "length_mean": likelihood.tokens / len(texts),
        "distinct_2": distinct_n([text.split() for text, _ in texts], 2),
    }


def _perplexity_interval(likelihood: Likelihood, seed: int) -> dict[str, float] | None:
    """exp of the interval of nats a token; None where the texts' own numbers are not known."""
    known = [(nll, tokens) for nll, tokens in likelihood.of_text if tokens]
    if not known:
        return None
    nats = ratio_bootstrap([nll for nll, _ in known], [float(tokens) for _, tokens in known], seed)
    return {name: math.exp(nats[name]) for name in ("low", "high")}


def _gain(rho: Values, pi: Values, seed: int) -> dict[str, float | None]:
    differences = [after - before for before, after in zip(rho, pi) if before is not None and after is not None]
    if not differences:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {**paired_bootstrap(differences, seed), "n": len(differences)}


def _of_reward(reward: str, models: dict[str, _Generations], seed: int) -> dict[str, Any]:
    values = {name: model.values[reward] for name, model in models.items()}
    block: dict[str, Any] = {
        name: {**_moments(of_model), "n_unscored": of_model.count(None)} for name, of_model in values.items()
    }
    if len(values) == 2:
        block["gain"] = _gain(values["rho"], values["pi"], seed)
    return block


def _rows(records: Sequence[Record], models: dict[str, _Generations]) -> list[dict[str, Any]]:
    rows = []
    for index, record in enumerate(records):
        row: dict[str, Any] = {"id": record.id, "query": record.query}
        for name, model in models.items():
            row[name], row[f"{name}_finish"] = model.cut[index]
            row[f"{name}_rewards"] = {reward: values[index] for reward, values in model.values.items()}
            if model.whole[index] != model.cut[index]:
                row[f"{name}_uncut"] = model.whole[index][0]
        rows.append(row)
    return rows
