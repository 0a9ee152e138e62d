"""What a run will come to before it is begun: tokens, bytes, requests and hours of each stage. Nothing is written.

The records are counted, and of the first ``SAMPLED`` the texts are tokenised. Responses that are still to be sampled
count as long as they may get, so tokens, bytes and hours of them are at most those shown. Hours are those of one
machine as this one, measured for a few seconds with the run's own model (``rrhf.recipes.speed``); where that model is
too large to be measured here, they are by operations at a rate that was measured elsewhere, which is named.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.presentation import text_table
from rrhf.models.devices import free_memory, resolve_device, resolve_dtype
from rrhf.models.load import tokenizer_and_config
from rrhf.models.locate import locate
from rrhf.models.tokenization import TextFormat
from rrhf.recipes.config import RunConfig
from rrhf.recipes.data import training_records
from rrhf.recipes.speed import EVALUATED_SHARE, Shape, Speed, measure_machine
from rrhf.records.record import record_line
from rrhf.rewards.scoring import may_hold_a_model
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.parsing import parse_source

SAMPLED = 256  # records whose texts are tokenised
# Seconds of the processor that reading, checking and writing take a record and stage: benchmarks/growth.py.
RECORD_SECONDS = 70e-6
SCORE_BYTES = 20  # a score in a line of JSON, and as many for each reward
# Useful operations a second of passes that train and of decoding, where a model cannot be measured here:
# docs/benchmarks.md, SmolLM2-135M in bfloat16.
ELSEWHERE = "AMD EPYC, family 26, AVX-512 BF16, 2 cores"
TRAINED_RATE, SAMPLED_RATE = 4.4e11, 1.2e11
MASTERS = 12  # bytes a parameter that a checkpoint has beside the weights: fp32 masters and two moments


@dataclass(frozen=True)
class Texts:
    """What was counted: records, and their mean tokens and bytes.

    ``provided``: responses a record brings; ``line``: bytes of a record's line; ``token``: bytes of a token's text.
    """

    records: int
    query: float
    provided: float
    response: float
    line: float
    token: float


@dataclass(frozen=True)
class Stage:
    """What a stage comes to. ``note``: whose time is not among the hours, since nobody knows it."""

    name: str
    records: int
    tokens: float = 0
    size: float = 0
    requests: int = 0
    hours: float = 0.0
    note: str = ""


LEAST = 0.001  # hours that are still shown as a number


@dataclass(frozen=True)
class Estimate:
    """The stages, and what their numbers rest on."""

    stages: list[Stage]
    rests_on: list[str]

    def table(self) -> str:
        """The stages as a table, with what they rest on below it."""
        everything = Stage(
            "all", max(stage.records for stage in self.stages), *(sum(getattr(stage, name) for stage in self.stages)
            for name in ("tokens", "size", "requests", "hours")),
        )  # fmt: skip
        rows = [
            [
                s.name,
                *(f"{round(x):,}" for x in (s.records, s.tokens, s.size, s.requests)),
                f"{s.hours:.3g}" if s.hours >= LEAST or not s.hours else f"< {LEAST}",
                s.note,
            ]
            for s in [*self.stages, everything]
        ]
        header = ["stage", "records", "tokens", "bytes", "requests", "machine hours", "beside that"]
        return "\n".join([text_table(header, rows), "", *self.rests_on])


def estimate_run(config: RunConfig) -> Estimate:
    """Estimate the run of a configuration.

    Raises:
        UserError: the data or the model cannot be read.
    """
    tokenizer, described = tokenizer_and_config(locate(config.model.model), config.model.model)
    texts = _count(config, TextFormat(tokenizer, config.text))
    parameters = count_parameters(described)
    drawn, local, requests = _drawn(config)
    most = min(config.sample.max_new_tokens if config.sample else 0, config.train.max_length)
    kept = texts.provided + drawn
    mean = (texts.provided * texts.response + drawn * most) / max(kept, 1)
    shape = Shape(max(round(texts.query), 1), max(round(mean), 1), max(round(kept), 1))
    sampling = config.sample or config.evaluate_sampling
    speed, rate = _speed(config, parameters, shape, replace(sampling, max_new_tokens=max(most, 1)), drawn)
    stages = _stages(config, texts, parameters, speed, shape.response, drawn, local, requests, most)
    counted = (
        f"counted: {texts.records:,} records with {texts.provided:.3g} responses; of the first {SAMPLED} the mean: "
        f"queries {texts.query:.1f} tokens, responses {texts.response:.1f}; {texts.token:.2f} bytes a token"
    )
    limits = (
        f"sampled responses count {most} tokens each (max_new_tokens, max_length): what they come to is at most this"
    )
    return Estimate(stages, [counted, limits, rate])


def count_parameters(config: Any) -> int:
    """Parameters of the model of a configuration, of which nothing is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _count(config: RunConfig, format: TextFormat) -> Texts:
    records = training_records(config.data)
    sample = list(islice(records, SAMPLED))
    if not sample:
        raise UserError(f"data: {config.data.source} has no records, so there is nothing to run: look at data.source")
    count = len(sample) + sum(1 for _ in records)
    encoded = [format.encode_record(record, config.train.max_length) for record in sample]
    responses = [len(ids) for record in encoded for ids in record.responses]
    texts = [str(record.query) + "".join(record.responses) for record in sample]
    tokens = sum(len(record.query) for record in encoded) + sum(responses)
    return Texts(
        count,
        fmean(len(record.query) for record in encoded),
        fmean(len(record.responses) for record in encoded),
        fmean(responses) if responses else 0.0,
        fmean(len(record_line(record).encode()) + 1 for record in sample),
        sum(len(text.encode()) for text in texts) / max(tokens, 1),
    )


def _drawn(config: RunConfig) -> tuple[int, int, int]:
    """Responses a query that are sampled, those of them by local models, and requests a query to servers at most."""
    if config.sample is None:
        return 0, 0, 0
    if not config.sources.source:
        return config.sample.responses, config.sample.responses, 0
    specs = [parse_source(written) for written in config.sources.source]
    asked = sum(spec.count for spec in specs if spec.kind == "endpoint")
    drawn = sum(spec.count for spec in specs if spec.kind != "file")
    return drawn, drawn - asked, asked


def _speed(
    config: RunConfig, parameters: int, shape: Shape, sampling: SamplingSettings, drawn: int
) -> tuple[Speed, str]:
    """Seconds of the work, of which ``drawn`` responses a query are sampled, and in words what they rest on."""
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device, training=True)
    shaped = f"queries of {shape.query} tokens, {shape.responses} responses of {shape.response}"
    free = free_memory(device)
    if free is None or parameters * (dtype.itemsize + 4 + MASTERS) < free:
        speed = measure_machine(config.model, shape, sampling)
        return speed, (
            f"measured now on {processor()}, at a load of {os.getloadavg()[0]:.1f}: {config.model.model}, "
            f"{str(dtype).removeprefix('torch.')}, {shaped}: "
            f"{speed.sampled:.3g} s a query sampled, {speed.trained:.3g} s a record trained, "
            f"{speed.optimised:.3g} s an optimiser step"
        )
    decoded, read = max(drawn, 1) * shape.response, shape.query + shape.responses * shape.response
    speed = Speed(
        2 * parameters * (shape.query + decoded) / SAMPLED_RATE,
        6 * parameters * read / TRAINED_RATE,
        0.0,
    )
    return speed, (
        f"not measured here: {parameters:,} parameters do not fit this machine's memory. Hours are those of one "
        f"{ELSEWHERE}, by operations: 2 a parameter and token sampled at {SAMPLED_RATE:.2g}/s, 6 a token trained at "
        f"{TRAINED_RATE:.2g}/s ({shaped}); on another machine they scale with its rate (docs/scaling.md)"
    )


def processor() -> str:
    """The name of this machine's processor or GPU, and the threads that are used."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def _stages(
    config: RunConfig,
    texts: Texts,
    parameters: int,
    speed: Speed,
    response: int,
    drawn: int,
    local: int,
    asked: int,
    most: int,
) -> list[Stage]:
    """Every stage of the run; rounds (IP-n) count as often as they are. ``response``: tokens that ``speed`` is of."""
    rounds, n, train = config.rounds.iterations, texts.records, config.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * train.world_size
    steps = train.max_steps if train.max_steps > 0 else round(train.num_train_epochs * -(-n // batch))
    seen = min(steps * batch, round(n * train.num_train_epochs)) if train.max_steps <= 0 else steps * batch
    online = bool(train.resample_steps)
    sampled = seen if online else n  # OP-k samples what it trains on
    kept = texts.provided + drawn
    tokens = texts.query + texts.provided * texts.response + drawn * most
    line = texts.line + drawn * (most * texts.token + 40)
    files = RECORD_SECONDS / 3600
    # Sampled responses are as long as they may get; ``speed`` is of the mean of all that are trained on.
    own = speed.sampled * most / response / 3600 * (local / drawn if drawn else 0.0)
    weights = parameters * resolve_dtype(config.model.dtype, resolve_device(config.model.device)).itemsize
    scored = _scored(config, sampled * rounds, kept, tokens, line, speed)
    stages = [
        Stage("data", n, size=n * texts.line, hours=n * files),
        Stage("sample", sampled * rounds, sampled * rounds * (texts.query + local * most), sampled * rounds * line,
              sampled * rounds * asked, sampled * rounds * (files + own), "a server's time" if asked else ""),
        scored,
        Stage("train", seen * rounds, seen * rounds * tokens, rounds * (weights + parameters * MASTERS),
              hours=rounds * (seen * speed.trained + steps * speed.optimised) / 3600,
              note=f"{steps * rounds:,} steps"),
    ]  # fmt: skip
    held_out = config.data.held_out_limit
    judges = sum(name.startswith("judge:") for name in config.evaluate_rewards.reward)
    new = config.evaluate_sampling.max_new_tokens
    evaluated = 2 * held_out * EVALUATED_SHARE * speed.sampled * new / response / 3600
    stages.append(
        Stage("evaluate", 2 * held_out, 2 * held_out * (texts.query + 2 * new), 2 * held_out * (texts.line + new * 4),
              2 * held_out * judges, evaluated, _unknown(config.evaluate_rewards.reward))
    )  # fmt: skip
    return stages


def _scored(config: RunConfig, records: int, kept: float, tokens: float, line: float, speed: Speed) -> Stage:
    """Scoring: a pass of a model as large as the policy for each reward that is one; a request a record for a judge."""
    rewards = config.score.reward
    judges = sum(name.startswith("judge:") for name in rewards)
    models = sum(may_hold_a_model(name) for name in rewards) - judges
    models += bool(config.scoring.reference_model) + bool(config.scoring.kl_beta)
    size = records * (line + kept * SCORE_BYTES * (1 + len(rewards)))
    hours = records * (RECORD_SECONDS * (1 + models) + models * speed.trained / 3) / 3600
    note = "; ".join(filter(None, [_unknown(rewards), "models as large as the policy" if models else ""]))
    return Stage("score", records, records * tokens * models, size, records * judges, hours, note)


def _unknown(rewards: list[str]) -> str:
    """Whose time nobody knows, in words."""
    kinds = []
    if any(name.startswith("judge:") for name in rewards):
        kinds.append("the judge's time")
    if any(not may_hold_a_model(name) and ":" in name for name in rewards):
        kinds.append("the functions' own time")
    return "; ".join(kinds)
