"""Responses from several sources into one file: local models, servers, vLLM, and files of earlier or human responses.

A source is written ``MODEL@POLICY:N`` (a local model), ``URL@chat:N`` or ``URL@completions:N`` (an OpenAI-compatible
server; ``URL#NAME`` where it offers several models), ``vllm:MODEL@POLICY:N``, or the path of a record file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.errors import UserError, nearest
from rrhf.files import refuse_existing
from rrhf.models import ModelSettings, resolve_model
from rrhf.parts import in_parts
from rrhf.records import Record, count_records, read_records, record_from_row, record_line
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
ENDPOINT_PART = 256  # records in a part of an endpoint's or a file's answers; an endpoint's are kept one by one too
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class RemoteSettings:
    """What endpoints among the sources may cost."""

    concurrency: int = field(default=8, metadata={"help": "requests to a server at the same time"})
    timeout: float = field(default=300.0, metadata={"help": "seconds for one request"})
    max_retries: int = field(default=8, metadata={"help": "tries after one that failed"})
    max_requests: int | None = field(default=None, metadata={"help": "budget: most requests to a server"})
    max_tokens: int | None = field(default=None, metadata={"help": "budget: most tokens of a server"})
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
    name, at, rest = text.rpartition("@")
    if not at:
        if not Path(text).exists():
            raise UserError(f"--source {text}: no such file; a model is written MODEL@POLICY:N, a server URL@chat:N")
        return Source("file", text, "file", 0, Path(text).name.split(".")[0])
    policy, colon, number = rest.partition(":")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UserError(f"--source {text}: how many responses? write {name}@{policy}:4")
    kind = "endpoint" if re.match(r"https?://", name) else "vllm" if name.startswith("vllm:") else "local"
    known = KINDS if kind == "endpoint" else POLICY_NAMES
    if policy not in known:
        raise UserError(f"--source {text}: unknown policy {policy!r}: {nearest(policy, known)}")
    short = re.sub(r"^https?://|^vllm:|^package:", "", name).rstrip("/")
    short = short.rpartition("/")[2].removesuffix(".gguf") if kind != "endpoint" else short.replace("/", "-")
    return Source(kind, name.removeprefix("vllm:"), policy, int(number), f"{short}@{policy}")


class LocalModel:
    """A model on this machine, loaded when its first batch comes and freed with this object."""

    def __init__(
        self, model: ModelSettings, sampling: SamplingSettings, text: TextSettings, tag: str, loaded: Loaded
    ) -> None:
        self.model, self.sampling, self.text, self.tag, self.loaded = model, sampling, text, tag, loaded
        self.sampler: Sampler | None = None
        self.part_size = SAMPLING_PART * sampling.batch_size
        self.settings = {"model": model.model, "dtype": model.dtype, **asdict(sampling), **asdict(text), "tag": tag}

    def check(self, first: Record) -> None:
        """Everything that can be known without the weights."""
        name = resolve_model(self.model.model)
        if name.endswith(".gguf"):
            return  # read when it is converted
        from transformers import AutoConfig, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            config = AutoConfig.from_pretrained(name).get_text_config()
        except (OSError, ValueError) as error:
            raise UserError(f"--model {self.model.model}: cannot be loaded: {error}") from error
        TextFormat(tokenizer, self.text).encode_query(first.query)
        context = getattr(config, "max_position_embeddings", None)
        least = (self.text.max_query_length or 1) + self.sampling.max_new_tokens
        if context is not None and least > context:
            raise UserError(
                f"--max_query_length and --max_new_tokens are {least} tokens together, more than the context of "
                f"{context} of {self.model.model}: lower one of them"
            )

    def answer(self, records: list[Record]) -> Answers:
        if self.sampler is None:
            self.sampler = Sampler(*self.loaded.get(self.model), self.sampling, self.text, self.tag)
        yield from self.sampler.extend(records)

    def close(self) -> None:
        if self.sampler is not None and self.sampler.format.queries_cut:
            count = self.sampler.format.queries_cut
            log.info(f"{self.tag}: {count} queries were cut to --max_query_length {self.text.max_query_length}")
        self.sampler = None


class Remote:
    """A server, or vLLM in this process. What it has answered is kept in a journal at once, since it was paid for."""

    part_size = ENDPOINT_PART

    def __init__(self, responder: Any, tag: str, settings: dict[str, Any], journal: Path) -> None:
        self.responder, self.tag, self.settings, self.journal = responder, tag, settings, journal

    def check(self, first: Record) -> None:
        if hasattr(self.responder, "check"):
            self.responder.check()

    def answer(self, records: list[Record]) -> Answers:
        known = self._known()
        for i, record in enumerate(records):
            if record.id in known:
                yield i, known[record.id]
        rest = [(i, record) for i, record in enumerate(records) if record.id not in known]
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with self.journal.open("a", encoding="utf-8") as file:
            for j, texts, finish in self.responder.respond([record for _, record in rest]):
                i, record = rest[j]
                extended = with_responses(record, texts, finish, [f"{self.tag}/{n}" for n in range(len(texts))])
                file.write(record_line(extended) + "\n")
                file.flush()
                yield i, extended

    def _known(self) -> dict[str, Record]:
        known = {}
        if self.journal.exists():
            for line in self.journal.read_text(encoding="utf-8").splitlines():
                try:
                    record = record_from_row(json.loads(line), str(self.journal))
                except ValueError:  # the line a killed process was writing
                    continue
                known[record.id] = record
        return known

    def close(self) -> None:
        self.responder = None


class ResponseFile:
    """A file of human or earlier responses, joined to the records by id, else by query; it is indexed on disk."""

    part_size = ENDPOINT_PART

    def __init__(self, path: Path, tag: str) -> None:
        self.path, self.tag = path, tag
        self.settings = {"file": str(path), "tag": tag}
        self.joined = 0
        self.store: sqlite3.Connection | None = None

    def check(self, first: Record) -> None:
        """Read the file once; its faults show before any long work."""
        self.folder = tempfile.TemporaryDirectory()
        self.store = sqlite3.connect(Path(self.folder.name) / "index.sqlite")
        self.store.execute("CREATE TABLE responses (id TEXT, query TEXT, line TEXT)")
        rows = ((r.id, json.dumps(r.query), record_line(r)) for r in read_records(self.path, require="responses"))
        self.store.executemany("INSERT INTO responses VALUES (?, ?, ?)", rows)
        self.store.execute("CREATE INDEX by_id ON responses (id)")
        self.store.execute("CREATE INDEX by_query ON responses (query)")

    def answer(self, records: list[Record]) -> Answers:
        if self.store is None:
            self.check(records[0])
        assert self.store is not None
        for i, record in enumerate(records):
            found = self.store.execute("SELECT line FROM responses WHERE id = ?", (record.id,)).fetchone()
            if found is None:
                query = json.dumps(record.query)
                found = self.store.execute("SELECT line FROM responses WHERE query = ?", (query,)).fetchone()
            if found is None:
                yield i, record
                continue
            self.joined += 1
            other = record_from_row(json.loads(found[0]), str(self.path))
            tags = [t.replace("provided", self.tag, 1) if t.startswith("provided/") else t for t in other.sources]
            yield i, with_responses(record, other.responses, other.finish, tags, other)

    def close(self) -> None:
        log.info(f"{self.path}: joined to {self.joined} records")
        if self.store is not None:
            self.store.close()
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
    data: Path | Iterable[Record],
    output: Path,
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    *,
    sources: list[str] | None = None,
    remote: RemoteSettings | None = None,
    overwrite: bool = False,
    loaded: Loaded | None = None,
    total: int | None = None,
    description: str = "sample",
    merge: bool = True,
) -> None:
    """Draw responses to the queries of ``data`` and write them to ``output``; a stopped call goes on where it was.

    Args:
        data: a record file, or records.
        model, sampling: the only source, where ``sources`` names none; else what all sources share.
        sources: see this module's text. They answer one after another, each pass in parts beside ``output``.
        merge: merge equal responses of a query, drop empty ones, and queries without any; all are counted and said.

    Raises:
        UserError: a source is not usable (all are checked before any long work), or ``output`` exists.
    """
    from rrhf.stages import Loaded

    if not output.with_name(output.name + ".parts").exists():  # where parts are, in_parts knows what the output is
        refuse_existing(output, overwrite)
    loaded = loaded or Loaded()
    chain = _chain(output, model, sampling, text, sources or [], remote or RemoteSettings(), loaded)
    inputs = [data, *[output.with_name(f"{output.name}.source-{i}.jsonl") for i in range(len(chain) - 1)]]
    results = [*inputs[1:], output]
    if overwrite:
        for place in inputs[1:]:
            Path(place).unlink(missing_ok=True)  # type: ignore[arg-type]
    if isinstance(data, Path):
        first = next(iter(read_records(data)))
        if len(chain) > 1:
            for source in chain:
                source.check(first)
    counts: Counter[str] = Counter()
    for number, (source, before, after) in enumerate(zip(chain, inputs, results, strict=True)):
        last = number == len(chain) - 1
        if not last and Path(after).exists():  # type: ignore[arg-type]
            continue
        in_parts(
            read_records(before) if isinstance(before, Path) else before,
            Path(after),  # type: ignore[arg-type]
            _work(source, counts if last and merge else None),
            {**source.settings, "source": number, "merge": merge},
            part_size=source.part_size,
            overwrite=overwrite,
            description=description if len(chain) == 1 else f"{description} {source.tag}",
            total=total if not isinstance(before, Path) else count_records(before),
        )
        source.close()
        loaded.policy = loaded.policy if len(chain) == 1 else None  # one model in memory at a time
        _wait_for(Path(after))  # type: ignore[arg-type]
    for place in inputs[1:]:
        Path(place).unlink(missing_ok=True)  # type: ignore[arg-type]
    if counts:
        log.info("; ".join(f"{count} {what}" for what, count in sorted(counts.items())))


def _work(source: Any, counts: Counter[str] | None) -> Callable[[list[Record], Callable[[int], None]], list[Record]]:
    def work(block: list[Record], done: Callable[[int], None]) -> list[Record]:
        results: dict[int, Record] = {}
        for index, record in source.answer(block):
            results[index] = record
            done(1)
        ordered = [results[i] for i in range(len(block))]
        return ordered if counts is None else [r for r in map(_merged, ordered) if r is not None]

    def _merged(record: Record) -> Record | None:
        assert counts is not None
        merged, duplicates, empty = merge_duplicates(record)
        counts["equal responses merged"] += duplicates
        counts["empty responses dropped"] += empty
        counts["queries left without a response"] += not merged.responses
        for name in list(counts):
            if not counts[name]:
                del counts[name]
        return merged if merged.responses else None

    return work


def _wait_for(path: Path) -> None:
    """Where several processes share a pass, the next one begins when the last of them has joined its parts."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        while not path.exists():
            time.sleep(POLL_SECONDS)


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
    for source in parsed:
        seen[source.tag] += 1
        tag = f"{source.tag}-{seen[source.tag]}" if repeated[source.tag] > 1 else source.tag
        chain.append(_make(source, tag, output, model, sampling, text, remote, loaded))
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
    if source.kind == "endpoint":
        text = replace(text, max_query_length=None)  # counted in tokens, which a server's are not known
        url, _, name = source.name.partition("#")
        settings = EndpointSettings(url=url, kind=source.policy, model=name or None, **asdict(remote))
        drawn = replace(sampling, policy="top-k" if sampling.policy == "top-k" else "top-p", num_responses=source.count)
        described = {"url": url, "kind": source.policy, **asdict(drawn), **asdict(text), "tag": tag}
        return Remote(Endpoint(settings, drawn, text), tag, described, _journal(output, tag))
    beams = {"num_beams": max(sampling.num_beams, source.count)} if "beam" in source.policy else {}
    drawn = replace(sampling, policy=source.policy, num_responses=source.count, **beams)  # type: ignore[arg-type]
    if source.kind == "vllm":
        from rrhf.sampling.vllm import VLLM

        described = {"vllm": source.name, **asdict(drawn), **asdict(text), "tag": tag}
        return Remote(VLLM(source.name, drawn, text), tag, described, _journal(output, tag))
    return LocalModel(replace(model, model=source.name), drawn, text, tag, loaded)


def _journal(output: Path, tag: str) -> Path:
    rank = os.environ.get("RANK", "0")
    return output.with_name(f"{output.name}.parts") / f"journal-{tag}-{rank}.jsonl"
