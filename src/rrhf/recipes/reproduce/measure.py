"""What an arm's result holds beside its evaluation: KL to ρ, tokens, time by stage, memory, where it was made."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rrhf.common.files import read_object
from rrhf.evaluation.generations import draw_to_file
from rrhf.evaluation.metrics import paired_bootstrap
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.rewards.kl import log_ratios
from rrhf.rewards.logprob import reference_sums_name, with_logprob_sums
from rrhf.sampling.settings import SamplingSettings

RESET_PEAK = "5"  # in /proc/self/clear_refs: see proc(5)


def kl_to_reference(
    texts: Path, pi: ModelSettings, rho: ModelSettings, text: TextSettings, seed: int
) -> dict[str, float | int]:
    """KL(π ‖ ρ) in nats a response: the mean of Σ_t log π − log ρ over responses that π drew, with its interval.

    Args:
        texts: records with one response each, drawn from the whole of π at temperature 1.
        pi, rho: the models.
        text: how they read queries.
        seed: of the bootstrap over prompts.
    """
    records: Iterable[Record] = read_records(texts)
    for model in (pi, rho):
        records = list(with_logprob_sums(records, model, text=text))
    names = [reference_sums_name(model.model, text, None) for model in (pi, rho)]
    ratios = [
        ratio for record in records for ratio in log_ratios(*(record.rewards.get(name, [None]) for name in names))
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    return {**paired_bootstrap(known, seed), "n": len(known)}


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
    from transformers import AutoTokenizer

    from rrhf.models.locate import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(model.model).source)

    def count(texts: Sequence[str]) -> int:
        return sum(map(len, tokenizer(list(texts), add_special_tokens=False).input_ids)) if texts else 0

    return count


def response_tokens(file: Path, count: Any) -> dict[str, int]:
    """Responses and their tokens in a file of records; ``sampled`` are those that the data did not bring."""
    total = {"responses": 0, "tokens": 0, "sampled": 0, "sampled_tokens": 0}
    for record in read_records(file):
        tags = record.sources or ["?"] * len(record.responses)
        ours = [text for text, tag in zip(record.responses, tags) if not tag.startswith("human/")]
        total["responses"] += len(record.responses)
        total["tokens"] += count(record.responses)
        total["sampled"] += len(ours)
        total["sampled_tokens"] += count(ours)
    return total


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


def commit() -> str:
    """What ``git describe`` says of this code; the package's version where it stands in no repository."""
    from rrhf import __version__

    here = Path(__file__).parent
    try:
        told = subprocess.run(  # nosec B607 # git, as the user has it
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return told.stdout.strip() or __version__


def load() -> float | None:
    """Processes that wanted to run in the last minute, a processor."""
    try:
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    except OSError:
        return None


def seconds(timings: Path) -> dict[str, float]:
    return {name: float(value) for name, value in read_object(timings).items()}


def evaluation_numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What a row shows of an ``evaluation.json``: its first reward is the proxy, its second the gold one."""
    numbers: dict[str, Any] = {}
    for name, reward in zip(("proxy", "gold"), evaluation["rewards"].values()):
        numbers[name] = {"start": reward["rho"]["mean"], "mean": reward["pi"]["mean"], "gain": reward["gain"]}
    pi = evaluation["pi"]
    return {**numbers, **{name: pi[name] for name in ("perplexity", "length_mean", "distinct_2", "n")}}


def ppo_history(model: Path) -> list[dict[str, Any]]:
    """A line a rollout of a training by PPO."""
    history: list[dict[str, Any]] = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))[
        "log_history"
    ]
    return history
