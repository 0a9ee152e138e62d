"""Judge what ρ and π wrote to the same held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rrhf.evaluation.metrics import TURN_MARKERS, corpus_perplexity, cut_at_turn, distinct_n, paired_bootstrap
from rrhf.records.record import Query, Record
from rrhf.rewards.functions import RewardFunction
from rrhf.rewards.scoring import reward_name, score_records

Text = tuple[str, str]  # a generation and its finish, "stop" or "length"
Values = list[float | None]
# Total negative log-likelihood and number of tokens of the texts given the records' queries, under one fixed model.
Perplexity = Callable[[Sequence[Record], Sequence[Text]], tuple[float, int]]


def evaluate_texts(
    records: Sequence[Record],
    rho_texts: Sequence[Text] | None,
    pi_texts: Sequence[Text] | None,
    rewards: Sequence[str | RewardFunction],
    *,
    perplexity: Perplexity,
    perplexity_model: str,
    seed: int,
    cut_markers: Sequence[str] = TURN_MARKERS,
    settings: dict[str, Any] | None = None,
    batch_size: int = 64,
    generations: str = "generations.jsonl",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of ``evaluation.json`` and the rows of ``generations.jsonl``.

    In a dialogue (a query of messages, or one whose text holds a marker) a generation is cut where it opens another
    turn, so that a model cannot please the reward by playing both sides; the reward of the whole text stands beside
    as ``reward_mean_uncut``. All else is measured on the cut text, whose finish is then ``length``, since no end
    token was written there.

    Of each model: ``reward_mean`` and ``reward_std`` (of the first reward, over prompts, the standard deviation
    with n in the denominator), ``perplexity`` (None where no token was written), ``length_mean`` (tokens under the
    perplexity model, the end token of a text that ended included), ``distinct_2`` (of white-space tokens), ``n``
    prompts and ``n_unscored`` of them to which the reward gave None: they are in no mean, and in the gain a prompt
    counts only where both texts have a score.

    Args:
        records: the held-out prompts; their own responses are not looked at.
        rho_texts: ρ's generations, one a record; None to evaluate one model alone.
        pi_texts: π's generations, likewise.
        rewards: names or functions as ``score_records`` takes them; the first is the main one.
        perplexity: gives (total negative log-likelihood, total tokens) of texts given records.
        perplexity_model: its name, for the file.
        seed: of the bootstrap; also noted in the file.
        cut_markers: where a new turn starts; none to leave every text whole.
        settings: noted in the file.
        batch_size: prompts a call of a reward.
        generations: the name of the generations' file, noted in the file.

    Raises:
        UserError: a reward cannot be found or fails.
        ValueError: no record, no texts, or not one text a record.
    """
    given = {"rho": rho_texts, "pi": pi_texts}
    models = {name: list(texts) for name, texts in given.items() if texts is not None}
    if not records or not models or any(len(texts) != len(records) for texts in models.values()):
        raise ValueError("an evaluation needs records, and one text of each model a record")
    names = [reward_name(reward) for reward in rewards]
    cut = {name: [_cut(r.query, text, cut_markers) for r, text in zip(records, models[name])] for name in models}
    values = {name: _rewards(records, cut[name], rewards, batch_size) for name in models}
    main = names[0]
    result: dict[str, Any] = {}
    for name, whole in models.items():
        result[name] = {
            **_moments(values[name][main], "reward_"),
            "reward_mean_uncut": _uncut_mean(records, whole, cut[name], rewards[0], values[name][main], batch_size),
            **_text_numbers(records, cut[name], perplexity),
            "n": len(records),
            "n_unscored": values[name][main].count(None),
        }
    if len(models) == 2:
        result["reward_gain"] = _gain(values["rho"][main], values["pi"][main], seed)
    result["rewards"] = {reward: _of_reward(reward, values, seed) for reward in names}
    result |= {
        "seed": seed,
        "perplexity_model": perplexity_model,
        "settings": settings or {},
        "generations": generations,
    }
    return result, _rows(records, models, cut, values)


def is_dialogue(query: Query, markers: Sequence[str] = TURN_MARKERS) -> bool:
    """Whether a query is a list of messages or a text with turn markers."""
    return not isinstance(query, str) or any(marker in query for marker in markers)


def _cut(query: Query, text: Text, markers: Sequence[str]) -> Text:
    if not is_dialogue(query, markers):
        return text
    kept = cut_at_turn(text[0], markers)
    return text if kept == text[0] else (kept, "length")


def _rewards(
    records: Sequence[Record], texts: Sequence[Text], rewards: Sequence[str | RewardFunction], batch_size: int
) -> dict[str, Values]:
    """Each reward's value of each text."""
    single = (
        Record(query=record.query, responses=[text], finish=[finish], id=record.id, extra=record.extra)
        for record, (text, finish) in zip(records, texts)
    )
    scored = list(score_records(single, rewards, batch_size=batch_size))
    return {name: [record.rewards[name][0] for record in scored] for name in map(reward_name, rewards)}


def _uncut_mean(
    records: Sequence[Record],
    whole: Sequence[Text],
    cut: Sequence[Text],
    reward: str | RewardFunction,
    values: Values,
    batch_size: int,
) -> float | None:
    changed = [index for index, (first, second) in enumerate(zip(whole, cut)) if first != second]
    if changed:
        again = _rewards([records[i] for i in changed], [whole[i] for i in changed], [reward], batch_size)
        values = list(values)
        for index, value in zip(changed, again[reward_name(reward)]):
            values[index] = value
    return _moments(values)["mean"]


def _moments(values: Values, prefix: str = "") -> dict[str, float | None]:
    scored = [value for value in values if value is not None]
    return {
        f"{prefix}mean": float(np.mean(scored)) if scored else None,
        f"{prefix}std": float(np.std(scored)) if scored else None,
    }


def _text_numbers(records: Sequence[Record], texts: Sequence[Text], perplexity: Perplexity) -> dict[str, float | None]:
    # A text without a token, nothing written before the cut, has no likelihood; an empty one that ended has its end.
    some = [index for index, (text, finish) in enumerate(texts) if text or finish == "stop"]
    nll, tokens = perplexity([records[i] for i in some], [texts[i] for i in some]) if some else (0.0, 0)
    return {
        "perplexity": corpus_perplexity(nll, tokens) if tokens else None,
        "length_mean": tokens / len(texts),
        "distinct_2": distinct_n([text.split() for text, _ in texts], 2),
    }


def _gain(rho: Values, pi: Values, seed: int) -> dict[str, float | None]:
    differences = [after - before for before, after in zip(rho, pi) if before is not None and after is not None]
    if not differences:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {**paired_bootstrap(differences, seed), "n": len(differences)}


def _of_reward(reward: str, values: dict[str, dict[str, Values]], seed: int) -> dict[str, Any]:
    block: dict[str, Any] = {
        name: {**_moments(of_model[reward]), "n_unscored": of_model[reward].count(None)}
        for name, of_model in values.items()
    }
    if len(values) == 2:
        block["gain"] = _gain(values["rho"][reward], values["pi"][reward], seed)
    return block


def _rows(
    records: Sequence[Record],
    models: dict[str, list[Text]],
    cut: dict[str, list[Text]],
    values: dict[str, dict[str, Values]],
) -> list[dict[str, Any]]:
    rows = []
    for index, record in enumerate(records):
        row: dict[str, Any] = {"id": record.id, "query": record.query}
        for name in models:
            row[name], row[f"{name}_finish"] = cut[name][index]
            row[f"{name}_rewards"] = {reward: scores[index] for reward, scores in values[name].items()}
            if models[name][index] != cut[name][index]:
                row[f"{name}_uncut"] = models[name][index][0]
        rows.append(row)
    return rows
