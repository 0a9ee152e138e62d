"""Watching a policy while it trains: the alarms' rules, collapses really trained, and that training does not notice."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from rrhf.cli.main import main
from rrhf.cluster import training
from rrhf.common.endpoint import BudgetReached
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.evaluation.perplexity import nll_under
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.recipes import offline
from rrhf.recipes.config import parse_config
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.record import Record
from rrhf.report import write_report
from rrhf.training.alarms import RULES, Measurement, alarms, measurements, pearson
from rrhf.training.config import RRHFConfig
from rrhf.training.trainer import RRHFTrainer
from rrhf.training.watch_settings import WatchSettings
from rrhf.training.watching import Watch, undisturbed, watch_training
from support.judge_replies import judging, prompts_to
from support.models import tiny_model, tiny_tokenizer, toy_records
from support.tiny import config as run_config
from support.tiny import warm, workplace, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
LIMITS = WatchSettings()
START = Measurement(
    step=0, reward_mean=0.55, perplexity=7.5, length_mean=37.0, distinct_2=0.90, score_length_correlation=0.1,
    prompts=32,
)  # fmt: skip


def words(prompts: Any, completions: Any) -> list[float]:
    """A reward that pays for length, in words."""
    return [float(len(text.split())) for text in completions]


def share_of_a(prompts: Any, completions: Any) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


def restless(prompts: Any, completions: Any) -> list[float]:
    """A reward that draws from every random state there is, and seeds them."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]


# --- the rules ------------------------------------------------------------------------------------------------------


def fired(**changed: Any) -> set[str]:
    return set(alarms(START, replace(START, step=40, **changed), LIMITS))


HEALTHY = [
    {"reward_mean": 0.57, "perplexity": 7.6, "length_mean": 36.2, "distinct_2": 0.91, "score_length_correlation": -0.2},
    {"reward_mean": 0.61, "perplexity": 7.3, "length_mean": 38.9, "distinct_2": 0.89, "score_length_correlation": 0.3},
    {"reward_mean": 0.65, "perplexity": 7.1, "length_mean": 37.0, "distinct_2": 0.88, "score_length_correlation": None},
    {"reward_mean": None, "perplexity": None},  # nothing scored, no perplexity model
]


@pytest.mark.parametrize("values", HEALTHY)
def test_a_healthy_training_is_left_alone(values: dict[str, Any]) -> None:
    assert fired(**values) == set()


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"distinct_2": 0.449}, "variety"),
        ({"distinct_2": 0.0}, "variety"),
        ({"length_mean": 74.1}, "length"),
        ({"length_mean": 18.4}, "length"),
        ({"length_mean": 0.0}, "length"),
        ({"perplexity": 15.0, "reward_mean": 0.56}, "perplexity"),
        ({"score_length_correlation": 0.7}, "correlation"),
        ({"score_length_correlation": -0.7}, "correlation"),
        ({"score_length_correlation": 1.0}, "correlation"),
    ],
)
def test_each_rule_fires_alone(changed: dict[str, Any], rule: str) -> None:
    assert fired(**changed) == {rule}


@pytest.mark.parametrize(
    "changed",
    [
        {"distinct_2": 0.451},
        {"distinct_2": 1.0},
        {"length_mean": 73.9},
        {"length_mean": 18.6},
        {"perplexity": 14.9, "reward_mean": 0.9},
        {"perplexity": 30.0, "reward_mean": 0.55},  # the reward is not up: badly trained, not exploited
        {"score_length_correlation": 0.59},
    ],
)
def test_at_its_limit_a_rule_is_silent(changed: dict[str, Any]) -> None:
    assert fired(**changed) == set()


@pytest.mark.parametrize(
    ("before", "now", "prompts", "fires"),
    [
        (None, 0.65, 32, True),  # all answers were equally long
        (0.5, 0.65, 32, False),  # within what 32 prompts vary by
        (0.5, 0.65, 400, True),
        (0.65, 0.65, 400, False),  # the reward was so from the start
        (-0.65, 0.65, 32, True),
        (0.9, -0.7, 32, True),
        (0.0, 0.65, 14, False),  # 1 % needs more prompts
        (0.0, 0.65, 20, True),
        (0.0, 0.99, 9, False),
    ],
)
def test_a_correlation_must_be_more_than_chance_and_than_the_start(
    before: float | None, now: float, prompts: int, fires: bool
) -> None:
    start = replace(START, score_length_correlation=before, prompts=prompts)
    assert ("correlation" in alarms(start, replace(start, score_length_correlation=now), LIMITS)) == fires


def test_the_correlation_rule_is_rarely_wrong_by_chance() -> None:
    draw = np.random.default_rng(0)
    lengths, rewards = draw.integers(5, 64, (2000, 32)), draw.normal(size=(2000, 32))
    found = [pearson(x, y) for x, y in zip(lengths, rewards, strict=True)]
    start = replace(START, score_length_correlation=0.0)
    rung = sum("correlation" in alarms(start, replace(start, score_length_correlation=r), LIMITS) for r in found)
    assert rung <= 5


def test_pearson_by_hand() -> None:
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([1, 2], [1, 2]) is None


def test_the_sentence_has_the_figures_and_a_cure() -> None:
    found = alarms(START, replace(START, distinct_2=0.1, length_mean=90.0, perplexity=20.0, reward_mean=0.9), LIMITS)
    assert list(found) == ["variety", "length", "perplexity"]
    assert "0.100" in found["variety"] and "0.900" in found["variety"] and "--sft_weight" in found["variety"]
    assert "90.0" in found["length"] and "37.0" in found["length"] and "long" in found["length"]
    assert "7.50" in found["perplexity"] and "20.00" in found["perplexity"] and "0.55 to 0.9" in found["perplexity"]
    assert set(RULES) == {*found, "correlation"}


def test_faults_of_the_settings_come_together() -> None:
    with pytest.raises(UserError) as raised:
        WatchSettings(alarm="stopp", watch_prompts=0, alarm_length=0.5, watch_policy="gredy", watch_max_new_tokens=0)
    for part in (
        "'stop'",
        "--watch_prompts 0",
        "--alarm_length 0.5",
        "--watch_policy gredy",
        "--watch_max_new_tokens 0",
    ):
        assert part in str(raised.value)
    with pytest.raises(UserError, match="give --watch_steps"):
        WatchSettings(alarm="stop")


# --- trained models -------------------------------------------------------------------------------------------------


WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "saw", "one", "dog", "run", "by", "an", "old", "tree"]
LETTERS = "abcdefghijkl"
PHRASES = {letter: "".join(f" {word}" for word in random.Random(letter).sample(WORDS, 13)) for letter in LETTERS}


@functools.cache
def _trained_weights() -> dict[str, torch.Tensor]:
    """A tiny model that has learned a phrase for each prompt: low perplexity, distinct words, no end."""
    model = tiny_model("llama", len(TOKENIZER))
    fit(model, [(letter, phrase, "length") for letter, phrase in PHRASES.items()], steps=80)
    return {name: value.clone() for name, value in model.state_dict().items()}


def fit(model: Any, rows: list[tuple[str, str, str]], steps: int) -> None:
    """Push a model into answering ``rows`` (query, response, finish), by nothing but their likelihood."""
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = []
    for query, text, finish in rows:
        ids.append(TOKENIZER(query + text).input_ids + [TOKENIZER.eos_token_id] * (finish == "stop"))
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    labels = batch.masked_fill(mask == 0, -100)
    for _ in range(steps):
        model(input_ids=batch, attention_mask=mask, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def phrase_model() -> Any:
    model = tiny_model("llama", len(TOKENIZER))
    model.load_state_dict(_trained_weights())
    return model


PROMPTS = [Record(query=letter, responses=[], id=f"p{letter}") for letter in LETTERS]


def trainer_of(model: Any, folder: Path, records: Any = None, **options: Any) -> RRHFTrainer:
    callbacks, peft_config = options.pop("callbacks", None), options.pop("peft_config", None)
    plain = {
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "max_steps": 5,
    }  # fmt: skip
    return RRHFTrainer(
        model=model, args=RRHFConfig(output_dir=str(folder), **{**plain, **options}), processing_class=TOKENIZER,
        train_dataset=toy_records(9, seed=3) if records is None else records,
        callbacks=callbacks, peft_config=peft_config,
    )  # fmt: skip


def watched(trainer: RRHFTrainer, rewards: Any = (words,), perplexity: Any = None, **options: Any) -> Watch:
    settings = WatchSettings(**{"watch_steps": 2, "watch_max_new_tokens": 48, **options})
    watch = Watch(trainer, PROMPTS, rewards, settings, perplexity=perplexity)
    trainer.add_callback(watch)
    return watch


def under_start() -> Any:
    return nll_under(phrase_model(), TOKENIZER, show=False)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The alarms that were said so far."""
    logger = logging.getLogger("rrhf")
    before, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.WARNING, "rrhf"):
        yield lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("alarm")]
    logger.propagate = before


def collapse(target: Callable[[str], tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(record.query, *target(record.query)) for record in PROMPTS]


COLLAPSES: dict[str, tuple[Any, Callable[[str], tuple[str, str]], set[str]]] = {
    "one token for ever": (words, lambda q: ("a" * 48, "length"), {"variety"}),
    "one word for ever": (words, lambda q: (" aa" * 16, "length"), {"variety"}),
    "short": (words, lambda q: (" dog run by", "stop"), {"length"}),
    "nothing": (words, lambda q: ("", "stop"), {"variety", "length"}),
    "reward hacked": (share_of_a, lambda q: (" ab a ac aab aac ad aad a ba ca da ea ba", "length"), {"perplexity"}),
    "length paid": (words, lambda q: (" dog run by the old tree ox"[: 27 if q in "acegik" else 4] , "stop"),
                    {"correlation"}),
}  # fmt: skip


@pytest.mark.parametrize("case", COLLAPSES)
def test_an_injected_collapse_is_seen(case: str, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    reward, target, expected = COLLAPSES[case]
    model = phrase_model()
    trainer = trainer_of(model, tmp_path)
    watch = watched(trainer, [reward], under_start())
    watch.on_train_begin(trainer.args, trainer.state, trainer.control)
    watch._measure_now(trainer.state, trainer.control)
    assert said() == []  # the same weights again
    fit(model, collapse(target), steps=60)
    watch._measure_now(trainer.state, trainer.control)
    rules = {line.partition("(")[2].partition(")")[0] for line in said()}
    assert expected <= rules, (rules, watch.measured)
    again = len(said())
    watch._measure_now(trainer.state, trainer.control)
    assert len(said()) == again  # not said twice
    assert watch.stopped is None and not trainer.control.should_training_stop


def collapsing() -> list[Record]:
    """Records whose best-scored response is one letter for ever."""
    return [
        Record(query=r.query, responses=["a" * 48, PHRASES[r.query]], finish=["length"] * 2, scores=[1.0, 0.0], id=r.id)
        for r in PROMPTS
    ]


def test_a_collapse_that_training_brings_about_stops_it(tmp_path: Path) -> None:
    """The best-scored responses are one letter for ever: RRHF itself collapses the policy."""
    records = collapsing()
    options = {"save_strategy": "steps", "save_steps": 1000, "max_steps": 60, "learning_rate": 2e-2}
    trainer = trainer_of(phrase_model(), tmp_path, records, **options)
    watch = watched(trainer, [share_of_a], watch_steps=5, alarm="stop")
    trainer.train()
    step = trainer.state.global_step
    assert 0 < step < 60 and step % 5 == 0
    assert watch.stopped is not None and "variety" in watch.stopped and f"step {step}" in watch.stopped
    checkpoint = tmp_path / f"checkpoint-{step}"
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert measurements(history) == watch.measured

    again = trainer_of(phrase_model(), tmp_path, records, **options)
    watched(again, [share_of_a], watch_steps=5, alarm="stop")
    with pytest.raises(UserError, match="--alarm warn"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == step
    on = trainer_of(phrase_model(), tmp_path, records, **{**options, "max_steps": step + 2})
    went_on = watched(on, [share_of_a], watch_steps=5, alarm="warn")
    on.train(resume_from_checkpoint=str(checkpoint))
    assert on.state.global_step == step + 2
    assert went_on.measured[: len(watch.measured)] == watch.measured and went_on.measured[-1].step == step + 2


def test_a_healthy_training_is_not_disturbed_by_alarms(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    records = [
        Record(query=r.query, responses=[PHRASES[r.query], "xyxyxy"], finish=["length"] * 2, scores=[1.0, 0.0], id=r.id)
        for r in PROMPTS
    ]
    trainer = trainer_of(phrase_model(), tmp_path, records, learning_rate=1e-3, max_steps=10)
    watch = watched(trainer, [words], under_start(), watch_steps=2, alarm="stop")
    trainer.train()
    assert [m.step for m in watch.measured] == [0, 2, 4, 6, 8, 10]
    assert said() == [] and watch.stopped is None and trainer.state.global_step == 10


# --- training does not notice -----------------------------------------------------------------------------------------


def with_dropout(family: str) -> Any:
    model = tiny_model(family, len(TOKENIZER))
    model.config.attention_dropout = 0.2
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return model


def lora(dropout: float) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=dropout)


@pytest.mark.parametrize("case", ["llama", "gpt2", "padded", "lora"])
def test_the_weights_are_those_of_a_run_that_is_not_watched(case: str, tmp_path: Path) -> None:
    found, lines = {}, {}
    for watching in (False, True):
        torch.manual_seed(0)
        family = {"padded": "bloom", "lora": "llama"}.get(case, case)
        model = tiny_model("bloom", len(TOKENIZER)) if case == "padded" else with_dropout(family)
        trainer = trainer_of(
            model, tmp_path / str(watching), gradient_checkpointing=case == "llama",
            peft_config=lora(0.2) if case == "lora" else None,
        )  # fmt: skip
        if watching:
            watched(trainer, [restless], nll_under(model, TOKENIZER) if case == "gpt2" else None, watch_policy="top-k")
        trainer.train()
        found[watching] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        lines[watching] = [row for row in trainer.state.log_history if "loss" in row]
    assert [line["step"] for line in lines[True]] == [2, 4]  # logging between does not take a line away
    assert [line["loss"] for line in lines[True]] == [line["loss"] for line in lines[False]]
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], value) for name, value in found[False].items())


def test_random_states_and_modes_are_put_back() -> None:
    model = with_dropout("llama").train()
    model.model.layers[0].eval()  # someone froze it
    modes = [module.training for module in model.modules()]

    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = draws()
    seed()
    with undisturbed(model):
        model.eval()
        restless([], ["a"])
    assert draws() == expected
    assert [module.training for module in model.modules()] == modes


# --- what it measures and logs ----------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """What every ``report_to`` integration is given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append({"step": state.global_step, **logs})


NAMES = {"reward_mean", "perplexity", "length_mean", "distinct_2", "prompts"}


def test_what_is_logged_and_written(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of(phrase_model(), tmp_path, learning_rate=1e-4, callbacks=[recorder])
    watched(trainer, [share_of_a, words], under_start())
    trainer.train()
    trainer.save_state()
    rows = [row for row in recorder.lines if "eval_reward_mean" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert all({f"eval_{name}" for name in NAMES} <= row.keys() for row in rows)
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [m.step for m in measurements(history)] == [0, 2, 4, 5]

    answers = [json.loads(line) for line in (tmp_path / "watch" / "step-0.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == [record.id for record in PROMPTS]
    rewards = share_of_a([], [row["pi"] for row in answers])
    assert rows[0]["eval_reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
    second = words([], [row["pi"] for row in answers])
    name = next(name for name in rows[0] if name.endswith("words"))
    assert name.startswith("eval_reward_mean_") and rows[0][name] == pytest.approx(sum(second) / len(second))
    assert rows[0]["eval_length_mean"] == 48.0 and rows[0]["eval_prompts"] == len(PROMPTS)
    assert rows[0]["eval_perplexity"] < 3  # the phrases, under the model that learned them


def test_perplexity_with_an_adapter_is_that_of_the_model_without_it(tmp_path: Path) -> None:
    trainer = trainer_of(phrase_model(), tmp_path, peft_config=lora(0.0))
    watch = watched(trainer)
    found, _, rows = watch.measure(0)
    assert watch.perplexity is not None and found.perplexity is not None
    texts = [(row["pi"], row["pi_finish"]) for row in rows]
    nll, tokens, *_ = under_start()(PROMPTS, texts)
    assert found.perplexity == pytest.approx(np.exp(nll / tokens), rel=1e-4)
    own = nll_under(trainer.model, TOKENIZER, show=False)(PROMPTS, texts).nll
    assert abs(own - nll) > 1e-2 * nll  # the adapter is no identity
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora" in name)

    none = watched(trainer_of(phrase_model(), tmp_path, peft_config=lora(0.0)), watch_perplexity_model="none")
    assert none.perplexity is None and none.measure(0)[0].perplexity is None


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(phrase_model(), tmp_path)
    settings = WatchSettings(watch_steps=2)
    with pytest.raises(UserError, match="--watch_data"):
        Watch(trainer, [], [words], settings)
    with pytest.raises(UserError, match="--watch_reward"):
        Watch(trainer, PROMPTS, [], settings)
    with pytest.raises(UserError, match="cannot score new texts"):
        Watch(trainer, PROMPTS, ["provided:x"], settings)
    with pytest.raises(UserError, match="no_such"):
        Watch(trainer, PROMPTS, ["no_such_module:f"], settings)


def test_a_judge_that_watches_is_asked_as_the_evaluation_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="the extra `endpoint` is not installed")
    monkeypatch.setenv("WATCHING", "a-key-of-its-own")
    write_rows(tmp_path / "data.jsonl", [{"query": letter} for letter in LETTERS])
    with judging(tmp_path) as server:
        settings = WatchSettings(
            watch_steps=2, watch_data=str(tmp_path / "data.jsonl"), watch_reward=[f"judge:{tmp_path / 'judge.yaml'}"],
            watch_prompts=5, watch_perplexity_model="none",
        )  # fmt: skip
        limits = EndpointLimits(max_requests=4, api_key_env="WATCHING")
        trainer = trainer_of(phrase_model(), tmp_path)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")  # which asks for both, so that the budget is its own
        watch = watch_training(trainer, settings, ModelSettings("start"), limits)
        assert watch is not None
        with pytest.raises(BudgetReached, match="the budget's 4 requests are spent"):
            watch.measure(0)
        assert len(prompts_to(server)) == 3  # and a check
        assert {headers["authorization"] for headers in server.headers} == {"Bearer a-key-of-its-own"}


def test_a_run_and_a_command_say_how_judges_that_watch_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(training, "train_model", lambda *arguments, **options: given.update(options))
    run = RunFolder(tmp_path / "run")
    settings = run_config(tmp_path / "model")
    settings["evaluate"] |= {"max_requests": 7, "timeout": 9}
    config = parse_config(settings, run.model)
    offline._train(offline.Pass(run, config, config.model, PolicyCache()), run.scored, None)
    assert (given["watch_remote"].max_requests, given["watch_remote"].timeout) == (7, 9)

    train = ["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "out"), "--bf16", "false"]
    limits = ["--max_requests", "8", "--api_key_env", "WATCHING"]
    assert main([*train, *limits]) == 2
    assert "give --resample_steps or --watch_steps too" in capsys.readouterr().err
    for command in (train, ["baseline", "sft", *train[1:]]):
        assert main([*command, *limits, "--watch_steps", "2"]) == 0
        assert (given["watch_remote"].max_requests, given["watch_remote"].api_key_env) == (8, "WATCHING")
    assert main(["baseline", "sft", *train[1:], *limits]) == 2
    assert "judges that are asked while training: give --watch_steps too" in capsys.readouterr().err


def test_sharded_weights_are_not_watched(tmp_path: Path) -> None:
    trainer = trainer_of(phrase_model(), tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match="sharded"):
        Watch(trainer, PROMPTS, [words], WatchSettings(watch_steps=2, alarm="stop"))
    watch = Watch(trainer, PROMPTS, [words], WatchSettings(watch_steps=2))
    watch.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert watch.measured == [] and trainer.state.log_history == []


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
    trainer = trainer_of(phrase_model(), tmp_path, report_to="tensorboard")
    watch = watched(trainer)
    trainer.train()
    file = next(path for path in tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(file.parent))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("eval/reward_mean")}
    assert found == pytest.approx({m.step: m.reward_mean for m in watch.measured})


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_report_to_is_passed_on(name: str, tmp_path: Path) -> None:
    assert RRHFConfig(output_dir=str(tmp_path), report_to=name, bf16=False, use_cpu=True).report_to == [name]


@pytest.mark.parametrize("name", ["wandb", "trackio", "wandbb"])
def test_a_tracker_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"--report_to {name}: .*(pip install|only)"):
        trainer_of(phrase_model(), tmp_path, report_to=name)


def test_figure_3_is_drawn_from_a_watched_training(tmp_path: Path) -> None:
    trainer = trainer_of(phrase_model(), tmp_path / "run" / "model", logging_steps=1)
    watched(trainer, perplexity=under_start())
    trainer.train()
    trainer.save_state()
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Loss and mean reward through training" in page
    assert "Perplexity on held-out prompts" in page


def test_of_two_processes_one_measures_and_both_stop(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "support" / "scripts" / "ddp_watch.py"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_", "LOCAL_"))}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path],
        env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["step"] == second["step"] < 60
    assert first["measured"] == list(range(0, first["step"] + 1, 5)) and second["measured"] == []
    assert "distinct-2" in first["stopped"] and "process 0 says which" in second["stopped"]
    assert (tmp_path / "model" / f"checkpoint-{first['step']}").is_dir()


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_run_watches_its_held_out_prompts_and_stops_on_request(small: Path, tmp_path: Path) -> None:
    settings = run_config(small)
    settings["train"] |= {"watch_steps": 4, "watch_prompts": 5, "watch_max_new_tokens": 6, "alarm": "off"}
    workplace(tmp_path, settings)
    run = ("run", "config.yaml", "--output", "out")
    # 1.0001: no training leaves the lengths at exactly their start
    limits = ("train.alarm=stop", "train.alarm_length=1.0001", "train.learning_rate=0.05")
    stopped = warm(*run, *limits, cwd=tmp_path)
    assert stopped.code == 2, stopped.err[-2000:]
    assert (
        "--alarm stop (" in stopped.err and "length: answers have" in stopped.err and "train.alarm=warn" in stopped.err
    )
    model = tmp_path / "out" / "model"
    assert list(model.glob("checkpoint-*")) and not (model / "training.json").exists()

    on = warm(*run, *limits, "train.alarm=warn", cwd=tmp_path).done()
    assert "another configuration" not in on.err
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    found = measurements(history)
    assert [m.step for m in found] == [0, 4, 8, 10] and all(m.prompts == 5 and m.perplexity for m in found)
    assert any("eval_reward_mean_tiny_rewards:spaces" in row for row in history)  # the evaluation's second reward
    held_out = [json.loads(line)["id"] for line in (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()]
    answers = (model / "watch" / "step-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answers] == held_out[:5]
    assert "Loss and mean reward through training" in (tmp_path / "out" / "report.html").read_text()


def test_train_needs_prompts_and_a_reward(small: Path, tmp_path: Path) -> None:
    from support.tiny import rows

    workplace(tmp_path, {})
    write_rows(tmp_path / "scored.jsonl", rows(8))
    train = ("train", "--model", str(small), "--data", "scored.jsonl", "--output", "out", "--watch_steps", "2",
             "--device", "cpu", "--bf16", "false", "--max_steps", "2")  # fmt: skip
    assert "--watch_data" in warm(*train, cwd=tmp_path).err
    missing = warm(*train, "--watch_data", "scored.jsonl", cwd=tmp_path)
    assert missing.code == 2 and "--watch_reward" in missing.err
    rewards = ("--watch_reward", "tiny_rewards:vowels", "tiny_rewards:spaces", "--watch_max_new_tokens", "5")
    done = warm(*train, "--watch_data", "scored.jsonl", *rewards, cwd=tmp_path).done()
    assert "eval_reward_mean" in done.err and "eval_perplexity" in done.err
