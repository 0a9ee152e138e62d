"""Responses from several sources into one file: local models, servers, vLLM, and files of earlier or human responses.

A source is written ``MODEL@POLICY:N`` (a local model), ``URL@chat:N`` or ``URL@completions:N`` (an OpenAI-compatible
server; ``URL#NAME`` where it offers several models), ``vllm:MODEL@POLICY:N``, ``openvino:FOLDER@POLICY:N``, or the path
of a record file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.common.launch import rank_and_world
from rrhf.common.progress import progress
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.duplicates import merge_duplicates
from rrhf.records.files import WRITERS, file_suffix, read_records
from rrhf.records.parts import Work, in_parts, nothing_left
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import EngineModel
from rrhf.sampling.sources.file import ResponseFile
from rrhf.sampling.sources.local import LocalModel
from rrhf.sampling.sources.openvino import OpenVINO
from rrhf.sampling.sources.parsing import Source, parse_source, shown_source
from rrhf.sampling.sources.remote import Remote, RemoteSettings
from rrhf.sampling.sources.server import Endpoint, EndpointSettings
from rrhf.sampling.sources.vllm import VLLM

if TYPE_CHECKING:
    from rrhf.models.cache import PolicyCache

log = logging.getLogger("rrhf")

SAMPLING_PART = 4  # batches in a part: what a stopped run can lose, and what is sorted by length
ENDPOINT_PART = 256  # records in a part where no local model answers; an endpoint's answers are kept one by one too
ENGINES = {"vllm": VLLM, "openvino": OpenVINO}


def sample_file(
    data: Path | Sequence[Record],
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    *,
    sources: list[str] | None = None,
    remote: RemoteSettings | None = None,
    overwrite: bool = False,
    policies: PolicyCache | None = None,
    description: str = "sample",
    merge: bool = True,
) -> None:
    """Draw responses to the queries of ``data`` and write them to ``output``; a stopped call goes on where it was.

    Several processes (RANK and WORLD_SIZE) share the parts of the data out; the file is the same for any number.

    Args:
        data: a record file, which is read through once before any work, or records.
        model, sampling: the only source, where ``sources`` names none; else what all sources share.
        sources: see this module's text. They answer one after another.
        merge: merge equal responses of a query, drop empty ones, and queries without any; all are counted and said.

    Raises:
        UserError: a source is not usable, or not with these queries (all is checked before any long work), or
            ``output`` exists.
    """
    from rrhf.models.cache import PolicyCache

    file_suffix(output, WRITERS)
    if nothing_left(output, overwrite):
        return
    policies = policies or PolicyCache()
    chain = _chain(output, model, sampling, text, sources or [], remote or RemoteSettings(), policies)
    total = _check(chain, data) if isinstance(data, Path) else len(data)
    counts: Counter[str] = Counter()
    if len(chain) == 1:
        settings = dict(chain[0].settings)
    else:
        settings = {f"{source.tag} {name}": value for source in chain for name, value in source.settings.items()}
        settings["sources"] = [source.tag for source in chain]
    try:
        in_parts(
            lambda: read_records(data) if isinstance(data, Path) else data,
            output,
            {
                description if len(chain) == 1 else f"{description} {source.tag}": _work(
                    source, chain, counts, policies, merge and source is chain[-1]
                )
                for source in chain
            },
            {**settings, "merge": merge},
            part_size=SAMPLING_PART * sampling.batch_size
            if any(isinstance(source, LocalModel) for source in chain)
            else ENDPOINT_PART,
            overwrite=overwrite,
            counts=counts,
            total=total,
        )
    finally:
        for source in chain:
            source.close()
        if len(chain) > 1:
            policies.release()
    if counts:
        log.info("; ".join(f"{count} {what}" for what, count in sorted(counts.items())))


def _check(chain: list[Any], data: Path) -> int:
    """Check every source, then every query with each; how many there are."""
    count = 0
    for source in chain:
        source.check()
    for record in progress(read_records(data), "check", unit="records"):
        for source in chain:
            source.check_query(record)
        count += 1
    if not count:
        raise UserError(f"{data}: there is no record to work on")
    return count


def _work(source: Any, chain: list[Any], counts: Counter[str], policies: PolicyCache, merge: bool) -> Work:
    def work(block: list[Record], done: Callable[[int], None]) -> list[Record]:
        for other in chain:  # one model in memory at a time
            if other is not source:
                other.close()
        if not isinstance(source, LocalModel):
            policies.release()
        results: dict[int, Record] = {}
        for index, record in source.answer(block, counts):
            results[index] = record
            done(1)
        ordered = [results[i] for i in range(len(block))]
        return [r for r in (_merged(record, counts) for record in ordered) if r is not None] if merge else ordered

    return work


def _merged(record: Record, counts: Counter[str]) -> Record | None:
    merged, duplicates, empty = merge_duplicates(record)
    for what, count in (
        ("equal responses merged", duplicates),
        ("empty responses dropped", empty),
        ("queries left without a response", int(not merged.responses)),
    ):
        if count:
            counts[what] += count
    return merged if merged.responses else None


def _chain(
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    sources: list[str],
    remote: RemoteSettings,
    policies: PolicyCache,
) -> list[Any]:
    if not sources:
        if not model.model:
            raise UserError("--model or --source is missing: where should responses come from?")
        return [LocalModel(model, sampling, text, sampling.policy, policies)]
    parsed = [parse_source(source) for source in sources]
    repeated = Counter(source.tag for source in parsed)
    seen: Counter[str] = Counter()
    chain: list[Any] = []
    for written, source in zip(sources, parsed, strict=True):
        seen[source.tag] += 1
        tag = f"{source.tag}-{seen[source.tag]}" if repeated[source.tag] > 1 else source.tag
        try:
            chain.append(_make(source, tag, output, model, sampling, text, remote, policies))
        except UserError as error:
            raise UserError(f"--source {shown_source(written)}: {error}") from error
    return chain


def _make(
    source: Source,
    tag: str,
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    remote: RemoteSettings,
    policies: PolicyCache,
) -> Any:
    if source.kind == "file":
        return ResponseFile(Path(source.name), tag)
    folder = output.with_name(f"{output.name}.parts")
    if source.kind == "endpoint":
        text = replace(text, max_query_length=None)  # counted in tokens, which a server's are not known
        url, _, name = source.name.partition("#")
        settings = EndpointSettings(url=url, kind=source.policy, model=name or None, **asdict(_share(remote)))
        policy = "top-k" if sampling.policy == "top-k" else "top-p"
        drawn = replace(sampling, policy=policy, num_responses=source.count, num_beam_groups=None)
        described = {"url": url, "kind": source.policy, "name": name, **asdict(drawn), **asdict(text), "tag": tag}
        return Remote(Endpoint(settings, drawn, text), tag, described, folder)
    drawn = replace(
        sampling,
        policy=source.policy,
        num_responses=source.count,
        num_beams=max(sampling.num_beams, source.count) if "beam" in source.policy else sampling.num_beams,
        num_beam_groups=sampling.num_beam_groups if source.policy == "diverse-beam" else None,
    )
    if source.kind in ENGINES:
        described = {source.kind: source.name, "dtype": model.dtype, **asdict(drawn), **asdict(text), "tag": tag}
        return EngineModel(ENGINES[source.kind](source.name, drawn, text, model.dtype), tag, described)
    return LocalModel(replace(model, model=source.name), drawn, text, tag, policies)


def _share(remote: RemoteSettings) -> RemoteSettings:
    """This process's share of the budgets and of the requests at a time."""
    rank, world = rank_and_world()

    def share(name: str, budget: int | None) -> int | None:
        if budget is None or budget < 1:
            return budget
        if budget < world:
            raise UserError(f"--{name} {budget} is less than one for each of {world} processes")
        return (budget + rank) // world

    return replace(
        remote,
        concurrency=max(remote.concurrency // world, min(remote.concurrency, 1)),
        max_requests=share("max_requests", remote.max_requests),
        max_tokens=share("max_tokens", remote.max_tokens),
    )
