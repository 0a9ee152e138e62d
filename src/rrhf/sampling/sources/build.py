"""Sources made of what was written: one function a kind, one line in ``KINDS``."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from rrhf.common.endpoint_settings import EndpointSettings, share_of_process
from rrhf.common.errors import UserError
from rrhf.common.remote import fetched
from rrhf.models.identity import model_digest
from rrhf.records.checksums import checksum_of_file
from rrhf.sampling.settings import SamplingSettings, policy_named
from rrhf.sampling.sources.engine import Engine, EngineModel
from rrhf.sampling.sources.file import ResponseFile
from rrhf.sampling.sources.local import LocalModel
from rrhf.sampling.sources.paid import PaidSource
from rrhf.sampling.sources.parsing import SourceSpec, parse_source, shown_source
from rrhf.sampling.sources.server import Endpoint
from rrhf.sampling.sources.source import Shared, Source


def build_sources(written: Sequence[str], shared: Shared) -> list[Source]:
    """The sources in their order; without any written, the model of ``shared`` by the policy of ``shared``.

    Raises:
        UserError: a source cannot be read or does not fit its settings, or there is neither a source nor a model.
    """
    if not written:
        if not shared.model.model:
            raise UserError("--model or --source is missing: where should responses come from?")
        return [LocalModel(shared.model, shared.sampling, shared.text, shared.sampling.policy, shared.policies)]
    specs = [parse_source(source) for source in written]
    repeated = Counter(spec.tag for spec in specs)
    seen: Counter[str] = Counter()
    sources: list[Source] = []
    for text, spec in zip(written, specs, strict=True):
        seen[spec.tag] += 1
        number = seen[spec.tag]
        tag = f"{spec.tag}-{number}" if repeated[spec.tag] > 1 else spec.tag
        # By the number and not the whole tag: a source draws the same when another one like it is added behind it.
        seed = source_seed(shared.sampling.seed, spec.tag, number)
        own = replace(shared, sampling=replace(shared.sampling, seed=seed))
        try:
            sources.append(KINDS[spec.kind](spec, tag, own))
        except UserError as error:
            raise UserError(f"--source {shown_source(text)}: {error}") from error
    return sources


def source_digest(spec: SourceSpec) -> str | None:
    """A digest of the file or model that responses come from; ``None`` of a server's, which nobody knows."""
    if spec.kind == "file":
        return checksum_of_file(fetched(spec.name))
    return None if spec.kind == "endpoint" else model_digest(spec.name)


def source_seed(seed: int, tag: str, number: int) -> int:
    """The seed, of 31 bits, of the ``number``-th source (from 1) with this tag, given the command's ``seed``.

    All random streams of a source start from its seed and the record's id, so no two sources of a command draw by the
    same random numbers, and a source's draws do not depend on what other sources there are.
    """
    digest = hashlib.blake2b(f"{seed}/{number}/{tag}".encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _file(spec: SourceSpec, tag: str, shared: Shared) -> Source:
    return ResponseFile(fetched(spec.name), tag)


def _local(spec: SourceSpec, tag: str, shared: Shared) -> Source:
    model = replace(shared.model, model=spec.name)
    return LocalModel(model, _drawn(spec, shared.sampling), shared.text, tag, shared.policies)


def _vllm(spec: SourceSpec, tag: str, shared: Shared) -> Source:
    from rrhf.sampling.sources.vllm import VLLM

    return _engine(VLLM, spec, tag, shared)


def _openvino(spec: SourceSpec, tag: str, shared: Shared) -> Source:
    from rrhf.sampling.sources.openvino import OpenVINO

    return _engine(OpenVINO, spec, tag, shared)


def _engine(kind: Callable[..., Engine], spec: SourceSpec, tag: str, shared: Shared) -> Source:
    drawn, dtype = _drawn(spec, shared.sampling), shared.model.dtype
    made_of = {spec.kind: spec.name, "weights": model_digest(spec.name), "dtype": dtype}
    settings = {**made_of, **asdict(drawn), **asdict(shared.text), "tag": tag}
    return EngineModel(kind(spec.name, drawn, shared.text, dtype), tag, settings)


def _endpoint(spec: SourceSpec, tag: str, shared: Shared) -> Source:
    text = replace(shared.text, max_query_length=None)  # it counts tokens, and a server's are not known
    url, _, name = spec.name.partition("#")
    settings = EndpointSettings(url, spec.policy, name or None, **asdict(share_of_process(shared.limits)))
    policy = shared.sampling.policy if shared.sampling.policy in ("greedy", "top-k") else "top-p"
    drawn = replace(shared.sampling, policy=policy, num_responses=spec.count, num_beam_groups=None)
    described = {"url": url, "kind": spec.policy, **asdict(drawn), **asdict(text), "tag": tag}
    return PaidSource(Endpoint(settings, drawn, text), tag, described, shared.journals)


KINDS: dict[str, Callable[[SourceSpec, str, Shared], Source]] = {
    "file": _file,
    "local": _local,
    "vllm": _vllm,
    "openvino": _openvino,
    "endpoint": _endpoint,
}


def _drawn(spec: SourceSpec, sampling: SamplingSettings) -> SamplingSettings:
    """The settings of all sources with this one's policy and number."""
    policy = policy_named(spec.policy)
    return replace(
        sampling,
        policy=spec.policy,
        num_responses=spec.count,
        num_beams=max(sampling.num_beams, spec.count) if policy.beams else sampling.num_beams,
        num_beam_groups=sampling.num_beam_groups if policy.grouped else None,
    )
