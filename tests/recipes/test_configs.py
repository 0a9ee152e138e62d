"""The configurations of the paper's settings and of the ablations: what differs, that all parse, a step of each."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rrhf.common.errors import UserError
from rrhf.losses import RANKING_LOSSES, ranking_loss
from rrhf.recipes.config import ablations, override, parse_config, read_config, shipped
from rrhf.recipes.recipe import run_recipe
from rrhf.recipes.run_folder import RunFolder
from rrhf.records.files import read_records
from support import tiny
from support.models import tiny_model, tiny_tokenizer, toy_records

# Setting → the keys in which it differs from what its family shares: what the paper varies (Table 1, Appendix C).
DP = {f"sample.{name}" for name in ("policy", "num_beams", "num_beam_groups", "diversity_penalty", "temperature")}
VARIES: dict[str, dict[str, set[str]]] = {
    "hh": {
        "hh-bp": {"sample.policy", "sample.num_beams"},
        "hh-sp": {"sample.policy", "sample.top_p", "sample.temperature", "sample.num_responses"},
        "hh-dp": DP,
        "hh-d": DP | {"data.provided"},
        "hh-p": {"sample", "sample.max_new_tokens"},  # no section at all
        "hh-ip1": DP | {"iterations"},
        "hh-ip2": DP | {"iterations"},
        "hh-ip3": DP | {"iterations"},
        "hh-op32": DP | {"train.resample_steps"},
        "hh-op32-kl": DP | {"train.resample_steps", "score.kl_beta"},
        "hh-r": DP | {"train.resample_steps", "train.ranking_loss"},
        "raft": {
            "sample.policy",
            "sample.top_p",
            "sample.temperature",
            "sample.num_responses",
            "data.provided",
            "iterations",
            "train.ranking_loss",
        },
    },
    "imdb": {
        "imdb-bp": set(),
        "imdb-b": {"data.provided"},
        "imdb-op128": {"train.resample_steps"},
        "imdb-op128-kl": {"train.resample_steps", "score.kl_beta"},
        "imdb-r": {"train.resample_steps", "train.ranking_loss"},
    },
}


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key, part in values.items() for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    missing = object()
    return {key for key in {*a, *b} if a.get(key, missing) != b.get(key, missing)}


@pytest.mark.parametrize("family", VARIES)
def test_configurations_differ_in_what_the_paper_varies_alone(family: str) -> None:
    base = flat(read_config(family))
    configs = {name: flat(read_config(name)) for name in VARIES[family]}
    for name, config in configs.items():
        assert differing(base, config) == VARIES[family][name], name
    for one, other in itertools.combinations(configs, 2):
        assert differing(configs[one], configs[other]) <= VARIES[family][one] | VARIES[family][other], (one, other)
    assert differing(configs["hh-ip2"], configs["hh-ip3"]) == {"iterations"} if family == "hh" else True


def test_every_setting_is_in_the_comparison() -> None:
    names = {name for name in shipped() if name.startswith(("hh-", "imdb-", "raft"))}
    assert names == {name for family in VARIES.values() for name in family}


def needed(name: str) -> list[str]:
    """What the user gives to the HH configurations."""
    return ["model=m", "score.reward=[a:b]", "evaluate.reward=[a:b]"] if name not in VARIES["imdb"] else []


@pytest.mark.parametrize("name", [name for name in shipped() if name not in ("hh", "wombat")])
def test_every_configuration_parses(name: str, tmp_path: Path) -> None:
    given = needed(name) if name.startswith(("hh", "raft", "wombat")) else []
    parse_config(override(read_config(name), given), tmp_path / "model")


@pytest.mark.parametrize("name", ablations())
def test_every_ablation_parses_and_changes_what_it_names(name: str, tmp_path: Path) -> None:
    config, changed = read_config(f"hh-dp+{name}"), flat(ablations()[name])
    assert differing(flat(read_config("hh-dp")), flat(config)) == set(changed)
    given = [assignment for assignment in needed("hh-dp") if assignment.partition("=")[0] not in changed]
    parsed = parse_config(override(config, given), tmp_path / "model")
    for key, value in changed.items():
        section, _, field = key.partition(".")
        found = parsed.model.model if section == "model" else getattr(parsed.train, field, value)
        assert found == value


def test_every_loss_has_its_ablation() -> None:
    named = {
        values["train"]["ranking_loss"] for values in ablations().values() if "ranking_loss" in values.get("train", {})
    }
    assert named == set(RANKING_LOSSES) - {"hinge"}


def test_an_unknown_ablation_is_named() -> None:
    with pytest.raises(UserError, match="no ablation 'no-rnk': did you mean 'no-rank'"):
        read_config("hh-dp+no-rnk")
    several = read_config("hh-dp+no-sft+loss-listmle")["train"]
    assert (several["sft_weight"], several["ranking_loss"]) == (0, "listmle")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows as rm-static has them, and the tiny model in the place of the paper's."""
    folder = tmp_path_factory.mktemp("configs")
    tiny.write_model(folder / "policy")
    rows = [
        {"prompt": f"{row['query']}\n\nAssistant:", "response": a, "chosen": a, "rejected": b}
        for row in tiny.rows(7)
        for a, b in [row["responses"]]
    ]
    tiny.write_rows(folder / "static.jsonl", rows)
    tiny.write_rows(folder / "queries.jsonl", [{k: row[k] for k in ("id", "query")} for row in tiny.rows(7)])
    return folder


def vowels(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (len(text) or 1) for text in completions]


KINDS = ["hh-bp", "hh-sp", "hh-d", "hh-p", "hh-op32-kl", "hh-r", "raft", "imdb-op128"]


def test_a_policy_gradient_keeps_responses_that_end_at_once(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its end, with its report and how ρ and π order the samples: a window has empty responses then."""
    monkeypatch.chdir(tmp_path)
    reward = f"{__name__}:vowels"
    shutil.copytree(workplace / "policy", tmp_path / "policy")
    generation = tmp_path / "policy" / "generation_config.json"
    many = {**json.loads(generation.read_text()), "eos_token_id": list(range(2, 60, 2))}  # half of all end a response
    generation.write_text(json.dumps(many))
    values = override(
        read_config("hh-sp+loss-grpo"),
        [
            f"model={tmp_path / 'policy'}", "device=cpu", "dtype=float32", f"score.reward=[{reward}]",
            f"evaluate.reward=[{reward}]", f"data.source={workplace / 'queries.jsonl'}", "data.format=null",
            "data.held_out_limit=2", "train.max_steps=2", "train.bf16=false", "train.report_to=none",
            "train.max_length=96", "train.max_query_length=40", "sample.max_new_tokens=4", "sample.temperature=1",
            "evaluate.max_new_tokens=4", "evaluate.perplexity_model=null",
        ],
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    run.remember_config(values)
    result = run_recipe(run, parse_config(values, run.model))
    windows = [record for n in (0, 1) for record in read_records(run.model / "windows" / f"{n}.jsonl")]
    assert any("" in record.responses for record in windows) and result["pi"]["n"] == 2
    assert all(len(record.responses) == 4 for record in windows) and "ranking" in result
    assert (run.folder / "report.html").exists()


@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_each_kind(name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward = f"{__name__}:vowels"
    values = override(
        read_config(name),
        [
            f"model={workplace / 'policy'}", "device=cpu", "dtype=float32", f"score.reward=[{reward}]",
            f"evaluate.reward=[{reward}]", f"data.source={workplace / 'static.jsonl'}", "data.held_out=null",
            "data.format=static", "data.limit=4", "data.held_out_limit=2", "train.max_steps=1", "train.bf16=false",
            "train.report_to=none", "train.max_length=96", "train.max_query_length=40", "evaluate.max_new_tokens=4",
            "evaluate.perplexity_model=null",
        ],
    )  # fmt: skip
    if values["sample"] is not None:
        values = override(values, ["sample.max_new_tokens=4"])
    if "iterations" in values:
        values = override(values, ["iterations=2"])
    run = RunFolder(tmp_path / "run")
    run.remember_config(values)
    result = run_recipe(run, parse_config(values, run.model))
    assert result["pi"]["n"] == 2 and result["rho"]["n"] == 2
    rounds = int(values.get("iterations", 1))
    for folder in [run.folder] if rounds == 1 else [run.round(number).folder for number in range(1, rounds + 1)]:
        assert json.loads((folder / "model/training.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    "name", [name for name in ablations() if not name.startswith(("select", "start", "rank-w", "diverse", "watched"))]
)
def test_a_step_of_each_ablation(name: str, tmp_path: Path) -> None:
    """The settings that it lays over, on records that have what losses over tokens need."""
    from rrhf.training.config import RRHFConfig
    from rrhf.training.trainer import RRHFTrainer

    options = dict(ablations()[name]["train"])
    options.pop("resample_steps", None)  # the window itself is in tests/training/test_online.py
    tokenizer = tiny_tokenizer()
    args = RRHFConfig(
        output_dir=str(tmp_path), bf16=False, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no",
        gradient_accumulation_steps=3, warmup_steps=0, learning_rate=1e-2, use_cpu=True, **options,
    )  # fmt: skip
    model = tiny_model("llama", len(tokenizer))
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    records = toy_records(3, seed=2, responses=(3, 4))
    if options.get("ranking_loss") in ("grpo", "rloo"):
        plain = RRHFConfig(output_dir=str(tmp_path), bf16=False, report_to="none", use_cpu=True)
        records = RRHFTrainer(
            model=model, args=plain, train_dataset=records, processing_class=tokenizer
        ).with_token_logprobs(records)
    trainer = RRHFTrainer(model=model, args=args, train_dataset=records, processing_class=tokenizer)
    trainer.train()
    assert ranking_loss(args.ranking_loss) is RANKING_LOSSES[args.ranking_loss]
    changed = any(bool((weight != before[name]).any()) for name, weight in model.state_dict().items())
    assert changed and trainer.state.global_step == 1


def test_imdb_prompts_have_the_paper_s_lengths_and_share_no_review(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On made-up reviews in the hub's layout, which a folder of that name stands for, and a tokenizer of the tests'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rrhf.recipes import imdb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / imdb.DATA).mkdir(parents=True)
    for split in ("train", "test"):
        texts = [f"{split} {i} " + " ".join(tiny.SENTENCES[(i + j) % 8] for j in range(3)) for i in range(12)]
        table = pa.table({"text": texts, "label": [i // 6 for i in range(12)]})
        pq.write_table(table, tmp_path / imdb.DATA / f"{split}.parquet")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(imdb, "PART", 6)
    sets = [list(f(seed=1)) for f in (imdb.training_prompts, imdb.validation_prompts, imdb.held_out_prompts)]
    assert [len(records) for records in sets] == [12, 6, 6]
    queries = [record.query for records in sets for record in records]
    assert len(set(map(str, queries))) == 24
    for record in sets[0]:
        assert len(tokenizer(str(record.query)).input_ids) <= 64 and len(tokenizer(record.responses[0]).input_ids) <= 48
    assert [r.query for r in imdb.training_prompts(limit=3, seed=1)] == [r.query for r in sets[0][:3]]
