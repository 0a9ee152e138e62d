"""The stage queries → responses: responses from one source or several, a file in, a file out.

A source is written ``MODEL@POLICY:N`` (a local model), ``URL@chat:N`` or ``URL@completions:N`` (an OpenAI-compatible
server; ``URL#NAME`` where it offers several models), ``vllm:MODEL@POLICY:N``, ``openvino:FOLDER@POLICY:N``, or the path
of a record file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.presentation import describe_counts
from rrhf.common.progress import progress
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.duplicates import merge_duplicates
from rrhf.records.elsewhere import Answer, Away, Elsewhere, Pool
from rrhf.records.files import WRITERS, file_suffix, read_records
from rrhf.records.parts import in_parts
from rrhf.records.parts_folder import Work, nothing_left
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.build import build_sources
from rrhf.sampling.sources.engine import EngineModel
from rrhf.sampling.sources.file import ResponseFile
from rrhf.sampling.sources.local import LocalModel
from rrhf.sampling.sources.source import Shared, Source

if TYPE_CHECKING:
    from rrhf.models.cache import PolicyCache

log = logging.getLogger("rrhf")

LEFT_OUT = "queries left without a response"
REMOTE_PART = 256  # records in a part where no local model answers; an endpoint's answers are kept one by one too


def sample_file(
    data: Path | Sequence[Record],
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    *,
    sources: list[str] | None = None,
    remote: EndpointLimits | None = None,
    overwrite: bool = False,
    policies: PolicyCache | None = None,
    description: str = "sample",
    merge: bool = True,
    pool: Pool | None = None,
) -> None:
    """Draw responses to the queries of ``data`` and write them to ``output``; a stopped call goes on where it was.

    Several processes (RANK and WORLD_SIZE) share the parts of the data out; the file is the same for any number.

    Args:
        data: a record file, which is read through once before any work, or records.
        model, sampling: the only source, where ``sources`` names none; else what all sources share.
        sources: see this module's text. They answer one after another.
        remote: the limits of endpoints among the sources.
        policies: where local models are kept, to be used by the next stage too.
        description: shown with the progress.
        merge: merge equal responses of a query, drop empty ones, and queries without any; all are counted and reported.
        pool: other processes, to which the parts are given that models are to answer; servers are asked from here.

    Raises:
        UserError: a source is not usable, or not with these queries (all is checked before any long work), ``output``
            exists, or merging left no query with a response.
    """
    from rrhf.models.cache import PolicyCache

    file_suffix(output, WRITERS)
    if nothing_left(output, overwrite):
        return
    policies = policies or PolicyCache()
    journals = output.with_name(f"{output.name}.parts")
    shared = Shared(model, sampling, text, remote or EndpointLimits(), policies, journals)
    chain = build_sources(sources or [], shared)
    total = _check(chain, data) if isinstance(data, Path) else len(data)
    counts: Counter[str] = Counter()
    try:
        in_parts(
            lambda: read_records(data) if isinstance(data, Path) else data,
            output,
            _steps(chain, description, merge, counts, policies),
            {**_settings(chain), "merge": merge},
            part_size=_part_size(chain, sampling),
            overwrite=overwrite,
            counts=counts,
            total=total,
            elsewhere=_elsewhere(pool, chain, sources or [], shared, description, merge),
        )
    finally:
        _close(chain, policies)
    _sum_up(output, counts, total)


def _sum_up(output: Path, counts: Counter[str], total: int) -> None:
    """Say what was counted. Raises UserError where all of the ``total`` queries were left out."""
    if counts[LEFT_OUT] == total:
        output.unlink(missing_ok=True)  # else it would be taken for finished work
        raise UserError(
            f"{output}: no query has a response, so there is nothing to write ({describe_counts(counts)}): check the "
            "queries, and what their responses come from"
        )
    if counts:
        log.info(describe_counts(counts))


def _close(chain: list[Source], policies: PolicyCache) -> None:
    for source in chain:
        source.close()
    if len(chain) > 1:
        policies.release()


def _check(chain: list[Source], data: Path) -> int:
    """Check every source, then every query with each; how many queries there are."""
    count = 0
    for source in chain:
        source.check()
    for record in progress(read_records(data), "check", unit="records"):
        for source in chain:
            source.check_query(record)
        count += 1
    if not count:
        raise UserError(f"{data}: there is no record to work on")
    for source in chain:
        if isinstance(source, ResponseFile):
            source.refuse_strangers(data)
    return count


def _settings(chain: list[Source]) -> dict[str, Any]:
    """What the responses depend on, beside the queries."""
    if len(chain) == 1:
        return dict(chain[0].settings)
    settings = {f"{source.tag} {name}": value for source in chain for name, value in source.settings.items()}
    return {**settings, "sources": [source.tag for source in chain]}


def _part_size(chain: list[Source], sampling: SamplingSettings) -> int:
    return sampling.block_size if any(source.uses_policy_cache for source in chain) else REMOTE_PART


def _steps(
    chain: list[Source], description: str, merge: bool, counts: Counter[str], policies: PolicyCache
) -> dict[str, Work]:
    """A step a source, in order; the last one merges."""
    return {
        _step(source, chain, description): _work(source, chain, counts, policies, merge and source is chain[-1])
        for source in chain
    }


def _step(source: Source, chain: list[Source], description: str) -> str:
    return description if len(chain) == 1 else f"{description} {source.tag}"


def _work(source: Source, chain: list[Source], counts: Counter[str], policies: PolicyCache, merge: bool) -> Work:
    def work(block: list[Record], done: Callable[[int], None]) -> list[Record]:
        for other in chain:  # one model in memory at a time
            if other is not source:
                other.close()
        if not source.uses_policy_cache:
            policies.release()
        answers: dict[int, Record] = {}
        for index, record in source.answer(block, counts):
            answers[index] = record
            done(1)
        ordered = [answers[i] for i in range(len(block))]
        return _all_merged(ordered, counts) if merge else ordered

    return work


def _elsewhere(
    pool: Pool | None, chain: list[Source], sources: list[str], shared: Shared, description: str, merge: bool
) -> Elsewhere | None:
    """The steps that other processes can do: those of models. A server is asked from here: its budget is one."""
    if pool is None:
        return None
    opened = partial(_open_source, sources, shared.model, shared.sampling, shared.text)
    steps = {
        _step(source, chain, description): Away(
            open=partial(opened, index),
            apart=lambda record: [record],
            unite=lambda record, pieces: pieces[0] or record,
            settle=_all_merged if merge and source is chain[-1] else lambda records, counts: records,
        )
        for index, source in enumerate(chain)
        if isinstance(source, LocalModel | EngineModel)
    }
    return Elsewhere(pool, steps)


def _open_source(
    sources: list[str], model: ModelSettings, sampling: SamplingSettings, text: TextSettings, index: int
) -> Answer:
    from rrhf.models.cache import PolicyCache

    shared = Shared(model, sampling, text, EndpointLimits(), PolicyCache(), Path())  # no server is asked
    return build_sources(sources, shared)[index].answer


def _all_merged(records: list[Record], counts: Counter[str]) -> list[Record]:
    return [record for record in (_merged(record, counts) for record in records) if record is not None]


def _merged(record: Record, counts: Counter[str]) -> Record | None:
    merged, duplicates, empty = merge_duplicates(record)
    for what, count in (
        ("equal responses merged", duplicates),
        ("empty responses dropped", empty),
        (LEFT_OUT, int(not merged.responses)),
    ):
        if count:
            counts[what] += count
    return merged if merged.responses else None
