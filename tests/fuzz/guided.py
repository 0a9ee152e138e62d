"""Texts of strangers, made by a fuzzer that sees which lines they reach (atheris): ``make test-atheris``.

``python tests/fuzz/guided.py --seconds 60 --targets reply,lines``. Each target runs in a process of its own; what it
finds is printed with the input, and the exit code is 1. test_fuzz.py has the same rule for inputs that hypothesis
makes: a text is read as it stands or refused by a ``UserError``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # support

HANGS = 30  # seconds
MEMORY = Path("/dev/shm")  # files that are written for a moment need no disk
PLACE = Path(tempfile.gettempdir())  # a target's process has one of its own
WORDS = (
    *("Response 1:", "accuracy", "coherence", "4.5", "/5", "|---|", "```json", "</think>", '{"', '": ', "NaN", "1e999"),
    *('"query"', '"responses"', '"scores"', '"chosen"', '"rejected"', '"prompt"', '"messages"', '"role"', '"content"'),
    *("data:", "source:", "extends:", "train:", "learning_rate:", "url:", "aspects:", "&x ", "*x", "!!int ", "<<: "),
    *('"sha256"', '"input"', '"counts"', '"step"', '"part"', "\\ud800", "\u2028", "null", "\x00"),
)


def reply(data: bytes) -> None:
    """A judge's reply: scores of every aspect within their range, or a refusal with its reason."""
    from support.judge_replies import read_or_refused

    read_or_refused(data[1:].decode("utf-8", "replace"), 1 + (data[0] if data else 0) % 3)


def lines(data: bytes) -> None:
    """A file of records in our format or a foreign one; what was read is written, and read again as it is."""
    from rrhf.records.files import read_records, write_records
    from rrhf.records.formats import load_dataset_records
    from rrhf.records.record import record_line

    path = PLACE / "data.jsonl"
    path.write_bytes(data)
    with _refusals():
        for record in load_dataset_records(path):
            assert record.query
            record_line(record)
    with _refusals():
        read = list(read_records(path))
        write_records(PLACE / "again.jsonl", read)
        again = [json.loads(record_line(record)) for record in read_records(PLACE / "again.jsonl")]
        assert again == [json.loads(record_line(record)) for record in read]


def settings(data: bytes) -> None:
    """A configuration of a run, a judge's file."""
    from rrhf.recipes.config import parse_config, read_config
    from rrhf.rewards.judges.template import read_template

    path = PLACE / "config.yaml"
    path.write_bytes(data)
    with _refusals():
        parse_config(read_config(str(path)), PLACE)
    with _refusals():
        read_template(path)


def manifest(data: bytes) -> None:
    """The manifest of another process beside parts that are to be gone on with: the output is right all the same."""
    from rrhf.records.files import read_records
    from rrhf.records.parts import in_parts
    from rrhf.records.record import Record

    output = PLACE / "out.jsonl"
    output.unlink(missing_ok=True)

    def run(stop: bool) -> int:
        def work(block: list[Record], done: Callable[[int], None]) -> Iterator[Record]:
            for record in block:
                if stop and record.query == "query 2":
                    raise KeyboardInterrupt
                record.responses, record.sources, record.finish = [str(record.query)[::-1]], ["x/0"], ["stop"]
                yield record

        return in_parts(lambda: (Record(f"query {i}") for i in range(3)), output, {"w": work}, {"s": 1}, part_size=1)

    with contextlib.suppress(KeyboardInterrupt):
        run(stop=True)
    (PLACE / "out.jsonl.parts" / "manifest-00001.jsonl").write_bytes(data)
    run(stop=False)
    assert [row.responses for row in read_records(output)] == [[f"{i} yreuq"] for i in range(3)]


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    from rrhf.common.errors import UserError

    try:
        yield
    except UserError as error:
        assert str(error).strip()


ROW = {"query": "q", "responses": ["a", "b"], "scores": [1, None], "rewards": {"f": [1.5, 0]}, "n": 1}
PAIR = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
DIALOGUE = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
ENTRY = {"step": 0, "part": 1, "sha256": "0" * 64, "input": "0" * 64, "counts": {"a": 1}}

TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[str, ...]]] = {  # with texts to begin with
    "reply": (reply, (
        "\x00accuracy: 4\ncoherence: 5",
        "\x01Response 1: accuracy 4/5, coherence 3/5\nResponse 2: accuracy 1, coherence 2",
        '\x01```json\n{"Response 1": {"accuracy": 4, "coherence": 3}}\n```', "\x00<think>5</think>\n- **accuracy**: 4",
        "\x01| | accuracy | coherence |\n|---|---|---|\n| Response 1 | 4 | 3 |\n| Response 2 | 2 | 1 |",
    )),
    "lines": (lines, tuple(json.dumps(row) + "\n" for row in (ROW, PAIR, DIALOGUE))),
    "settings": (settings, (
        "data:\n  source: d.jsonl\n  limit: 3\nmodel: m\nsample: {policy: top-p, num_responses: 2}\nseed: 1\n",
        "extends: paper-7b\ntrain:\n  learning_rate: 1e-5\n",
        "url: http://h/v1\nmodel: m\naspects: [a, b]\nrange: [1, 5]\n",
    )),
    "manifest": (manifest, (json.dumps(ENTRY) + "\n",)),
}  # fmt: skip


def fuzz(target: str, options: list[str]) -> None:
    """Become the fuzzer of one target; ends the process."""
    import atheris

    work, texts = TARGETS[target]
    logging.getLogger("rrhf").setLevel(logging.CRITICAL)  # nobody reads what is said of each of a million texts
    with atheris.instrument_imports(include=["rrhf", "yaml"]):
        for text in texts:  # imports all there is, which takes longer than a case may
            work(text.encode())
    seeds = PLACE / "seeds"
    seeds.mkdir()
    for number, text in enumerate(texts):
        (seeds / str(number)).write_text(text, encoding="utf-8")
    words = "".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in word.encode())}"\n' for word in WORDS)
    (PLACE / "words").write_text(words, encoding="ascii")
    flags = [f"-dict={PLACE / 'words'}", f"-timeout={HANGS}", f"-artifact_prefix={PLACE}/", "-max_len=2000"]
    atheris.Setup([sys.argv[0], *flags, *options, str(seeds)], work)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=300, help="a target")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer; 0: another at every run")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # become this target's process
    options = parser.parse_args()
    if options.only:
        fuzz(options.only, [f"-max_total_time={options.seconds}", f"-seed={options.seed}"])
    return max([_run(target, options.seconds, options.seed) for target in options.targets.split(",")])


def _run(target: str, seconds: int, seed: int) -> int:
    """Fuzz one target in a process of its own; 1 where something was found."""
    command = [sys.executable, __file__, "--only", target, f"--seconds={seconds}", f"--seed={seed}"]
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        environment = {**os.environ, "TMPDIR": place}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    done = re.search(r"Done (\d+) runs in (\d+)", ended.stderr)
    if ended.returncode or done is None:
        print(f"{target}: exit code {ended.returncode}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}", flush=True)
        return 1
    places = (re.findall(r"cov: (\d+)", ended.stderr) or ["?"])[-1]
    print(f"{target}: {done[1]} cases in {done[2]} s, {places} places reached; found: nothing", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
