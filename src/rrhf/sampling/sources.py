"""Responses from several sources into one file: local models, servers, vLLM, and files of earlier or human responses.

A source is written ``MODEL@POLICY:N`` (a local model), ``URL@chat:N`` or ``URL@completions:N`` (an OpenAI-compatible
server; ``URL#NAME`` where it offers several models), ``vllm:MODEL@POLICY:N``, or the path of a record file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.adapters import is_adapter
from rrhf.errors import UserError, nearest
from rrhf.files import append_line
from rrhf.models import ModelSettings, check_folder, gguf_as_folder, resolve_model
from rrhf.parts import Work, checksum_of_file, checksum_of_records, in_parts, nothing_left
from rrhf.progress import progress
from rrhf.records import WRITERS, Query, Record, file_suffix, read_records, record_from_row, record_line
from rrhf.sampling import Sampler
from rrhf.sampling.duplicates import merge_duplicates
from rrhf.sampling.endpoint import KINDS, Endpoint, EndpointSettings
from rrhf.sampling.settings import POLICY_NAMES, SamplingSettings
from rrhf.text import TextFormat, TextSettings

if TYPE_CHECKING:
    from rrhf.stages import Loaded

log = logging.getLogger("rrhf")

Answers = Iterator[tuple[int, Record]]
SAMPLING_PART = 4  # batches in a part: what a stopped run can lose, and what is sorted by length
ENDPOINT_PART = 256  # records in a part where no local model answers; an endpoint's answers are kept one by one too
MESSAGE_TOKENS = 32  # that a chat template may put around a message, and
TEMPLATE_TOKENS = 1024  # around all of them: queries that may be too long are tokenised before any work, others not


@dataclass(frozen=True)
class RemoteSettings:
    """What endpoints among the sources may cost."""

    concurrency: int = field(default=8, metadata={"help": "requests to a server at the same time"})
    timeout: float = field(default=300.0, metadata={"help": "seconds for one request"})
    max_retries: int = field(default=8, metadata={"help": "tries after one that failed"})
    max_requests: int | None = field(
        default=None, metadata={"help": "budget: most requests to a server, by all processes together"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "budget: most tokens of a server, by all processes together"}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "the environment variable that holds the server's key"}
    )


@dataclass(frozen=True)
class Source:
    """One parsed source. ``kind`` is "local", "endpoint", "vllm" or "file"; ``tag`` names it in ``sources``."""

    kind: str
    name: str
    policy: str
    count: int
    tag: str


def parse_source(text: str) -> Source:
    """Read one ``--source``.

    Raises:
        UserError: neither a file nor of the form NAME@POLICY:N, an unknown policy, or N below 1.
    """
    if Path(text).is_file():
        return Source("file", text, "file", 0, Path(text).name.split(".")[0])
    shown = _shown(text)
    name, at, rest = text.rpartition("@")
    if not at:
        raise UserError(f"--source {shown}: no such file; a model is written MODEL@POLICY:N, a server URL@chat:N")
    policy, colon, number = rest.partition(":")
    kind = "endpoint" if re.match(r"https?://", name) else "vllm" if name.startswith("vllm:") else "local"
    known = KINDS if kind == "endpoint" else POLICY_NAMES
    if policy not in known:
        raise UserError(f"--source {shown}: unknown policy {policy!r}: {nearest(policy, known)}")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UserError(f"--source {shown}: how many responses? write {shown.rpartition('@')[0]}@{policy}:4")
    short = re.sub(r"^https?://|^vllm:|^package:", "", name).rstrip("/")
    short = short.rpartition("/")[2].removesuffix(".gguf") if kind != "endpoint" else short.replace("/", "-")
    return Source(kind, name.removeprefix("vllm:"), policy, int(number), f"{short}@{policy}")


def _shown(source: str) -> str:
    """A source for a message, without the key that someone may have put into its address."""
    return re.sub(r"//[^/]*@(?=[^@]*@)|\?[^@]*", "…", source)


class LocalModel:
    """A model on this machine, loaded when its first batch comes; it is freed when another one is loaded."""

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, text: TextSettings, tag: str, loaded: Loaded
    ) -> None:
        self.model, self.sampling, self.text, self.tag, self.loaded = model, sampling, text, tag, loaded
        self.sampler: Sampler | None = None
        self.format: TextFormat | None = None
        self.settings = {"model": model.model, "dtype": model.dtype, **asdict(sampling), **asdict(text), "tag": tag}

    def check(self) -> None:
        """Everything that can be known without the weights and the data."""
        name = resolve_model(self.model.model)
        if is_adapter(name):
            return  # its loading says what is wrong with it, or with its base model
        if name.endswith(".gguf"):
            name = str(gguf_as_folder(Path(name)))
        check_folder(name)
        from transformers import AutoConfig, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            config = AutoConfig.from_pretrained(name).get_text_config()
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"--model {self.model.model}: cannot be loaded: {error}") from error
        self.format = TextFormat(tokenizer, self.text)
        self.known: set[type] = set()
        self.context = getattr(config, "max_position_embeddings", None) or sys.maxsize
        least = (self.text.max_query_length or 1) + self.sampling.max_new_tokens
        if least > self.context:
            raise UserError(
                f"--max_query_length and --max_new_tokens are {least} tokens together, more than the context of "
                f"{self.context} of {self.model.model}: lower one of them"
            )

    def check_query(self, record: Record) -> None:
        """Refuse a query that the model cannot take. The first text and the first messages are encoded, of the others
        those that may be too long."""
        if self.format is None:
            return
        query = record.query
        room = self.context - self.sampling.max_new_tokens
        if type(query) in self.known and (self.text.max_query_length or _most_tokens(query, self.text) <= room):
            return
        self.known.add(type(query))
        length = len(self.format.encode_query(query))
        if length > room:
            raise UserError(
                f"record {record.id}: a query of {length} tokens and --max_new_tokens {self.sampling.max_new_tokens} "
                f"are more than the context of {self.context} of {self.model.model}: give --max_query_length {room}"
            )

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        if self.sampler is None:
            self.sampler = Sampler(*self.loaded.get(self.model), self.sampling, self.text, self.tag)
        before = self.sampler.format.queries_cut
        yield from self.sampler.extend(records)
        if cut := self.sampler.format.queries_cut - before:
            counts[f"queries were cut to --max_query_length {self.text.max_query_length} ({self.tag})"] += cut

    def close(self) -> None:
        self.sampler = None


class Remote:
    """A server, or vLLM in this process. What it has answered is kept in a journal at once, since it was paid for.

    Args:
        responder: has ``check``, ``check_query`` and ``respond``, as ``Endpoint`` has.
        folder: where the journals lie, one a part: whoever comes to the part takes the answers up.
    """

    def __init__(self, responder: Any, tag: str, settings: dict[str, Any], folder: Path) -> None:
        self.responder, self.tag, self.settings, self.folder = responder, tag, settings, folder

    def check(self) -> None:
        self.responder.check()

    def check_query(self, record: Record) -> None:
        self.responder.check_query(record)

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        digest = hashlib.sha256(f"{self.tag} {checksum_of_records(records)}".encode()).hexdigest()
        journal = self.folder / f"journal-{digest[:32]}.jsonl"
        known = self._known(journal)
        for i, record in enumerate(records):
            if record.id in known:
                yield i, known[record.id]
        rest = [(i, record) for i, record in enumerate(records) if record.id not in known]
        self.folder.mkdir(parents=True, exist_ok=True)
        for j, texts, finish in self.responder.respond([record for _, record in rest]):
            i, record = rest[j]
            extended = with_responses(record, texts, finish, [f"{self.tag}/{n}" for n in range(len(texts))])
            append_line(journal, record_line(extended))
            yield i, extended

    def _known(self, journal: Path) -> dict[str, Record]:
        known = {}
        if journal.exists():
            for line in journal.read_bytes().splitlines():
                try:
                    record = record_from_row(json.loads(line), str(journal))
                except (ValueError, UserError):  # the line a killed process was writing
                    continue
                known[record.id] = record
        return known

    def close(self) -> None:
        if hasattr(self.responder, "close"):
            self.responder.close()


class ResponseFile:
    """A file of human or earlier responses, joined to the records by id, else by query; it is indexed on disk."""

    def __init__(self, path: Path, tag: str) -> None:
        self.path, self.tag = path, tag
        self.settings = {"file": str(path), "sha256": checksum_of_file(path), "tag": tag}
        self.store: sqlite3.Connection | None = None

    def check(self) -> None:
        """Read the file once; its faults show before any long work."""
        self.folder = tempfile.TemporaryDirectory()
        self.store = sqlite3.connect(Path(self.folder.name) / "index.sqlite")
        self.store.execute("CREATE TABLE responses (id TEXT, query TEXT, line TEXT)")
        rows = ((r.id, json.dumps(r.query), record_line(r)) for r in read_records(self.path, require="responses"))
        self.store.executemany("INSERT INTO responses VALUES (?, ?, ?)", rows)
        self.store.execute("CREATE INDEX by_id ON responses (id)")
        self.store.execute("CREATE INDEX by_query ON responses (query)")

    def check_query(self, record: Record) -> None:
        pass

    def answer(self, records: list[Record], counts: Counter[str]) -> Answers:
        if self.store is None:
            self.check()
        assert self.store is not None
        for i, record in enumerate(records):
            found = self.store.execute("SELECT line FROM responses WHERE id = ?", (record.id,)).fetchone()
            if found is None:
                query = json.dumps(record.query)
                found = self.store.execute("SELECT line FROM responses WHERE query = ?", (query,)).fetchone()
            if found is None:
                yield i, record
                continue
            counts[f"queries joined with responses of {self.path}"] += 1
            other = record_from_row(json.loads(found[0]), str(self.path))
            tags = [t.replace("provided", self.tag, 1) if t.startswith("provided/") else t for t in other.sources]
            yield i, with_responses(record, other.responses, other.finish, tags, other)

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None
            self.folder.cleanup()


def with_responses(
    record: Record, texts: list[str], finish: list[str], tags: list[str], scored: Record | None = None
) -> Record:
    """``record`` with responses appended; those of ``scored`` bring the scores they have."""
    new_scores = list(scored.scores) if scored is not None and scored.scores else [None] * len(texts)
    old_scores = list(record.scores) or [None] * len(record.responses)
    has_scores = any(score is not None for score in [*old_scores, *new_scores])
    names = {**record.rewards, **(scored.rewards if scored is not None else {})}
    none: list[float | None] = [None] * len(record.responses)
    rewards = {
        name: [
            *record.rewards.get(name, none),
            *((scored.rewards.get(name) if scored is not None else None) or [None] * len(texts)),
        ]
        for name in names
    }
    return replace(
        record,
        responses=[*record.responses, *texts],
        sources=[*record.sources, *tags],
        finish=[*record.finish, *finish],
        scores=[*old_scores, *new_scores] if has_scores else [],
        rewards=rewards,
    )


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
    loaded: Loaded | None = None,
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
    from rrhf.stages import Loaded

    file_suffix(output, WRITERS)
    if nothing_left(output, overwrite):
        return
    loaded = loaded or Loaded()
    chain = _chain(output, model, sampling, text, sources or [], remote or RemoteSettings(), loaded)
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
                    source, chain, counts, loaded, merge and source is chain[-1]
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
            loaded.policy = None
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


def _work(source: Any, chain: list[Any], counts: Counter[str], loaded: Loaded, merge: bool) -> Work:
    def work(block: list[Record], done: Callable[[int], None]) -> list[Record]:
        for other in chain:  # one model in memory at a time
            if other is not source:
                other.close()
        if not isinstance(source, LocalModel):
            loaded.policy = None
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


def _most_tokens(query: Query, text: TextSettings) -> int:
    """More tokens than a query is likely to have: a token has at least a byte."""
    if isinstance(query, str):
        return len(query.encode("utf-8", "replace")) + 1
    content = sum(len(str(message).encode("utf-8", "replace")) + MESSAGE_TOKENS for message in query)
    return content + len((text.system_prompt or "").encode()) + TEMPLATE_TOKENS


def _chain(
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    sources: list[str],
    remote: RemoteSettings,
    loaded: Loaded,
) -> list[Any]:
    if not sources:
        if not model.model:
            raise UserError("--model or --source is missing: where should responses come from?")
        return [LocalModel(model, sampling, text, sampling.policy, loaded)]
    parsed = [parse_source(source) for source in sources]
    repeated = Counter(source.tag for source in parsed)
    seen: Counter[str] = Counter()
    chain: list[Any] = []
    for written, source in zip(sources, parsed, strict=True):
        seen[source.tag] += 1
        tag = f"{source.tag}-{seen[source.tag]}" if repeated[source.tag] > 1 else source.tag
        try:
            chain.append(_make(source, tag, output, model, sampling, text, remote, loaded))
        except UserError as error:
            raise UserError(f"--source {_shown(written)}: {error}") from error
    return chain


def _make(
    source: Source,
    tag: str,
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    remote: RemoteSettings,
    loaded: Loaded,
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
    if source.kind == "vllm":
        from rrhf.sampling.vllm import VLLM

        described = {"vllm": source.name, **asdict(drawn), **asdict(text), "tag": tag}
        return Remote(VLLM(source.name, drawn, text), tag, described, folder)
    return LocalModel(replace(model, model=source.name), drawn, text, tag, loaded)


def _share(remote: RemoteSettings) -> RemoteSettings:
    """This process's share of the budgets and of the requests at a time."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

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
