"""How time and memory grow with the records, where models cost nothing: sampling, scoring and reading by the trainer.

Sampling asks a source that makes its responses up, scoring a function that returns lengths, and the trainer's data
path tokenises with a tokenizer of 320 entries. What is left is what rrhf itself costs a record. Each stage is a process
of its own; a record must take as long among a million as among ten thousand, and the memory must not grow with the
records but for what is said in docs/scaling.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from common import arguments, machine, report, table
from scoring import COMMAND, FUNCTION, run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SAMPLE = """
import sys
from rrhf.cli.main import main
from rrhf.sampling.sources import build

class Stub:
    uses_policy_cache = False
    tag, settings = "stub", {}

    def check(self): pass
    def check_query(self, record): pass
    def close(self): pass

    def answer(self, records, counts):
        for i, record in enumerate(records):
            words = record.query.split()
            texts = [" ".join(words[j : j + 8]) + f" {j}" for j in range(4)]
            yield i, record.with_responses(texts, ["stop"] * 4, [f"stub/{j}" for j in range(4)])

build.KINDS["local"] = lambda spec, tag, shared: Stub()
assert main(sys.argv[1:]) == 0
"""

READ = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from rrhf.models.tokenization import TextFormat
from rrhf.records.files import read_records
from rrhf.training.dataset import EncodedRecords
records = read_records(Path(sys.argv[1]), require="scores", empty_responses="drop")
data = EncodedRecords(records, TextFormat(AutoTokenizer.from_pretrained(sys.argv[2])), 512)
tokens = sum(len(data[i].query) for i in range(0, len(data), 97))
assert len(data) and tokens
"""


def write_queries(path: Path, count: int) -> None:
    """Queries of about 70 characters, no two alike."""
    words = ["bread", "river", "lamp", "stone", "letter", "bridge", "film", "door", "train", "table", "bell", "village"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(words[(i // 12**place + place) % 12] for place in range(12))
            file.write(f'{{"id": "q{i}", "query": "{text}"}}\n')


def main() -> None:
    from support.tiny import write_model

    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "trivial.py").write_text(FUNCTION, encoding="utf-8")
        model = write_model(folder / "model")
        for count in options.records:
            queries, drawn, scored = (folder / f"{name}-{count}.jsonl" for name in ("queries", "drawn", "scored"))
            write_queries(queries, count)
            sample = ["sample", "--source", "stub@greedy:4", "--data", str(queries), "--output", str(drawn)]
            score = ["score", "--reward", "trivial:length", "--data", str(drawn), "--output", str(scored)]
            stages = {
                "sample": (SAMPLE, sample),
                "score": (COMMAND, score),
                "read to train": (READ, [str(scored), str(model)]),
            }
            for name, (script, given) in stages.items():
                took = run(script, given, folder)
                mine = 1e6 * took.processor / count
                rows.append([name, f"{count:,}", f"{took.wall:.1f}", f"{took.processor:.1f}", f"{mine:.0f}",
                             f"{took.peak:.0f}"])  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
            for file in (queries, drawn, scored):
                file.unlink()
    header = ["stage", "records", "seconds", "seconds of the processor", "µs of it a record", "peak MB"]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report(f"{machine()}; load {load} on {os.cpu_count()} cores\n\n{table(header, rows)}", options.output)


if __name__ == "__main__":
    main()
