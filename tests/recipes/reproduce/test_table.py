"""The table without any model: every arm's configuration, what is done when, which rate is taken, the page's rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from rrhf.cli import reproduce
from rrhf.common.errors import UserError
from rrhf.common.files import json_lines
from rrhf.losses import RANKING_LOSSES
from rrhf.models.load import ModelSettings
from rrhf.recipes.config import parse_config
from rrhf.recipes.reproduce import check, data, page, run, work
from rrhf.recipes.reproduce.arms import ARMS, NLPO, PPO, TASKS, Arm, arm_named, arms_named
from rrhf.recipes.reproduce.check import compared, read_result, run_again
from rrhf.recipes.reproduce.comparable import require_comparable
from rrhf.recipes.reproduce.item import plan
from rrhf.recipes.reproduce.measure import (
    drawn_from_all,
    evaluation_numbers,
    looping,
    prompt_rewards,
    queries_digest,
    response_tokens,
    sources_of,
    token_counter,
    training_history,
)
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.result import models_resident, reward_digests, steps_of, trained_at
from rrhf.recipes.reproduce.rows import differences, main_table, rate_table, rows_of
from rrhf.recipes.reproduce.scale import VALUES, Scale, read_scale, shipped_scales
from rrhf.recipes.reproduce.work import Table, by_key
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings
from rrhf.training.ppo_settings import PPOConfig
from support import tiny

REWARDS = ["score.reward=[tiny:f]", "evaluate.reward=[tiny:f]"]


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_of_every_scale_has_a_valid_configuration(task: str) -> None:
    first = set()  # parsing takes a while: every arm at one scale, one arm at the others
    for scale_name in [name for of_task, name in shipped_scales() if of_task == task]:
        scale = read_scale(task, scale_name, [*REWARDS, "model=somewhere"])
        names = scale.default_arms if not first else scale.default_arms[-1:]
        first.add(scale_name)
        for arm in arms_named(task, names):
            config = parse_config(scale.configuration(arm, 3, 1e-4), Path("model"))
            assert config.train.learning_rate == 1e-4 and config.train.seed == 3, arm.name
            assert config.train.max_steps * arm.rounds <= scale.steps < config.train.max_steps * arm.rounds + arm.rounds
            if arm.kind in (PPO, NLPO):
                ppo = PPOConfig(**scale.ppo_settings(arm, 3, 1e-4))
                assert ppo.rollouts(1000) * ppo.steps_per_rollout == pytest.approx(scale.steps, rel=0.2), scale_name
                assert (ppo.kl_beta > 0) == arm.kl


def test_models_that_a_training_holds_at_once() -> None:
    scale = read_scale("imdb", "micro", [*REWARDS, "model=somewhere"])
    wanted = {"RRHF-DP": 1, "DPO": 1, "OP": 1, "OP+KL": 2, "RRHF-R": 2, "GRPO": 1}  # offline ρ is read before
    for name, count in wanted.items():
        arm = arm_named("imdb", name)
        assert models_resident(arm, parse_config(scale.configuration(arm, 0, 1e-4), Path("model"))) == count, name


def test_arms_by_name() -> None:
    assert arm_named("imdb", "best-of-16").number == 16
    for name in RANKING_LOSSES:
        arm = arm_named("hh", f"loss:{name}")
        assert arm.config["train"]["ranking_loss"] == name and arm.online == (name in ("grpo", "rloo"))
        assert (arm.config["train"].get("margin", 0) > 0) == (name in ("margin", "constant-margin"))  # 0 is the hinge
    for wrong in ("RRHF-DB", "best-of-1", "best-of-²", "loss:nothing"):
        with pytest.raises(UserError, match="--arms"):
            arm_named("imdb", wrong)
    for task in TASKS:
        names = [arm.name for arm in ARMS[task]]
        assert len(set(names)) == len(names) == len({Item(arm, 0, None).name for arm in ARMS[task]})


A, B = Arm("a", ""), Arm("best-of-2", "", kind="best-of-n", number=2)


def test_every_seed_at_every_rate_where_that_is_asked_for() -> None:
    table = Table([A, B], 2, [1e-4, 1e-3], first=7, every_rate=True)
    wanted = [(A, 7, 1e-4), (A, 7, 1e-3), (B, 7, None), (A, 8, 1e-4), (A, 8, 1e-3), (B, 8, None)]
    assert list(table.items({})) == [Item(*one) for one in wanted]
    done = by_key([result(*one) for one in wanted])
    assert table.is_complete(done) and Table([A, B], 2, [1e-4, 1e-3], first=7).is_complete(done)
    for missing in [(arm.name, seed, rate) for arm, seed, rate in wanted]:
        assert not table.is_complete({key: one for key, one in done.items() if key != missing})


def result(arm: Arm, seed: int, rate: float | None, reward: float = 0.0) -> Mapping[str, Any]:
    gain = {"mean": reward, "low": reward - 0.1, "high": reward + 0.1}
    return {
        "arm": arm.name, "seed": seed, "learning_rate": rate, "rate_reward": reward, "kl": {"mean": 1.0, "n": 0},
        "proxy": {"start": 0.5, "start_std": 0.2, "mean": 0.5 + reward, "gain": gain},
        "perplexity": 9.0, "length_mean": 5.0,
        "distinct_2": 0.5, "n": 10, "seconds": {"train": 2.0}, "steps": 4, "samples": 8 if arm is A else 9,
        "load": 0.5, "commit": "c", "models_resident": 1, "peak_memory_bytes": 1, "tokens_sampled": 1,
        "tokens_trained": 1,
    }  # fmt: skip


def test_later_seeds_wait_for_the_rate_which_is_the_best_and_of_equals_the_lowest() -> None:
    table = Table([A, B], 2, [1e-4, 1e-3, 1e-2])

    def open_items(*results: Mapping[str, Any]) -> list[str]:
        found = by_key(results)
        return [item.name for item in table.items(found) if (item.arm.name, item.seed, item.rate) not in found]

    assert open_items() == [
        "a-seed-0-rate-0.0001", "a-seed-0-rate-0.001", "a-seed-0-rate-0.01", "best-of-2-seed-0", "best-of-2-seed-1"
    ]  # fmt: skip
    first = [result(A, 0, 1e-2, 0.3), result(A, 0, 1e-4, 0.2), result(B, 0, None), result(B, 1, None)]
    assert open_items(*first) == ["a-seed-0-rate-0.001"]
    assert open_items(*first, result(A, 0, 1e-3, 0.3)) == ["a-seed-1-rate-0.001"]
    assert not table.is_complete(by_key(first))
    everything = by_key([*first, result(A, 0, 1e-3, 0.3), result(A, 1, 1e-3, 0.1)])
    assert table.is_complete(everything) and not list(open_items(*everything.values()))

    rows = rows_of(table, everything)
    header, lines = main_table(rows)
    assert lines[0][:3] == ["a", "2", "0.700 ± 0.141"] and lines[1][header.index("KL to ρ")] == "≤ 1.00 ± 0.00"
    assert rate_table(table, everything)[1] == [["a", "1", "0.200", "[0.300]", "0.300"]]
    assert differences(rows_of(Table([A, Arm("c", "")], 1, [1e-3]), by_key(
        [result(A, 0, 1e-3), {**result(Arm("c", ""), 0, 1e-3), "samples": 24}]
    ))) == ["Arms differ in sampled responses: 8: a; 24: c."]  # fmt: skip


def test_the_rate_is_the_best_of_the_mean_over_the_seeds_that_ran_them_all() -> None:
    table = Table([A], 4, [1e-4, 1e-3], rate_seeds=2)
    names = ["a-seed-0-rate-0.0001", "a-seed-0-rate-0.001", "a-seed-1-rate-0.0001", "a-seed-1-rate-0.001"]
    assert [item.name for item in table.items({})] == names  # the two that choose; the others wait
    one = [result(A, 0, 1e-4, 0.5), result(A, 0, 1e-3, 0.4)]
    assert (
        table.chosen(A, by_key(one)) == (False, None) and Table([A], 1, [1e-4, 1e-3]).chosen(A, by_key(one))[1] == 1e-4
    )
    two = by_key([*one, result(A, 1, 1e-4, 0.1), result(A, 1, 1e-3, 0.3)])
    assert table.chosen(A, two) == (True, 1e-3)  # which the first seed alone would not have taken
    assert [item.name for item in table.items(two)][4:] == ["a-seed-2-rate-0.001", "a-seed-3-rate-0.001"]
    assert rate_table(table, two)[1] == [["a", "2", "0.300", "[0.350]"]]
    lone = {**two, **by_key([result(A, 2, 1e-3, -9.0)])}  # at one rate alone: says nothing of which is better
    assert table.chosen(A, lone) == (True, 1e-3)
    third = {**lone, **by_key([result(A, 2, 1e-4, 0.0)])}
    assert table.chosen(A, third) == (True, 1e-4)


def test_samples_of_whole_policies_are_cut_at_no_scale() -> None:
    """Scales draw from the 50 likeliest tokens where the paper does; what is named after the whole of π must not."""
    kept = {"RRHF-SP": 0.8, "GRPO": 1.0, "RLOO": 1.0, "RAFT": 1.0}
    for task, scale_name in shipped_scales():
        scale = read_scale(task, scale_name, [*REWARDS, "model=somewhere"])
        for name in kept.keys() & {arm.name for arm in ARMS[task]}:
            config = parse_config(scale.configuration(arm_named(task, name), 0, 1e-4), Path("model"))
            sampling = config.sample
            assert sampling is not None and sampling.policy == "top-p" and sampling.tokens_kept is None, (task, name)
            assert (sampling.top_p, sampling.temperature) == (1.0, kept[name])
            assert (config.train.resample_steps == 1) == (name in ("GRPO", "RLOO"))  # every step on fresh samples


def test_ppo_reads_queries_as_short_as_the_other_arms_and_says_which_steps_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of HH's queries the training sees the last 112 tokens; and 7 steps are rounded up to rollouts of 2 x 4."""
    model = tiny.write_model(tmp_path / "model")
    scale = read_scale("hh", "small", [*REWARDS, f"model={model}", "data.source=none.jsonl", "train.max_steps=7",
                                    "score.max_requests=9"])  # fmt: skip
    work = plan(Place(tmp_path / "place"), scale, Item(arm_named("hh", "PPO"), 0, 1e-4))
    jobs = []

    def train(job: Any) -> None:
        jobs.append(job)
        raise UserError("enough")

    monkeypatch.setattr(run, "train_ppo", train)
    with pytest.raises(UserError, match="enough"):
        run.KINDS[PPO](work)
    assert jobs[0].text.max_query_length == work.config.train.max_query_length == 112
    assert jobs[0].remote.max_requests == 9
    took = jobs[0].config.rollouts(1000) * jobs[0].config.steps_per_rollout
    assert took == 8 and steps_of(work.item.arm, scale, {"steps": took}) == 8
    assert steps_of(arm_named("hh", "RRHF-DP"), scale, {}) == 7 and steps_of(arm_named("hh", "IP-3"), scale, {}) == 6
    assert steps_of(arm_named("hh", "RRHF-P-after-SFT"), scale, {}) == 14
    assert steps_of(arm_named("hh", "start"), scale, {}) == 0


def test_a_result_is_checked_against_its_interval(tmp_path: Path) -> None:
    before = result(A, 0, 1e-3, 0.3)
    within, sentence = compared(before, result(A, 0, 1e-3, 0.35))
    assert within and sentence == "a, seed 0: reproduced: gain, proxy +0.350 is within [0.200, 0.400]"
    within, sentence = compared(before, result(A, 0, 1e-3, 0.45))
    assert not within and "not reproduced" in sentence and "outside" in sentence
    rho = {"arm": "start", "seed": 0, "proxy": {"mean": 0.5, "gain": {"mean": 0.0, "low": 0.0, "high": 0.0}},
           "prompts": {"proxy": [0.4, 0.5, 0.6] * 20}}  # fmt: skip
    for mean, inside in ((0.51, True), (0.6, False)):  # whose gain is 0 by definition
        within, sentence = compared(rho, {**rho, "proxy": {**rho["proxy"], "mean": mean}})
        assert (
            within == inside and f"reproduced: reward, proxy +{mean:.3f} is {'within' if inside else 'out'}" in sentence
        )
    other = {**result(A, 0, 1e-3, 0.35), "model": "f00"}
    assert compared({**before, "model": "ba7"}, other)[1].endswith(
        "; but the two differ in the weights of ρ (ba7 and f00)"
    )
    (tmp_path / "r.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match="lacks task, scale, asked"):
        read_result(str(tmp_path / "r.json"))
    (tmp_path / "r.jsonl").write_text(json.dumps(before) + "\n")
    with pytest.raises(UserError, match="²"):
        read_result(f"{tmp_path}/r.jsonl:²")


def judged(seed: int, start: float, **more: Any) -> Mapping[str, Any]:
    whole = result(A, seed, 1e-3)
    return {**whole, "n": 25, "held_out_samples": 4, "proxy": {**whole["proxy"], "start": start}, **more}


def of_steps(seed: int, steps: int) -> Mapping[str, Any]:
    return judged(seed, 0.5, config={"seed": seed, "train": {"max_steps": steps, "save_steps": steps}})


def test_results_of_another_model_or_reward_are_refused() -> None:
    require_comparable([judged(0, 0.5), judged(1, 0.9), judged(0, 0.5 + 0.07)], "there")  # 100 texts: ± 0.08
    require_comparable(
        [judged(0, 0.5, model="a", reward_digests=["", ""]), judged(0, 0.5), judged(1, 0.5, model="a")], ""
    )
    older = {**judged(0, 0.5), "proxy": {"start": 0.5}}  # noted no deviation
    require_comparable([older, judged(0, 0.9)], "there")
    for pair, why in (
        ((judged(0, 0.5), judged(0, 0.59)), r"the mean proxy reward of ρ's texts \(0.500 and 0.590\)"),
        ((judged(0, 0.5, model="a"), judged(0, 0.5, model="b")), r"the weights of ρ \(a and b\)"),
        ((judged(0, 0.5, model="a"), judged(3, 0.5, model="b")), r"the weights of ρ"),
        ((judged(0, 0.5, reward_digests=["x"]), judged(0, 0.5, reward_digests=["y"])), "a reward model's weights"),
        ((judged(0, 0.5), judged(3, 0.5, reward_digests=["x"])), "a reward model, whose weights only one"),  # older
        ((judged(0, 0.5), judged(3, 0.5, n=30)), r"the number of held-out prompts \(25 and 30\)"),
        ((judged(0, 0.5, held_out="x"), judged(3, 0.5, held_out="y")), r"the held-out prompts \(x and y\)"),
        ((of_steps(0, 36), of_steps(1, 144)), r"settings \(train\.max_steps was 36, is 144\)"),
    ):
        with pytest.raises(UserError, match=rf"there: .* a \(seed 0, rate 0.001\) and a \(.* differ in {why}"):
            require_comparable(pair, "there")
    with pytest.raises(UserError, match="the weights of ρ"):  # the first of all did not note them
        require_comparable([judged(1, 0.1), judged(0, 0.5, model="a"), judged(3, 0.5, model="b")], "there")


def test_what_cannot_be_compared_is_not_put_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale, place = read_scale("imdb", "micro", ["model=somewhere"]), Place(tmp_path)
    place.write_result(Item(A, 0, 1e-3), judged(0, 0.5))
    monkeypatch.setattr(work, "plan", lambda *job: None)
    monkeypatch.setattr(work, "carry", lambda job: judged(0, 0.7))
    with pytest.raises(UserError, match="cannot be compared"):
        work.work_through(place, scale, Table([B], 1, [1e-3]))
    assert len(place.results()) == 1


def test_results_of_other_settings_are_not_taken_for_those_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of 36 steps is no table of 144, and what was run again of one result is no answer for another."""
    arms, place, micro = arms_named("imdb", ["start", "RRHF-DP"]), Place(tmp_path), ("imdb", "micro")
    scale = read_scale(*micro, ["model=m"])
    for arm, rate in zip(arms, (None, 1e-3), strict=True):
        made = judged(0, 0.5, arm=arm.name, learning_rate=rate, config=scale.noted(arm, 0, rate))
        place.write_result(Item(arm, 0, rate), made)
    table, longer = Table(arms, 1, [1e-3]), ["model=m", "train.max_steps=144"]
    work.check(place, scale, table)
    work.check(place, read_scale(*micro, ["model=n", "evaluate.batch_size=7", "train.save_steps=9"]), table)
    work.check(place, read_scale(*micro, longer), Table(arms[:1], 1, [1e-3]))  # ρ itself takes no steps
    other = r"RRHF-DP \(seed 0, rate 0\.001\) was made with other settings \(train\.max_steps was 36, is 144\)"
    with pytest.raises(UserError, match=other):
        work.check(place, read_scale(*micro, longer), table)

    monkeypatch.setattr(check, "prepare", lambda place, scale: scale)
    monkeypatch.setattr(check, "carry", lambda work: pytest.fail("it has ended"))
    before = {**made, "task": "imdb", "scale": "micro", "asked": longer}
    with pytest.raises(UserError, match=other):
        run_again(place, before)
    with pytest.raises(UserError, match=r"holds what the code of c came to, and this is .*another --output"):
        run_again(place, {**before, "asked": ["model=m"]})
    monkeypatch.setattr(check, "commit", lambda: "c")
    assert run_again(place, {**before, "asked": ["model=m"]})[0]


def test_held_out_prompts_are_told_by_their_queries(tmp_path: Path) -> None:
    """Differences are paired by them: others, or the same in another order, are not those; ids and copies are free."""

    def digest(name: str, queries: list[str], samples: int = 1) -> str:
        rows = [{"id": f"{name} {i}", "query": query} for i, query in enumerate(queries)]
        return queries_digest(tiny.write_rows(tmp_path / f"{name}.jsonl", rows), samples)

    first = digest("first", ["a", "b"])
    assert first == digest("copies", ["a", "a", "b", "b"], 2) and len(first) == 16
    assert first not in (digest("turned", ["b", "a"]), digest("others", ["a", "c"]))


def test_a_model_is_told_by_its_weights_and_a_function_by_nothing(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "rm")

    def digests() -> list[str]:
        scale = read_scale("hh", "small", ["score.reward=[tiny:f]", f"evaluate.reward=[tiny:f,{model}]"])
        return reward_digests(parse_config(scale.configuration(arm_named("hh", "SFT"), 0, 1e-4), tmp_path))

    of_function, of_model = digests()
    assert of_function == "" and len(of_model) == 16
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert digests()[1] not in ("", of_model)


def test_which_texts_are_of_the_whole_policy() -> None:
    assert drawn_from_all(SamplingSettings(policy="top-p", top_p=1.0))
    for other in ({"policy": "top-k", "top_k": 50}, {"policy": "top-p", "temperature": 0.8}, {"policy": "greedy"}):
        assert not drawn_from_all(SamplingSettings(**other))


def test_responses_that_the_data_bring_are_not_sampled_whatever_their_source_is_called(tmp_path: Path) -> None:
    """Those of other systems, as Wombat's, and of a file that names none were counted as samples."""
    own = {"query": "q", "responses": ["ab", "x"], "sources": ["system/gpt|provided/1", "provided/0"]}
    brought = sources_of(tiny.write_rows(tmp_path / "queries.jsonl", [own]))
    assert brought == {"system/gpt", "provided"}
    tags = ["system/gpt|top-p/2", "top-p/0", "top-p/1", "provided/3"]
    row = {"query": "q", "responses": ["ab", "c", "def", "g"], "sources": tags}
    found = response_tokens(tiny.write_rows(tmp_path / "r.jsonl", [row]), lambda texts: sum(map(len, texts)), brought)
    assert found == {"responses": 4, "tokens": 7, "sampled": 2, "sampled_tokens": 4}


def test_tokens_are_counted_by_an_adapters_own_tokenizer(tmp_path: Path) -> None:
    base, folder = tiny.write_model(tmp_path / "base"), tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = token_counter(ModelSettings(str(base)))(["river bank"])
    tokenizer.add_tokens(["river bank"])
    tokenizer.save_pretrained(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (folder / "adapter_model.safetensors").touch()
    assert token_counter(ModelSettings(str(folder)))(["river bank"]) == 1 < plain


def test_a_history_has_both_losses_and_what_was_watched(tmp_path: Path) -> None:
    notes = {"step": 4, "loss": 3.0, "rank_loss": 1.0, "sft_loss": 2.0, "rank_accuracy": 0.5}
    seen = {"step": 4, "eval_reward_mean": 0.1, "eval_reward_mean_m:gold": 0.2}
    ended = {"step": 4, "train_runtime": 9.0}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [notes | {"epoch": 1.0}, seen, ended]}))
    assert training_history(tmp_path) == [notes, seen]


def test_the_commit_that_trained_is_not_the_one_that_evaluated_anew(tmp_path: Path) -> None:
    each = (("first", ["data", "sample"]), ("old", ["train"]), ("new", ["evaluate"]))
    found = {"environments": [{"versions": {"rrhf": name}, "stages": stages} for name, stages in each]}
    (tmp_path / "environment.json").write_text(json.dumps(found))
    assert trained_at(RunFolder(tmp_path)) == "old"
    assert trained_at(RunFolder(tmp_path), trained_before=True) == "old"
    assert trained_at(RunFolder(tmp_path / "bare"), trained_before=True) is None  # PPO's folder does not say
    assert trained_at(RunFolder(tmp_path / "bare")) not in (None, "old")


def test_texts_with_separators_of_lines_are_one_line(tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are within a text."""
    rows = [
        {"pi": "a\u2028b a\x85b", "pi_rewards": {"r": 0.5, "s": None}},
        {"pi": "c d c d", "pi_rewards": {"r": 1.0, "s": 0.25}},
    ]
    file = tmp_path / "generations.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4
    assert json_lines(file) == rows
    assert prompt_rewards(file) == {"proxy": [0.5, 1.0], "gold": [None, 0.25]}
    assert prompt_rewards(file, samples=2) == {"proxy": [0.75], "gold": [0.25]}
    assert looping(file) == 0.0


def test_what_is_wrong_with_a_scale_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hh has full, small"):
        read_scale("hh", "micro")
    for samples, policy, match in (
        (0, "top-p", "at least 1"),
        (2, "greedy", "same to a prompt"),
        (2, "beam", "same to a"),
    ):
        asked = ["model=m", *REWARDS, f"reproduce.held_out_samples={samples}", f"evaluate.policy={policy}"]
        with pytest.raises(UserError, match=match):
            plan(Place(tmp_path), read_scale("imdb", "small", asked), Item(arm_named("imdb", "start"), 0, None))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"reproduce": {"learning_rate": [1]}}))
    with pytest.raises(UserError, match=r"reproduce\.learning_rate: unknown key"):
        read_scale("hh", str(tmp_path / "own.yaml"))
    assert read_scale("imdb", "micro", ["reproduce.learning_rates=[3e-4, 1e-3]"]).learning_rates == [3e-4, 1e-3]
    for rates in ("[0, 1e-3]", "[fast]", "1e-3"):
        with pytest.raises(UserError, match=r"learning_rates .*: a list of numbers above 0"):
            read_scale("imdb", "micro", [f"reproduce.learning_rates={rates}"])
    assert set(VALUES) == {field.name for field in fields(Scale)} - {"task", "name", "config", "asked"}


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ("reproduce.held_out_samples=two", r"held_out_samples two: a whole number"),
        ("reproduce.rate_queries=abc", r"rate_queries abc: a whole number"),
        ("reproduce.rate_seeds=1.5", r"rate_seeds 1\.5: a whole number"),
        ("reproduce.resample_steps=true", r"resample_steps True: a whole number"),
        ("reproduce.learning_rates=[]", r"learning_rates \[\]: a list of numbers"),
        ("reproduce.learning_rates=null", r"learning_rates: is missing: a list of numbers"),
        ("reproduce.kl_beta=-1", r"kl_beta -1: a number, not negative"),
        ("reproduce.arms=RRHF-DP", r"arms RRHF-DP: a list of names, as \[SFT"),
        ("reproduce.chosen=3", r"chosen 3: the tag"),
        ("reproduce.set_aside=yes", r"set_aside yes: true or false"),
        ("reproduce.ppo=3", r"ppo 3: keys with values"),
        ("reproduce=5", "section reproduce: must hold keys and values, not 5"),
        ("train=5", "section train: must hold keys and values, not 5"),
        ("train=null", r"train\.max_steps None: the optimiser steps of every arm: a whole number"),
        ("train.max_steps=0", r"train\.max_steps 0: .*at least 1"),
    ],
)
def test_values_of_a_scale_that_do_not_fit_are_told(asked: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_scale("imdb", "micro", [asked])
    assert read_scale("imdb", "micro", ["reproduce.held_out_samples=null"]).held_out_samples == 1


def test_settings_of_ppo_that_do_not_fit_are_told(tmp_path: Path) -> None:
    item = Item(arm_named("imdb", "PPO"), 0, 1e-4)
    for ppo, match in (
        ("{rollout_querys: 2}", "rollout_querys"),
        ("{ppo_epochs: few}", "few"),
        ("{gamma: 2}", "gamma"),
    ):
        with pytest.raises(UserError, match=rf"reproduce\.ppo: .*{match}"):
            plan(Place(tmp_path), read_scale("imdb", "micro", ["model=m", *REWARDS, f"reproduce.ppo={ppo}"]), item)


def test_a_mistyped_key_is_told_before_any_model_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "prepare", lambda *job: pytest.fail("a model is trained"))
    for arm in ("start", "OP+KL", "PPO"):
        with pytest.raises(UserError, match=r"train\.learning_rat: unknown key: did you mean 'learning_rate'"):
            reproduce.main(["imdb", "--arms", arm, "--output", str(tmp_path / "out"), "train.learning_rat=1"])
    assert not (tmp_path / "out").exists()


def test_limits_at_null_are_none_or_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def records(model: str) -> dict[str, Any]:
        return {name: [Record(f"{name} {i}") for i in range(300)] for name in ("queries", "held_out", "rates")}

    monkeypatch.setattr(data, "_micro_records", records)
    for aside, first in ((False, "held_out 0"), (True, "held_out 128")):
        asked = [f"reproduce.set_aside={str(aside).lower()}", "data.limit=null", "data.held_out_limit=null"]
        prompts = data.Prompts(tmp_path / str(aside))
        made = data.write_prompts(read_scale("imdb", "micro", ["model=m", *asked]), prompts)
        assert made["data"]["held_out_limit"] == 4 * 128
        found = [list(read_records(file)) for file in (prompts.queries, prompts.held_out, prompts.rates)]
        assert [len(each) for each in found] == [300, 4 * 128, 100] and found[1][0].query == first


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (("--learning_rate", "0"), "--learning_rate 0: must be a number above 0"),
        (("--learning_rate", "nan"), "--learning_rate nan: must be"),
        (("--arms", ""), "--arms : "),
    ],
)
def test_flags_that_say_nothing_do_not_stand_for_the_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], match: str
) -> None:
    monkeypatch.setattr(work, "prepare", lambda *job: pytest.fail("it is begun"))
    with pytest.raises(UserError, match=match):
        reproduce.main(["imdb", *asked, "--output", str(tmp_path / "out"), "model=m"])


def test_what_is_said_of_rho_is_the_mean_over_seeds_as_all_rows_are() -> None:
    table = Table([A], 2, [1e-3])
    rows = rows_of(table, by_key([judged(0, 0.5), judged(1, 0.7)]))
    assert "ρ: proxy 0.600. Code: c." in page._introduction(table, rows, 2, 2)


def test_no_page_is_written_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--page: .*typo: no such folder: give the --output"):
        reproduce.main(["imdb", "--page", "--output", str(tmp_path / "typo")])
    assert not (tmp_path / "typo").exists()


FULL = {  # classes of the paper's models
    "imdb": ("gpt2", "RRHF-BP"),
    "hh": ("llama", "RRHF-DP"),
    "wombat": ("llama", "Wombat"),
}


@pytest.mark.parametrize("task", FULL)
def test_a_step_of_each_full_configuration(task: str, tmp_path: Path) -> None:
    """The full scale with a tiny model of the same class, local records and rewards, and one optimiser step."""
    from support.models import tiny_model, tiny_tokenizer

    family, arm = FULL[task]
    tokenizer = tiny_tokenizer()
    tiny_model(family, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.workplace(tmp_path, {}, tiny.rows(8))
    overrides = [
        "device=cpu", "dtype=float32", "data.source=data.jsonl", "data.format=null", "data.held_out=null",
        "data.held_out_limit=2", "data.limit=4", "sample.max_new_tokens=4", "score.reward=[tiny_rewards:vowels]",
        "evaluate.reward=[tiny_rewards:vowels]", "evaluate.max_new_tokens=4", "evaluate.perplexity_model=null",
        "train.max_steps=1", "train.gradient_accumulation_steps=4", "train.bf16=false", "train.report_to=none",
        "train.save_strategy='no'", "reproduce.rate_queries=2",
    ]  # fmt: skip
    if task == "wombat":
        overrides = [line for line in overrides if not line.startswith("sample.")]
    command = ["reproduce", task, "--scale", "full", "--arms", arm, "--model", "model", "--learning_rate", "2e-5"]
    tiny.warm(*command, "--output", "out", *overrides, cwd=tmp_path).done()
    (place,) = (tmp_path / "out/results").glob("*.json")
    found = json.loads(place.read_text())
    assert found["arm"] == arm and found["steps"] == 1 and found["tokens_trained"] > 0 and found["kl"]["n"] == 2
    trained = json.loads((tmp_path / f"out/arms/{arm}/seed-0/rate-2e-05/model/training.json").read_text())
    assert trained["steps"] == 1
    config = json.loads((tmp_path / f"out/arms/{arm}/seed-0/rate-2e-05/model/config.json").read_text())
    assert config["architectures"] == [{"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]]


@pytest.mark.parametrize("counted", [None, [], [{"phrase": "i'm sorry", "rho": 0.0, "pi": 0.5}]])
def test_an_evaluation_that_counted_no_phrases_says_nothing_of_them(counted: Any, tmp_path: Path) -> None:
    """One of an older version is not one whose policy came to say nothing."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"rho_rewards": {"r": 0.0}, "pi_rewards": {"r": 1.0}}) + "\n")
    side = {"mean": 0.5, "std": 0.1}
    evaluation: dict[str, Any] = {
        "pi": {"perplexity": 9.0, "length_mean": 3.0, "distinct_2": 0.5, "n": 1},
        "rewards": {"r": {"rho": side, "pi": side}}, "seed": 0,
    }  # fmt: skip
    numbers = evaluation_numbers(
        evaluation if counted is None else evaluation | {"phrases": counted}, tmp_path / "texts.jsonl"
    )
    assert numbers.get("phrases") == counted and numbers["proxy"]["gain"]["mean"] == 1.0
