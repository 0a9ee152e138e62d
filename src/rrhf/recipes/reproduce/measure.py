"""What an arm's result holds beside its evaluation: KL to ρ, tokens, time by stage, memory, where it was made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from rrhf.common.files import json_lines, read_object
from rrhf.evaluation.generations import draw_to_file
from rrhf.evaluation.metrics import distinct_n, paired_bootstrap
from rrhf.evaluation.perplexity import nll_under
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings, tokenizer_and_config
from rrhf.models.locate import locate
from rrhf.models.tokenization import TextSettings
from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.records.sources import source_names
from rrhf.rewards.kl import log_ratios
from rrhf.sampling.settings import SamplingSettings

RESET_PEAK = "5"  # in /proc/self/clear_refs: see proc(5)


def kl_to_reference(
    texts: Path, pi: ModelSettings, rho: ModelSettings, text: TextSettings, seed: int, samples: int,
    policies: PolicyCache,
) -> dict[str, float | int]:  # fmt: skip
    """KL(π ‖ ρ) in nats a response: the mean of Σ_t log π − log ρ over responses that π drew, with its interval.

    Args:
        texts: records with one response each, drawn from the whole of π at temperature 1.
        pi, rho: the models.
        text: how they read queries.
        seed: of the bootstrap over prompts.
        samples: records in a row that share a prompt.
        policies: where the models are, and what they have said before.
    """
    records = list(read_records(texts))
    given = [(record.responses[0], record.finish[0]) for record in records]
    sums: list[list[float | None]] = []
    for model, said in ((pi, None), (rho, policies.said(rho.model))):
        under = nll_under(*policies.get(model), text, said=said, what="log-probabilities")
        of_text = under([record.without_responses() for record in records], given).of_text
        sums.append([-nll if tokens else None for nll, tokens in of_text])
    ratios = log_ratios(*sums)
    known = [ratio for ratio in by_prompt(ratios, samples) if ratio is not None]
    return {**paired_bootstrap(known, seed), "n": len(known)}


def by_prompt(values: Sequence[float | None], samples: int) -> list[float | None]:
    """The mean of every ``samples`` values in a row, which are of one prompt; None where none of them is known."""
    means: list[float | None] = []
    for start in range(0, len(values), samples):
        known = [value for value in values[start : start + samples] if value is not None]
        means.append(fmean(known) if known else None)
    return means


def drawn_from_all(sampling: SamplingSettings) -> bool:
    """Whether texts sampled so come from the whole of π as it is, so that KL can be estimated on them."""
    whole = sampling.policy == "top-p" and sampling.top_p in (None, 1.0) and sampling.top_k is None
    return whole and sampling.temperature == 1.0 and not sampling.stop


def texts_for_kl(
    evaluated: Path, place: Path, prompts: Sequence[Record], pi: ModelSettings, sampling: SamplingSettings,
    text: TextSettings, policies: PolicyCache,
) -> Path:  # fmt: skip
    """The file of π's texts on which KL is estimated: those that were ``evaluated`` or, at ``place``, others."""
    if drawn_from_all(sampling):
        return evaluated
    draw_to_file(place, prompts, pi, from_all(sampling), text, "pi", policies=policies)
    return place


def from_all(sampling: SamplingSettings) -> SamplingSettings:
    """One response a prompt from the whole of π, otherwise as ``sampling`` has it."""
    return SamplingSettings(
        policy="top-p", top_p=1.0, num_responses=1, max_new_tokens=sampling.max_new_tokens,
        batch_size=sampling.batch_size, seed=sampling.seed,
    )  # fmt: skip


def token_counter(model: ModelSettings) -> Any:
    """The number of tokens of texts, under a model's tokenizer."""
    tokenizer, _ = tokenizer_and_config(locate(model.model), model.model)

    def count(texts: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(texts), add_special_tokens=False).input_ids)) if texts else 0

    return count


def sources_of(file: Path) -> set[str]:
    """The sources of a file's responses."""
    return {name for record in read_records(file) for tag in record.sources for name in source_names(tag)}


def response_tokens(file: Path, count: Any, brought: Collection[str]) -> dict[str, int]:
    """Responses and their tokens in a file of records; ``sampled`` are those of other sources than the data's."""
    total = {"responses": 0, "tokens": 0, "sampled": 0, "sampled_tokens": 0}
    for record in read_records(file):
        pairs = zip(record.responses, record.sources)
        ours = [text for text, tag in pairs if not any(name in brought for name in source_names(tag))]
        total["responses"] += len(record.responses)
        total["tokens"] += count(record.responses)
        total["sampled"] += len(ours)
        total["sampled_tokens"] += count(ours)
    return total


def queries_digest(file: Path, samples: int) -> str:
    """Of the queries of a file in their order, which differences are paired by; each is there ``samples`` times."""
    queries = [record.query for record in islice(read_records(file), None, None, samples)]
    return hashlib.sha256(json.dumps(queries).encode()).hexdigest()[:16]


def reset_peak_memory() -> None:
    """Let the highest memory of this process count from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def peak_memory(device: str) -> int:
    """The most bytes held since ``reset_peak_memory``: allocated on a GPU, resident on a CPU."""
    from rrhf.recipes.baselines import ppo

    if not device.startswith("cuda"):
        with contextlib.suppress(OSError, StopIteration):
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return ppo.peak_memory(device)


def load() -> float | None:
    """Processes that wanted to run in the last minute, a processor."""
    try:
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    except OSError:
        return None


def seconds(timings: Path) -> dict[str, float]:
    return {name: float(value) for name, value in read_object(timings).items()}


def evaluation_numbers(evaluation: Mapping[str, Any], generations: Path, samples: int = 1) -> dict[str, Any]:
    """What a row shows of an ``evaluation.json``: its first reward is the proxy, its second the gold one.

    Args:
        evaluation: the file's content.
        generations: its texts.
        samples: how many of them in a row are of one prompt. Intervals are over prompts, deviations over texts.
    """
    pi = evaluation["pi"]
    numbers = {name: pi[name] for name in ("perplexity", "length_mean", "distinct_2")}
    numbers |= {"n": pi["n"] // samples, "held_out_samples": samples}
    if "phrases" in evaluation:  # one of before they were counted says nothing of them
        numbers["phrases"] = evaluation["phrases"]
    before, after = (prompt_rewards(generations, model, samples) for model in ("rho", "pi"))
    for name, reward in zip(REWARDS, evaluation["rewards"].values()):
        pairs = zip(before[name], after[name], strict=True)
        gains = [value - start for start, value in pairs if start is not None and value is not None]
        gain = {**paired_bootstrap(gains, evaluation["seed"]), "n": len(gains)} if gains else reward["gain"]
        means = {"start": reward["rho"]["mean"], "mean": reward["pi"]["mean"], "gain": gain}
        numbers[name] = means | {"start_std": reward["rho"]["std"], "std": reward["pi"]["std"]}
    return numbers


def prompt_rewards(generations: Path, model: str = "pi", samples: int = 1) -> dict[str, list[float | None]]:
    """Of each reward the mean over a model's texts to each held-out prompt, in the prompts' order."""
    rows = json_lines(generations)
    values = [list(row[f"{model}_rewards"].values()) for row in rows]
    return {name: by_prompt(of_reward, samples) for name, of_reward in zip(REWARDS, zip(*values))}


def rounded(rewards: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """As they are kept."""
    return {name: [None if one is None else round(one, 4) for one in values] for name, values in rewards.items()}


def looping(generations: Path) -> float:
    """The share of π's texts in which fewer than half of the pairs of neighbouring words are different ones."""
    texts = [row["pi"].split() for row in json_lines(generations)]
    return sum(distinct_n([words], 2) < 0.5 for words in texts if len(words) > 1) / len(texts)


def training_scores(file: Path) -> dict[str, float | None]:
    """Of the responses trained on: the mean over queries of the mean score and of the highest."""
    scores = [[score for score in record.scores or [] if score is not None] for record in read_records(file)]
    known = [each for each in scores if each]
    if not known:
        return {"mean": None, "max": None}
    return {"mean": fmean(fmean(each) for each in known), "max": fmean(max(each) for each in known)}


def training_history(model: Path) -> list[dict[str, float]]:
    """Losses, how often pairs were in order, and, where the policy was watched, its rewards, by optimiser step."""
    state = read_object(model / "trainer_state.json")
    kept = ("step", "loss", "rank_loss", "sft_loss", "rank_accuracy", "eval_reward_mean", "eval_distinct_2")
    lines = []
    for line in state.get("log_history", []):
        named = {key: value for key, value in line.items() if key in kept or key.startswith("eval_reward_mean_")}
        if len(named) > 1:
            lines.append(named)
    return lines


def ppo_history(model: Path) -> list[dict[str, Any]]:
    """A line a rollout of a training by PPO."""
    history: list[dict[str, Any]] = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))[
        "log_history"
    ]
    return history
