"""The study's page over results whose truth is known: verdicts, pairing, export without paths, one line run again."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from rrhf.cli.main import main
from rrhf.common.errors import UserError
from rrhf.recipes.reproduce.arms import arm_named
from rrhf.recipes.reproduce.check import read_result, scale_of
from rrhf.recipes.reproduce.comparable import require_settings
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.scale import read_scale
from rrhf.recipes.study.claims import CLAIMS, balance, judged, over_the_same_steps
from rrhf.recipes.study.figures import figures, mean_point
from rrhf.recipes.study.frontier import at_equal_kl, rivalries
from rrhf.recipes.study.losses import by_gain, compared, losses
from rrhf.recipes.study.page import write_page
from rrhf.recipes.study.results import Study, export, read_study, take
from rrhf.recipes.study.statistics import holm
from rrhf.recipes.study.verdicts import FAILS, HOLDS, MISSING, OPEN

SEEDS, PROMPTS = 6, 50
LEVEL = {  # an arm's mean proxy reward; its gold reward is half as far from 0.5
    "start": 0.5, "RRHF-BP": 0.8, "RRHF-DP": 0.8, "SFT": 0.6, "PPO": 0.7, "RRHF-DP+no-rank": 0.85,
    "IP-1": 0.7, "IP-2": 0.7, "best-of-4": 0.75, "RRHF-DP+watched": 0.8, "DPO": 0.9, "loss:listmle": 0.85,
}  # fmt: skip


TUNED = ("PPO", "RRHF-DP", "RRHF-BP", "DPO", "loss:listmle")  # run at three rates, the others at one
OTHERWISE = [  # arm, seed, rate: those that do not come out best; of the first three from three seeds
    (name, seed, rate)
    for name in TUNED
    for seed in (0, 1, 2)
    if seed == 0 or name in TUNED[:3]
    for rate in (1e-4, 3e-4)
]


def line(name: str, seed: int, rate: float | None = 1e-3, level: float | None = None) -> dict[str, Any]:
    level = LEVEL[name] if level is None else level
    generator = np.random.default_rng([seed, *name.encode()])
    prompts = np.random.default_rng(7).normal(0, 0.1, PROMPTS)
    proxy = level + prompts + generator.normal(0, 0.05, PROMPTS) * (1 if name == "start" else 0.5)
    gold = 0.5 + (level - 0.5) / 2 + prompts + generator.normal(0, 0.05, PROMPTS)
    has_rate, lost = name not in ("start", "best-of-4"), 0.3 if name == "PPO" else 0.1
    history = [{"step": step, "loss": 2 - step / 10, "eval_reward_mean": 0.5 + step / 40} for step in range(0, 20, 4)]
    curve = [{"n": n, "mean": value} for n, value in ((1, 0.5), (2, 0.6), (3, 0.7), (4, 0.75))]
    gain = {"rho": {"mean": 0.5}, "pi": {"mean": 0.7}, "gain": {"mean": 0.2 + seed / 1000}}
    return {
        "task": "imdb", "scale": "micro", "arm": name, "seed": seed, "learning_rate": rate if has_rate else None,
        "rate_reward": level - lost if rate != 1e-3 else level, "n": PROMPTS, "asked": [], "commit": "abc",
        "proxy": {"mean": float(proxy.mean()), "std": float(proxy.std()), "start_std": 0.125,
                  "gain": {"mean": level - 0.5}},
        "gold": {"mean": float(gold.mean()), "gain": {"mean": (level - 0.5) / 2}},
        "prompts": {"proxy": proxy.tolist(), "gold": gold.tolist()},
        "kl": {"mean": 3.0}, "perplexity": 20.0, "length_mean": 30.0, "distinct_2": 0.8,
        "looping": 0.9 if name == "loss:listmle" else 0.0, "history": history if "watched" in name else [],
        "training_scores": {"mean": 0.5, "max": 0.8} if has_rate else None,
        "seconds": {"sample": 1.0, "train": 5.0 + 2 * (name == "PPO"), "evaluate": 60.0 - 50 * (name == "PPO")},
        "accuracy": gain if has_rate else None,
        "models_resident": 3 if name == "PPO" else 1, "peak_memory_bytes": 2e9 if name == "PPO" else 1e9,
        "best_of_n": {"score": curve} if name == "best-of-4" else None, "config": {"model": "/somewhere/out/model"},
    }  # fmt: skip


def lines() -> list[dict[str, Any]]:
    every = [line(name, seed) for name in LEVEL for seed in range(SEEDS)]
    return every + [line(*run) for run in OTHERWISE]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("results") / "results" / "imdb-micro.jsonl"
    place.parent.mkdir()
    export(lines(), Path("/somewhere/out"), place)
    return place


def test_verdicts_are_those_that_the_truth_demands(file: Path) -> None:
    found = {claim.letter: finding for claim, finding in judged(read_study(file))}
    assert len(found) == len(CLAIMS) == 19
    wanted = {"a": HOLDS, "b": HOLDS, "c": HOLDS, "d": FAILS, "f": HOLDS, "i": HOLDS, "j": HOLDS, "k": HOLDS,
              "l": FAILS, "q": HOLDS, "r": HOLDS, "h": MISSING, "o": MISSING, "s": MISSING, "e": MISSING}  # fmt: skip
    assert {letter: found[letter].verdict for letter in wanted} == wanted
    assert found["p"].verdict in ("RRHF-DP ≈ RRHF-BP", "RRHF-BP ≈ RRHF-DP")  # which differ by noise alone
    assert [test.verdict for test in found["p"].tests] == [OPEN]
    assert "6 s to sample, score and train; PPO: 3 models, 2.00 GB, 8 s" in found["r"].said  # not to measure
    assert found["l"].said.count("not by n = 4") == 2
    bare = read_study(file).difference("RRHF-BP", "PPO", "proxy")
    assert bare is not None and found["b"].tests[0].estimate.mean == pytest.approx(bare.mean + 0.02)  # is allowed
    gain = found["a"].tests[0].estimate
    assert gain.mean == pytest.approx(0.3, abs=0.02) and gain.low < 0.3 < gain.high and gain.seeds == SEEDS


def test_all_tests_of_a_section_are_adjusted_together(file: Path) -> None:
    tests = [test for _, finding in judged(read_study(file)) for test in finding.tests]
    assert len(tests) > 10 and [test.adjusted for test in tests] == holm([test.estimate.p for test in tests])
    runs = [line("start", seed) for seed in (1000, 1001, 1002)]
    for seed in (1000, 1001, 1002):
        runs += frontier("DPO", {4.0: 0.2, 16.0: 0.3 + seed / 1e5}, seed) + frontier(
            "SimPO", {4.0: 0.0, 9.0: 0.3}, seed
        )
    found = rivalries(Study(runs, file))
    assert len(found) > 1 and [test.adjusted for test in found] == holm([test.estimate.p for test in found])


def test_the_seeds_that_ran_every_rate_choose_it_together() -> None:
    """Of three seeds one has 1e-3 on top by much less than the two others have 1e-4."""
    three = [{**line("PPO", seed, rate), "rate_reward": reward} for seed, rate, reward in (
        (0, 1e-4, 0.50), (0, 1e-3, 0.55), (1, 1e-4, 0.7), (1, 1e-3, 0.6), (2, 1e-4, 0.7), (2, 1e-3, 0.6),
    )]  # fmt: skip
    study = Study([*three, line("PPO", 3, 1e-3), line("RRHF-DP", 0), line("start", 0)], Path())
    assert study.chosen("PPO") == 1e-4 and set(study.seeds("PPO")) == {0, 1, 2}
    assert (study.shown_rate("PPO"), study.shown_rate("RRHF-DP"), study.shown_rate("start")) == (
        "0.0001↓ (3)", "0.001", "–"
    )  # fmt: skip
    alone = Study([one for one in three if one["seed"] == 0], Path())
    assert alone.chosen("PPO") == 1e-3 and alone.shown_rate("PPO") == "0.001↑ (1)"
    between = [{**line("PPO", 0, rate), "rate_reward": reward} for rate, reward in ((1, 0.1), (2, 0.3), (3, 0.2))]
    assert Study(between, Path()).shown_rate("PPO") == "2 (1)"


def test_what_ppo_takes_is_that_with_the_penalty_and_memory_the_least_of_the_seeds() -> None:
    theirs = [{**line("PPO", seed), "arm": "PPO+KL", "models_resident": 2} for seed in range(3)]
    ours = [line("RRHF-DP", seed) for seed in range(3)]
    ours[2]["peak_memory_bytes"] = 9e9  # of a process that held more
    runs = [*ours, *(line("PPO", seed) for seed in range(3)), *theirs]
    found = {claim.letter: finding for claim, finding in judged(Study(runs, Path()))}["r"]
    assert found.verdict == HOLDS and "RRHF-DP: 1 models, 1.00 GB" in found.said and "PPO+KL: 2 models" in found.said


@pytest.mark.parametrize(("apart", "verdict"), [(0.0, HOLDS), (0.2, FAILS), (0.008, OPEN)])
def test_starts_end_alike_within_a_twentieth_of_the_spread_of_rho(tmp_path: Path, apart: float, verdict: str) -> None:
    runs = [line("RRHF-P", seed, level=0.6) for seed in range(SEEDS)]
    after = [{**run, "arm": "RRHF-P-after-SFT"} for run in runs]
    for run in after:
        run["prompts"] = {reward: (np.array(values) + apart).tolist() for reward, values in run["prompts"].items()}
    runs = [{**run, "task": "hh"} for run in runs + after]
    noise = np.random.default_rng(0).normal(0, 0.02, (SEEDS, PROMPTS))
    for run, added in zip(runs[SEEDS:], noise if apart == 0.008 else 0 * noise, strict=True):
        run["prompts"]["proxy"] = (np.array(run["prompts"]["proxy"]) + added).tolist()
    (found,) = [finding for claim, finding in judged(Study(runs, tmp_path)) if claim.letter == "o"]
    assert found.verdict == verdict and "within ±0.006" in found.said
    few = [run for run in runs if run["seed"] < 2]  # of which no verdict comes, by a claim's own rule neither
    (found,) = [finding for claim, finding in judged(Study(few, tmp_path)) if claim.letter == "o"]
    assert found.verdict == OPEN


@pytest.mark.parametrize(("gold", "distinct", "verdict"), [(-0.1, 0.2, HOLDS), (0.1, 0.2, FAILS), (-0.1, 0.9, FAILS)])
def test_hacking_has_its_price_in_gold_and_in_the_texts(
    tmp_path: Path, gold: float, distinct: float, verdict: str
) -> None:
    """On IMDB texts are all alike, as in the paper; on HH, where no gold reward is, they are improbable."""
    runs = [line(name, seed, level=level) for name, level in (("start", 0.5), ("OP", 0.9), ("OP+KL", 0.7))
            for seed in range(SEEDS)]  # fmt: skip
    for run in runs:
        if run["arm"] == "OP":
            kept = next(one for one in runs if (one["arm"], one["seed"]) == ("OP+KL", run["seed"]))["prompts"]["gold"]
            run["prompts"]["gold"] = (np.array(kept) + gold).tolist()
            run["distinct_2"], run["perplexity"] = distinct + run["seed"] / 1000, 60 * distinct + run["seed"] / 10
    (found,) = [finding for claim, finding in judged(Study(runs, tmp_path)) if claim.letter == "h"]
    assert found.verdict == verdict and len(found.tests) == 4
    without = [{**run, "task": "hh", "prompts": {"proxy": run["prompts"]["proxy"]}} for run in runs]
    (found,) = [finding for claim, finding in judged(Study(without, tmp_path)) if claim.letter == "h"]
    assert found.verdict == (HOLDS if distinct > 0.5 else FAILS) and len(found.tests) == 1


@pytest.mark.parametrize(("rise", "verdict"), [(0.2, HOLDS), (0.02, FAILS), (0.08, OPEN)])
def test_an_accuracy_that_rises_a_little_does_not_rise_far(tmp_path: Path, rise: float, verdict: str) -> None:
    runs = [line("RRHF-DP", seed) for seed in range(SEEDS)]
    for run in runs:
        gain = {"mean": rise + (run["seed"] - 2.5) / 1000}
        run["accuracy"] = {"rho": {"mean": 0.5}, "pi": {"mean": 0.5 + rise}, "gain": gain}
    (found,) = [finding for claim, finding in judged(Study(runs, tmp_path)) if claim.letter == "i"]
    assert found.verdict == verdict and f"RRHF-DP 0.500 → {0.5 + rise:.3f}, {rise:+.3f} [" in found.said


def test_rewards_follow_the_samples_of_rho_and_those_of_pi_are_told_beside(tmp_path: Path) -> None:
    """IP-3 and OP, whose samples are their own, would turn the order of the four others round."""
    arms = {"RRHF-B": (0.50, 0.6), "RRHF-BP": (0.52, 0.62), "RRHF-SP": (0.54, 0.64), "RRHF-DP": (0.56, 0.7),
            "IP-3": (0.9, 0.1), "OP": (0.95, 0.05)}  # fmt: skip
    runs = [{**line(name, seed, level=level), "training_scores": {"mean": mean, "max": mean + 0.2}}
            for name, (mean, level) in arms.items() for seed in range(SEEDS)]  # fmt: skip
    (found,) = [finding for claim, finding in judged(Study(runs, tmp_path)) if claim.letter == "e"]
    assert found.verdict == HOLDS and "over 4 arms" in found.said and "mean +1.00" in found.said
    assert "OP: mean 0.950, maximum 1.150, π 0.0" in found.said


def test_rewards_follow_nothing_where_all_samples_are_as_good(tmp_path: Path) -> None:
    """As where the best of every query has the highest reward there is: no order of the arms is one of the maxima."""
    arms = {"RRHF-B": (0.50, 0.6), "RRHF-BP": (0.52, 0.62), "RRHF-SP": (0.54, 0.64), "RRHF-DP": (0.56, 0.7)}
    best = dict(zip(arms, ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)) * 2))  # their sums: 0.6, but for rounding
    runs = [{**line(name, seed, level=level), "training_scores": {"mean": mean, "max": best[name][seed]}}
            for name, (mean, level) in arms.items() for seed in range(3)]  # fmt: skip
    (found,) = [finding for claim, finding in judged(Study(runs, tmp_path)) if claim.letter == "e"]
    assert found.verdict == OPEN and "with their mean +1.00, with their max +0.00" in found.said


def test_an_arm_whose_first_seed_came_to_nothing_has_the_others(tmp_path: Path) -> None:
    runs = [line("start", seed) for seed in range(3)] + [line("PPO", seed) for seed in (1, 2)]
    study = Study([*runs, line("PPO", 1, 1e-4)], tmp_path)
    assert list(study.seeds("PPO")) == [1, 2] and study.shown_rate("PPO") == "0.001↑ (1)"


def test_two_files_of_one_name_are_refused_whose_figures_would_be_the_same(file: Path, tmp_path: Path) -> None:
    other = Study(read_study(file).lines, tmp_path / "elsewhere" / file.name)
    with pytest.raises(UserError, match="two files of the name imdb-micro"):
        write_page([read_study(file), other], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_rival_that_was_not_tuned_resolves_nothing(tmp_path: Path) -> None:
    """RRHF is ahead of PPO by 0.1 in both; but where PPO ran at one rate, that one was not chosen for it."""
    one = [line(name, seed) for name in ("start", "RRHF-DP", "PPO") for seed in range(SEEDS)]
    both = [*one, line("PPO", 0, 1e-4)]
    for runs, verdict in ((one, OPEN), (both, HOLDS)):
        found = {claim.letter: finding for claim, finding in judged(Study(runs, tmp_path))}["b"]
        assert found.verdict == verdict and [test.verdict for test in found.tests] == [HOLDS]
        assert ("PPO was run at one rate" in found.said) == (verdict == OPEN)


def test_sensitivity_is_held_against_ppo_with_its_penalty_too(tmp_path: Path) -> None:
    """PPO alone has 0.3 between its best and its worst rate, with the penalty no more than RRHF-DP."""
    runs = [line(name, seed, rate) for name in ("PPO", "RRHF-DP") for seed in range(SEEDS) for rate in (1e-4, 1e-3)]
    for run in runs:
        run["rate_reward"] += (run["seed"] - 2.5) / 1000 * (run["learning_rate"] == 1e-3) * (run["arm"] == "PPO")
    calm = [{**run, "arm": "PPO+KL"} for run in runs if run["arm"] == "RRHF-DP"]
    for run in calm:
        run["rate_reward"] += (run["seed"] - 2.5) / 1000 * (run["learning_rate"] == 1e-3)
    found = {claim.letter: one for claim, one in judged(Study([*runs, *calm], tmp_path))}["q"]
    assert [test.verdict for test in found.tests] == [HOLDS, OPEN] and found.verdict == OPEN
    assert "RRHF-DP 0.100 (33% of its gain)" in found.said


def test_wombat_is_held_against_sft(tmp_path: Path) -> None:
    runs = [line("RRHF-DP", seed, level=0.7) | {"arm": "Wombat", "task": "wombat"} for seed in range(SEEDS)]
    runs += [line("SFT", seed) | {"task": "wombat"} for seed in range(SEEDS)]
    (found,) = [finding for claim, finding in judged(Study(runs, tmp_path)) if claim.letter == "s"]
    assert found.verdict == HOLDS and found.tests[0].what == "Wombat − SFT, proxy"


def test_what_the_ranking_loss_is_of_the_loss_is_told(tmp_path: Path) -> None:
    notes = [(4, 70.0, 66.5, 0.5), (8, 60.0, 50.0, 0.6), (12, 40.0, 30.0, 0.7)]
    history = [dict(zip(("step", "loss", "sft_loss", "rank_accuracy"), note)) for note in notes]
    runs = [line("RRHF-DP", 0) | {"history": [*history, {"step": 13, "eval_reward_mean": 0.5}]}, line("RRHF-BP", 0)]
    assert balance(Study(runs, tmp_path), ["RRHF-DP", "RRHF-BP"]) == (  # the other has no notes
        "while training, RRHF-DP: L_rank is 5% of the loss at first, 25% at last, pairs in order 50% → 70%"
    )
    assert balance(Study(runs[1:], tmp_path), ["RRHF-BP"]) == ""


def test_of_two_arms_one_that_fails_is_told(file: Path) -> None:
    """π's mean less that of the maxima of its samples, 0.8: RRHF-DP comes near, RRHF-BP does not."""
    lines = [{**one, "training_scores": {"mean": 0.5, "max": 0.95}} if one["arm"] == "RRHF-BP" else one
             for one in read_study(file).lines]  # fmt: skip
    found = {claim.letter: finding for claim, finding in judged(Study(lines, file))}
    assert found["f"].verdict == FAILS and "RRHF-DP" in found["f"].said


def test_a_loss_stands_beside_the_reward_of_the_steps_that_it_is_the_mean_of() -> None:
    losses = {2: 9.0, 4: 7.0, 8: 4.0, 16: 1.0}  # noted at steps 2 and 4 since the first look, and once until the third
    assert over_the_same_steps(losses, {0: 0.5, 4: 0.7, 8: 0.8, 12: 0.9}) == [
        (8.0, pytest.approx(0.6)), (4.0, pytest.approx(0.75)),
    ]  # fmt: skip


def test_loss_and_reward_are_held_together_at_every_rate(tmp_path: Path) -> None:
    falling = [{"step": step, "loss": 2 - step / 10, "eval_reward_mean": 0.5 - step / 40} for step in range(0, 20, 4)]
    runs = [line("RRHF-DP+watched", seed) for seed in range(SEEDS)]
    slow = [line("RRHF-DP+watched", seed, 1e-4) | {"history": falling, "rate_reward": 0.1} for seed in range(SEEDS)]
    for run, up in zip([*runs, *slow], [0, 0.01, 0.02, 0, 0.01, 0.02] * 2, strict=True):  # no two trainings are alike
        history = [dict(entry) for entry in run["history"]]
        history[1]["eval_reward_mean"] += up
        run["history"] = history
    export([*runs, *slow], tmp_path, tmp_path / "kept.jsonl")  # histories of watched runs stay, whatever their rate
    lost = line("RRHF-DP+watched", 0, 3e-4, 0.2)
    del lost["history"]
    lines = [*read_study(tmp_path / "kept.jsonl").lines, lost]
    (found,) = [one for claim, one in judged(Study(lines, tmp_path)) if claim.letter == "j"]
    assert [test.what.rpartition(" ")[2] for test in found.tests] == ["0.0001", "0.001"]
    assert [test.verdict for test in found.tests] == [FAILS, HOLDS] and found.verdict == FAILS


def test_two_seeds_resolve_nothing(file: Path) -> None:
    study = read_study(file)
    without = Study([one for one in study.lines if one["arm"] != "IP-1"], file)  # RRHF-DP is the same run
    (rounds,) = [finding for claim, finding in judged(without) if claim.letter == "g"]
    assert [test.what for test in rounds.tests] == ["IP-2 − RRHF-DP, proxy", "IP-2 − RRHF-DP, gold"]
    few = Study([one for one in study.lines if one["seed"] < 2], file)
    verdicts = {finding.verdict for _, finding in judged(few)}
    assert not verdicts & {HOLDS, FAILS} and OPEN in verdicts


def frontier(name: str, points: dict[float, float], seed: int) -> list[dict[str, Any]]:
    """Runs of an arm at rates that take it so far from ρ (KL → its gain in gold)."""
    start = np.array(line("start", seed)["prompts"]["gold"])
    found = []
    for rate, (kl, up) in zip((1e-4, 3e-4, 1e-3), points.items()):
        rewards = {"proxy": start.tolist(), "gold": (start + up).tolist()}
        found.append({**line(name, seed, rate, 0.5), "kl": {"mean": kl}, "prompts": rewards})
    return found


def test_gains_at_equal_kl_lie_on_the_line_between_two_runs_of_a_seed(tmp_path: Path) -> None:
    runs = [line("start", seed) for seed in (0, 1, 2)]
    for seed in (0, 1):
        runs += frontier("RRHF-DP", {4.0: 0.1, 16.0: 0.2, 36.0: 0.1}, seed) + frontier(
            "SFT", {4.0: 0.0, 25.0: 0.2}, seed
        )
    runs += frontier("PPO", {2.0: 0.0, 18.1: 0.2}, 0) + frontier("DPO", {2.0: 0.0, 17.9: 0.2}, 0)
    runs += frontier("RRHF-DP", {1.0: 0.9, 2.0: 0.9}, 2)  # comes nowhere near
    study = Study(runs, tmp_path)
    found = {kl: at_equal_kl(study, "RRHF-DP", kl, "gold") for kl in (2.0, 3.9, 4.0, 9.0, 25.0, 36.0, 37.0)}
    known = {kl: (one.mean, one.seeds) for kl, one in found.items() if one}
    assert known == {2.0: (pytest.approx(0.9), 1), 4.0: (pytest.approx(0.1), 2), 9.0: (pytest.approx(0.15), 2),
                     25.0: (pytest.approx(0.15), 2), 36.0: (pytest.approx(0.1), 2)}  # fmt: skip
    less = at_equal_kl(study, "RRHF-DP", 9.0, "gold", other="SFT")
    assert less is not None and (less.mean, less.seeds) == (pytest.approx(0.15 - 0.2 / 3), 2)
    assert less.low == pytest.approx(less.high)  # no prompt differs from another: paired by prompt
    assert at_equal_kl(study, "RRHF-DP", 2.0, "gold", other="SFT") is None  # no seed has both there
    assert at_equal_kl(study, "PPO", 9.0, "gold") is None and at_equal_kl(study, "DPO", 9.0, "gold")  # 3 times in √KL


def test_what_a_search_found_is_held_against_its_rivals_at_equal_kl(tmp_path: Path) -> None:
    runs = [line("start", seed) for seed in (1000, 1001, 1002)]
    for seed in (1000, 1001, 1002):
        runs += frontier("DPO", {4.0: 0.2, 16.0: 0.3}, seed) + frontier("RRHF-DP", {4.0: 0.1, 25.0: 0.2}, seed)
        runs += frontier("SimPO", {1.0: 0.0, 9.0: 0.3}, seed)
    file = tmp_path / "results" / "imdb-micro-set-aside.jsonl"
    file.parent.mkdir()
    export(runs, tmp_path, file)
    study = read_study(file)
    assert study.set_aside and not Study([line("start", 0)], file).set_aside
    export([line("start", 0)], tmp_path, tmp_path / "both.jsonl")
    with pytest.raises(UserError, match="set aside and others"):
        export(runs, tmp_path, tmp_path / "both.jsonl")
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [line("start", 0), *runs]))
    with pytest.raises(UserError, match="set aside and others"):
        read_study(tmp_path / "both.jsonl")
    found = {test.what: (round(test.estimate.mean, 3), test.verdict) for test in rivalries(study)}
    assert found["DPO − RRHF-DP at KL 10, gold"] == (pytest.approx(0.2 + 0.0581 - 0.1 - 0.0387, abs=1e-3), HOLDS)
    assert found["DPO − SimPO at KL 5, gold"] == (pytest.approx(0.2118 - 0.1854, abs=1e-3), HOLDS)
    assert found["DPO − RRHF-DP at KL 10, proxy"] == (0.0, OPEN)  # no proxy differs
    assert set(found) == {
        f"DPO − {rival} at KL {kl}, {reward}"
        for rival, kls in (("RRHF-DP", (5, 10)), ("SimPO", (5,))) for kl in kls for reward in ("proxy", "gold")
    }  # fmt: skip
    page = tmp_path / "results.md"
    write_page([study], page)
    text = page.read_text()
    assert "confirmed where no search has looked" in text and "| DPO − SimPO at KL 5, gold |" in text
    assert "The other arms against RRHF-DP, SimPO, from" in text  # OP was not run
    assert "first of 6 tests" in text and re.search(r"\| DPO \| – \| [^|]* \(3\) \| [^|]* \(3\) \| – \|", text)
    assert "### The claims" not in text


def test_losses_are_compared_where_they_had_the_same_samples_and_rates(file: Path) -> None:
    study = read_study(file)
    assert set(losses(study, 4)) == {"RRHF-DP", "DPO", "loss:listmle"} and losses(study, 8) == []
    fewer = Study([one for one in study.lines if (one["arm"], one["learning_rate"]) != ("DPO", 1e-4)], file)
    assert set(losses(fewer, 4)) == {"RRHF-DP", "loss:listmle"}
    eight = [{**one, "arm": f"{one['arm']}+diverse-8"} for one in study.lines if one["arm"] in losses(study, 4)]
    both = Study([*study.lines, *eight], file)
    assert set(losses(both, 4)) == set(losses(study, 4))  # other arms' names begin alike
    assert set(losses(both, 8)) == {"RRHF-DP+diverse-8", "DPO+diverse-8", "loss:listmle+diverse-8"}


def test_the_best_loss_is_named_for_each_number_of_samples(file: Path) -> None:
    study = read_study(file)
    eight = [{**one, "arm": f"{one['arm']}+diverse-8"} for one in study.lines
             if one["arm"] in ("RRHF-DP", "DPO", "loss:listmle")]  # fmt: skip
    for one in eight:
        one["distinct_2"] = 0.05 if one["arm"].startswith("DPO") and one["seed"] == 2 else 0.8
    both = Study([*study.lines, *eight], file)
    (found,) = [finding for claim, finding in judged(both) if claim.letter == "m"]
    assert found.verdict == "of 3 losses with 4 samples DPO; of 3 losses with 8 samples DPO+diverse-8"
    alone = both.difference("DPO", "RRHF-DP", "gold")  # its p is of one test, the best is chosen from three
    assert alone is not None and found.tests[1].estimate.p == pytest.approx(2 * alone.p)
    assert [(test.what, test.verdict) for test in found.tests] == [
        ("DPO − loss:listmle, gold", HOLDS), ("DPO − RRHF-DP, gold", HOLDS),
        ("DPO+diverse-8 − loss:listmle+diverse-8, gold", HOLDS), ("DPO+diverse-8 − RRHF-DP+diverse-8, gold", HOLDS),
    ]  # fmt: skip
    easy = [{**line("DPO", seed), "gold": {"gain": {"mean": 0.1}}} for seed in range(SEEDS)]  # ρ too does well
    less = Study([one for one in study.lines if one["arm"] != "DPO"] + easy, file)
    assert by_gain(less, ["DPO", "RRHF-DP"]) == ["RRHF-DP", "DPO"]
    at_4, table_4, at_8, table_8 = compared(both)[2:]
    assert at_4 == "#### 4 samples of ρ a query" and at_8 == "#### 8 samples of ρ a query"
    order = [row.split(" | ")[0].strip("| ") for row in table_8.splitlines()[2:]]
    assert order == ["DPO+diverse-8", "loss:listmle+diverse-8", "RRHF-DP+diverse-8"]
    assert re.search(r"\| DPO\+diverse-8 \| 6 \|.*\| 0 of 8 \| 1 of 8 \| 5 \|", table_8)  # one run has collapsed
    assert re.search(r"\| loss:listmle \| 6 \|.*\| 8 of 8 \| 0 of 8 \| 5 \|", table_4)  # all of them loop
    page = file.parent.parent / "both.md"
    write_page([both], page)
    assert page.read_text().count("an arm a point but for those of 8 samples a query, with its name") == 2 * 2
    assert {f"both/imdb-micro-losses-{k}.svg" for k in (4, 8)} <= set(re.findall(r"\]\((.*svg)\)", page.read_text()))


def test_losses_with_the_cross_entropy_and_without_are_drawn_where_both_ran(file: Path) -> None:
    study = read_study(file)
    assert "cross-entropy" not in [name for name, *_ in figures(study)]  # DPO alone has no other to be held against
    bare = [{**line("RRHF-DP", seed), "arm": "RRHF-DP+no-sft", "gold": {"gain": {"mean": 0.1}}} for seed in (0, 1)]
    (draw,) = [one for name, _, one, _ in figures(Study([*study.lines, *bare], file)) if name == "cross-entropy"]
    figure = Figure()
    draw(figure)
    styles = [line.get_linestyle() for line in figure.axes[0].get_lines()]
    assert [axes.get_title() for axes in figure.axes] == ["gain in proxy reward", "gain in gold reward"]
    assert styles == ["-", "--", "--"]  # RRHF-DP; without: RRHF-DP+no-sft, DPO


def test_a_logarithmic_axis_has_plain_numbers_and_names_do_not_overlap(tmp_path: Path) -> None:
    pictures = {}
    for factor in (1.5, 1000.0):  # between the nearest and the furthest perplexity
        runs = [{**line(name, seed), "perplexity": 10.0 * each, "training_scores": {"mean": 0.5, "max": 0.9}}
                for name, each in (("RRHF-DP", 1.0), ("RRHF-BP", factor)) for seed in (0, 1)]  # fmt: skip
        for name, _, draw, size in figures(Study(runs, tmp_path)):
            draw(figure := Figure(figsize=size))
            figure.draw_without_rendering()
            pictures[name, factor] = figure.axes[0]
    shown = {factor: [each.get_text() for each in pictures["perplexity", factor].get_xticklabels()]
             for factor in (1.5, 1000.0)}  # fmt: skip
    assert {"10", "100", "1,000", "10,000"} <= set(shown[1000.0]) and "20" not in shown[1000.0]
    assert {"10", "12", "14"} <= set(shown[1.5])  # decades would be too few
    assert len(pictures["sources", 1.5].texts) == 1  # both arms lie on one point


def test_a_point_of_the_losses_picture_is_the_mean_over_seeds(file: Path) -> None:
    runs = [
        {**line("DPO", seed), "kl": {"mean": 2.0 + seed}, "gold": {"gain": {"mean": 0.1 * seed}}} for seed in (1, 2)
    ]
    runs.append({**line("DPO", 3), "kl": None, "gold": {"gain": {"mean": 9.0}}})  # judged without KL
    first = Study(runs, file)  # whose first seed ran one rate
    assert mean_point(first, "DPO", 1e-3, "gold") == (pytest.approx(3.5), pytest.approx(0.15))
    near = [{**line("DPO", 1, 3e-4), "kl": {"mean": 1.0}, "gold": {"gain": {"mean": 0.05}}}]
    study = Study([*runs, *near], file)  # seed 2 ran the best rate alone: a line is of the same seeds all along
    assert mean_point(study, "DPO", 1e-3, "gold") == (pytest.approx(3.0), pytest.approx(0.1))
    assert mean_point(study, "DPO", 3e-4, "gold") == (pytest.approx(1.0), pytest.approx(0.05))
    assert mean_point(study, "DPO", 1e-4, "gold") is None


def test_results_without_a_gold_reward_make_a_page(file: Path, tmp_path: Path) -> None:
    """As those of HH are: what needs gold is left out, losses are in the order of the reward that trains."""
    lines = [{**one, "prompts": {"proxy": one["prompts"]["proxy"]}, "asked": ["score.reward=[rm]"]}
             for one in read_study(file).lines]  # fmt: skip
    lines[3]["asked"] = [*lines[3]["asked"], "a.key=1"]
    kept = file.parent / "imdb-micro-no-gold.jsonl"
    export([{**one, "kl": {"mean": 8.0 + 50 * (one["learning_rate"] == 1e-3)}} for one in lines], file, kept)
    page = file.parent.parent / "without.md"
    write_page([read_study(kept)], page)
    text = page.read_text()
    elsewhere = tmp_path / "pages" / "page.md"  # not above its results
    write_page([read_study(kept)], elsewhere)
    (named,) = re.findall(r"lines in `(.*)` by", elsewhere.read_text())
    assert named.startswith("../") and (elsewhere.parent / named).resolve() == kept.resolve()
    assert (
        "## imdb at the scale micro, no-gold" in text
        and f"settings: `score.reward=[rm]`, `a.key=1` (of 1 of {len(lines)} lines)." in text
    )
    equal = text[text.index("### Proxy reward at equal KL") :]
    assert re.search(r"\| DPO \| – \| – \| [^|]* \(1\)", equal) and re.search(r"\| PPO \| – \| – \| [^|]* \(3\)", equal)
    assert "### Proxy reward at equal KL" in text and "proxy less the hinge's" in text
    assert ", gold:" not in text and "RRHF-DP − ρ, proxy" in text and "gain in gold" not in text
    assert (page.parent / "without" / "imdb-micro-no-gold-frontier.svg").exists()


def test_phrases_stand_beside_the_arms_whose_runs_counted_them(file: Path) -> None:
    sorry, sure = ({"phrase": name, "rho": 0.01, "pi": pi} for name, pi in (("i'm sorry", 0.41), ("not sure", 0.81)))
    counted: dict[tuple[str, int], list[dict[str, Any]]] = {
        ("RRHF-DP", 0): [sorry], ("RRHF-DP", 1): [sure, sorry], ("PPO", 0): []
    }  # fmt: skip
    lines = [
        {**one, "phrases": counted[one["arm"], one["seed"]]} if (one["arm"], one["seed"]) in counted else one
        for one in read_study(file).lines
    ]
    kept = file.parent / "imdb-micro-phrases.jsonl"
    export(lines, file, kept)
    page = file.parent.parent / "phrases.md"
    write_page([read_study(kept)], page)
    text = page.read_text()
    assert "| seconds to make it | phrase |" in text and "2 to 4 words that stand in more of π's texts" in text
    cells = {name: re.findall(rf"^\| {name} \|.* \| ([^|]*) \|$", text, re.M)[0] for name in ("RRHF-DP", "PPO", "SFT")}
    assert cells == {"RRHF-DP": "0.60 “i'm sorry”", "PPO": "0.00", "SFT": "–"}
    assert "distinct-2 0.80, phrase 0.60 “i'm sorry”; " in text  # beside the claims
    write_page([read_study(file)], page)
    assert "| phrase |" not in page.read_text()


def test_differences_are_paired_by_seed_and_prompt(file: Path) -> None:
    study = read_study(file)
    paired = study.difference("RRHF-DP", "SFT", "gold")
    assert paired is not None
    assert paired.high - paired.low < 0.03  # prompts alone spread by 0.1, which pairing takes out
    fewer = Study([one for one in study.lines if not (one["arm"] == "SFT" and one["seed"] == 3)], file)
    assert fewer.common("RRHF-DP", "SFT") == [0, 1, 2, 4, 5]
    assert fewer.difference("RRHF-DP", "NLPO", "gold") is None


def test_a_result_that_was_made_in_another_folder_is_exported_without_it(tmp_path: Path) -> None:
    made = line("SFT", 0) | {
        "config": {"model": "/else/where/model", "data": {"source": "/else/where/prompts/q.jsonl"}}
    }
    export([made], tmp_path, tmp_path / "kept.jsonl")
    assert "/else" not in (tmp_path / "kept.jsonl").read_text()
    (kept,) = read_study(tmp_path / "kept.jsonl").lines
    assert kept["config"] == {"model": "./model", "data": {"source": "./prompts/q.jsonl"}}


def test_an_export_has_no_paths_and_replaces_what_was_there(file: Path, tmp_path: Path) -> None:
    kept = [json.loads(text) for text in file.read_text().splitlines()]
    assert {one["config"]["model"] for one in kept} == {"./model"}
    rejected = [one for one in kept if one["learning_rate"] not in (None, 1e-3)]
    assert len(rejected) == len(OTHERWISE) and not any("history" in one for one in rejected)
    assert all("prompts" in one for one in kept) and all("history" in one for one in kept if one not in rejected)
    place = tmp_path / "lines.jsonl"
    named = {**line("PPO", 0), "config": {"model": "out/model", "why": "without", "at": "/somewhere/out/x"}}
    export([named], Path("out"), place)
    assert json.loads(place.read_text())["config"] == {"model": "./model", "why": "without", "at": "/somewhere/out/x"}
    place.unlink()
    beside = {**line("PPO", 0), "config": {"model": "/somewhere/output/rm", "at": "/somewhere/out, /somewhere/out.x"}}
    export([beside], Path("/somewhere/out"), place)  # whose name only begins alike
    assert json.loads(place.read_text())["config"] == {"model": "/somewhere/output/rm", "at": "., /somewhere/out.x"}
    place.unlink()
    export(lines()[:3], tmp_path, place)
    changed = {**lines()[1], "perplexity": 99.0}
    assert export([changed, line("PPO", 0)], tmp_path, place) == 4
    found = [json.loads(text) for text in place.read_text().splitlines()]
    assert [(one["arm"], one["seed"], one["perplexity"]) for one in found] == [
        ("start", 0, 20.0), ("start", 1, 99.0), ("start", 2, 20.0), ("PPO", 0, 20.0)
    ]  # fmt: skip


def test_the_page_names_every_arm_and_its_lines_can_be_run_again(file: Path) -> None:
    page = file.parent.parent / "results.md"
    write_page([read_study(file)], page)
    text = page.read_text()
    for name in LEVEL:
        assert f"| {name} |" in text
    assert re.search(r"\| best-of-4 \| 6 \| – \|.*\| ≤ 3.0 \|", text) and re.search(r"\| SFT \| 6 \|.*\| 3.0 \|", text)
    assert "**(a) RRHF raises the reward over ρ: holds.**" in text and "10 seeds, first of" in text
    for picture in re.findall(r"\]\(([^)]+\.svg)\)", text):
        assert (page.parent / picture).read_text().rstrip().endswith("</svg>")
    assert len(re.findall(r"\.svg\)", text)) == 7
    number = next(i for i, one in enumerate(file.read_text().splitlines(), 1) if json.loads(one)["arm"] == "SFT")
    assert read_result(f"{file}:{number}")["arm"] == "SFT"
    with pytest.raises(UserError, match="no such line"):
        read_result(f"{file}:9999")


def test_results_are_taken_up_again(file: Path, tmp_path: Path) -> None:
    place = Place(tmp_path / "run")
    scale = read_scale("imdb", "micro")
    count = take(file, place, scale)
    assert count == len(place.results()) == len(file.read_text().splitlines())
    study = read_study(file)
    assert all(place.is_done(Item(study.arm("PPO"), seed, 1e-3)) for seed in range(SEEDS))
    with pytest.raises(UserError, match="not of hh"):
        take(file, place, read_scale("hh", "small"))
    with pytest.raises(UserError, match="not set aside: give"):
        take(file, place, read_scale("imdb", "micro", ["reproduce.set_aside=true"]))
    longer, lines_of_it = tmp_path / "long.jsonl", [{**line("SFT", 0), "config": {"train": {"max_steps": 144}}}]
    export(lines_of_it, tmp_path, longer)
    with pytest.raises(UserError, match=r"SFT \(seed 0, rate 0.001\) was made with other settings \(.*was 144, is 36"):
        take(longer, Place(tmp_path / "other"), scale)
    assert not (tmp_path / "other").exists()


def test_what_is_of_another_table_is_not_added_to_an_export(tmp_path: Path) -> None:
    """It would stand there for the lines with the same arm, seed and rate, and no page could be made of the file."""
    place, steps = tmp_path / "lines.jsonl", {"train": {"max_steps": 36}}
    export([{**line("SFT", 0), "config": steps}], tmp_path, place)
    before = place.read_bytes()
    for other, why in (
        ({**line("SFT", 0), "task": "wombat"}, "one task at one scale"),
        ({**line("PPO", 0), "scale": "small"}, "one task at one scale"),
        (line("SFT", 1000), "set aside and others"),
        ({**line("SFT", 0), "config": {"train": {"max_steps": 144}}}, r"settings \(train.max_steps was 36, is 144"),
    ):
        with pytest.raises(UserError, match=why):
            export([other], tmp_path, place)
        assert place.read_bytes() == before
    for broken in ("{", '{"arm": "SFT"}\n'):
        place.write_text(broken)
        with pytest.raises(UserError, match=r"lines\.jsonl"):
            export([line("PPO", 0)], tmp_path, place)
        assert place.read_text() == broken


def test_results_of_another_reward_get_into_no_file_and_no_folder(file: Path, tmp_path: Path) -> None:
    """A reward model that was trained anew scores ρ otherwise; every number of that table would be of two rewards."""
    ours, theirs = ({**line(name, 0), "reward_digests": [digest]} for name, digest in (("SFT", "a"), ("PPO", "b")))
    place = tmp_path / "lines.jsonl"
    export([ours], tmp_path, place)
    before = place.read_bytes()
    with pytest.raises(UserError, match=r"lines.jsonl: .* SFT \(seed 0.* and PPO \(seed 0.* a reward model's weights"):
        export([theirs], tmp_path, place)
    assert place.read_bytes() == before
    folder = Place(tmp_path / "run")
    folder.write_result(Item(read_study(file).arm("PPO"), 0, 1e-3), theirs)
    with pytest.raises(UserError, match="cannot be compared"):
        take(place, folder, read_scale("imdb", "micro"))
    assert len(folder.results()) == 1
    place.write_text(before.decode() + json.dumps(theirs) + "\n")
    with pytest.raises(UserError, match="cannot be compared"):
        read_study(place)


def test_exports_into_one_file_at_once_lose_nothing(tmp_path: Path) -> None:
    place = tmp_path / "new" / "lines.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: export([line("PPO", seed)], tmp_path, place), range(24)))
    assert [each["seed"] for each in read_study(place).lines] == list(range(24))
    assert [each.name for each in place.parent.iterdir()] == ["lines.jsonl"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export([line("PPO", 0)], tmp_path, tmp_path / "file" / "lines.jsonl")


@pytest.mark.parametrize(
    ("beside", "named"),
    [(["--learning_rate", "1e-3"], "--learning_rate"), (["--scale", "small"], "--scale"), (["--seeds", "3"], "--seeds"),
     (["--every_rate", "--page"], "--every_rate, --page"), (["model=other"], "section.key=value")],
)  # fmt: skip
def test_a_check_takes_no_settings(file: Path, beside: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    """They would be ignored: an arm is run again as its result says."""
    assert main(["reproduce", "imdb", "--check", f"{file}:1", *beside]) == 2
    assert f"without {named}: leave that out" in capsys.readouterr().err


def test_a_table_and_its_export_at_urls(file: Path, memory: Any) -> None:
    """Results are taken from a URL; the table's folder stands at one; an export is added to what is there."""
    memory.put(str(file), "/in/lines.jsonl")
    memory.pipe("/out/lines.jsonl", "".join(json.dumps(each) + "\n" for each in [line("DPO", 9)]).encode())
    table = ["reproduce", "imdb", "--arms", "PPO,SFT", "--output", "memory://out/table"]
    assert main([*table, "--take", "memory://in/lines.jsonl", "--page"]) == 0
    assert {"/out/table/report.md", "/out/table/report.html"} < set(memory.find("/out/table"))
    count = len(file.read_text().splitlines())
    assert main([*table, "--export", "memory://out/lines.jsonl"]) == 0
    exported = [json.loads(each) for each in memory.cat("/out/lines.jsonl").splitlines()]
    assert len(exported) == count + 1 and ("DPO", 9) in [(each["arm"], each["seed"]) for each in exported]
    assert main(["reproduce", "hh", "--check", "memory://in/lines.jsonl:2"]) == 2  # it is found, and is of imdb


def test_what_is_no_file_of_results_is_refused(tmp_path: Path) -> None:
    for text in ("{", '{"arm": "PPO"}\n', "", '{"task": "imdb", "scale": "micro"}\n', "[1]\n"):
        (tmp_path / "file.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"file\.jsonl"):
            read_study(tmp_path / "file.jsonl")


RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"results/([\w-]+)\.jsonl", (RESULTS.parent / "results.md").read_text())))
)
def test_the_lines_of_the_page_are_of_the_settings_that_are_here(name: str) -> None:
    """Each can be run again (``--check``), and all of a file stand in one table."""
    study, scales = read_study(RESULTS / f"{name}.jsonl"), {}
    for one in study.lines:
        asked = tuple(one["asked"])
        scale = scales[asked] = scales.get(asked) or scale_of(one)
        arm = arm_named(study.task, one["arm"])
        require_settings(one, scale.noted(arm, one["seed"], one["learning_rate"]), name)
