"""Commands whose inputs and outputs are URLs: in memory, and on a real S3 server on loopback."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from rrhf.cli.arena import ACTIONS
from rrhf.cli.baseline import BASELINES
from rrhf.cli.main import COMMANDS, main
from rrhf.cli.parser import PlainParser
from rrhf.cli.urls import AS_IS, BARE, KINDS, SEVERAL, SWITCHES, _values
from rrhf.common import remote
from rrhf.common.errors import UserError
from rrhf.common.flags import Flags
from rrhf.common.remote import SUMS, Store
from support import tiny


@pytest.fixture
def memory(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A memory file system with scored records in it; rewards can be imported."""
    monkeypatch.chdir(tmp_path)
    tiny.write_rewards(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    memory.pipe("/in/data.jsonl", "".join(json.dumps(row) + "\n" for row in tiny.rows(8)).encode())
    return memory


def lines(fs: Any, path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in fs.cat(path).decode().splitlines()]


SCORE = ["score", "--data", "memory://in/data.jsonl", "--reward", "tiny_rewards:vowels", "--output"]


def places(command: str, given: list[str]) -> list[tuple[str, str, int]]:
    """What of a command line is brought, sent or refused: each URL, its flag and its place."""
    found = _values(command, given)
    return [
        (value.text, value.flag, value.place) for value in found if remote.is_url(value.text) and value.kind != AS_IS
    ]


def test_which_arguments_are_read_and_written() -> None:
    given = ["--judge", "s3://j/a.yaml", "s3://j/b.yaml", "--overwrite", "--output=s3://o/r.json", "--model", "s3://m"]
    assert [text for text, _, _ in places("judge", given)] == ["s3://j/a.yaml", "s3://j/b.yaml", "s3://o/r.json"]
    given = ["s3://c/run.yaml", "model=s3://m", "--output", "s3://o/run", "seed=1"]
    assert places("run", given) == [("s3://c/run.yaml", "", 0), ("s3://o/run", "output", 3)]
    assert not places("sample", ["--source", "http://host/v1@chat:2", "--reward_model=1", "--reward", "a:b", "s3://x"])
    assert places("report", ["--results", "s3://x/1", "s3://x/2", "--output", "s3://o", "s3://run"]) == [
        ("s3://x/1", "results", 1), ("s3://x/2", "results", 2), ("s3://o", "output", 4), ("s3://run", "", 5)
    ]  # fmt: skip
    assert [value.before for value in _values("arena create", ["--data=gpt=s3://x/1", "--data", "s3://x/2?a=b"])] == [
        "--data=gpt=", ""
    ]  # fmt: skip


# Flags whose value is no file and no folder, or one that stays on this machine: a URL there is refused.
LOCAL = """
    device dtype attn_implementation policy chat_template_kwargs api_key_env reward_normalisation peft format split to
    lora_target_modules select ranking_loss sft_reduction dpo_pairs ties lr_scheduler_kwargs optim_args repo fit names
    optim_target_modules activation_checkpointing_kwargs gradient_checkpointing_kwargs torch_compile_backend add mode
    torch_compile_mode liger_kernel_config report_to run_name project trackio_space_id trackio_bucket_id compare arms
    trackio_static_space_id include_for_metrics hub_token hub_model_id hub_revision metric_for_best_model without task
    accelerator_config parallelism_config label_names length_column_name fsdp fsdp_config deepspeed debug pairing
    resume_from_checkpoint alarm weights raters lr_scheduler_type watch_policy output_dir
"""
ALL = [(name,) for name in COMMANDS if name not in ("baseline", "arena")]
ALL += [("baseline", name) for name in BASELINES] + [("arena", name) for name in ACTIONS]


class _Parser(BaseException):
    """Carries a command's parser out of it."""


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_flag_takes_urls_or_refuses_them(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A new flag fails here until ``rrhf.cli.urls`` knows what it is."""

    def caught(self: Any, *rest: Any) -> None:
        raise _Parser(self.parser if isinstance(self, Flags) else self)

    for kind, name in ((PlainParser, "parse_args"), (PlainParser, "parse_intermixed_args"), (Flags, "parse")):
        monkeypatch.setattr(kind, name, caught)
    module = importlib.import_module(f"rrhf.cli.{command[0].replace('-', '_')}")
    online = ["--resample_steps=1"] if command == ("train",) else []
    with pytest.raises(_Parser) as raised:
        module.main([*command[1:], *online])
    actions, name = raised.value.args[0]._actions, " ".join(command)
    flags = {(action.option_strings or [""])[0][2:].replace("-", "_"): action for action in actions}
    for flag, action in flags.items():
        truth = getattr(action.type, "__name__", "") in ("string_to_bool", "boolean")
        if action.nargs == 0 or action.choices or action.type in (int, float) or truth:
            assert flag not in KINDS, flag  # no place for a text
        elif flag:
            assert (flag in KINDS or f"{name} {flag}" in KINDS) != (flag in LOCAL.split()), flag
    if "" in flags:  # what follows a flag may stand bare
        assert name in BARE
        assert {flag for flag, action in flags.items() if flag and action.nargs == 0} <= SWITCHES
        assert {flag for flag, action in flags.items() if flag and action.nargs in ("+", "*")} <= SEVERAL


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train", "--fsdp_config", "s3://b/fsdp.json"], "--fsdp_config s3://b/fsdp.json: no URL can stand there"),
        (["score", "--device=s3://key:secret@b/x"], "--device s3://b/x: no URL can stand there"),
        (["arena", "create", "s3://b/study.db"], "s3://b/study.db: a study is a data base"),
    ],
)
def test_a_url_where_none_can_stand(given: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert message in (said := capfd.readouterr().err) and "secret" not in said


def test_files_come_from_and_go_to_urls(memory: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "memory://in/data.jsonl", "--output", "memory://out/records.parquet"]) == 0
    assert main(["sample", "--source", "memory://in/data.jsonl", "--data", "memory://out/records.parquet",
                 "--output", "memory://out/sampled.jsonl"]) == 0  # fmt: skip
    assert main(["score", "--data=memory://out/sampled.jsonl", "--reward", "tiny_rewards:vowels",
                 "--output=memory://out/scored.jsonl"]) == 0  # fmt: skip
    assert main(["inspect", "memory://out/scored.jsonl", "--html", "memory://out/page.html"]) == 0
    scored = lines(memory, "/out/scored.jsonl")
    assert len(scored) == 8 and all(len(row["scores"]) == len(row["responses"]) for row in scored)
    assert "rewards" in scored[0] and b"<title>" in memory.cat("/out/page.html")
    names = {path.removeprefix("/out/") for path in memory.find("/out")}
    outputs = {"records.parquet", "sampled.jsonl", "scored.jsonl", "page.html"}
    assert names == outputs | {f"{name}.sha256" for name in outputs}  # nothing else, and no half of anything
    assert not list((tmp_path / "cache/remote/outputs").iterdir())  # what is up is not kept twice
    assert main([*SCORE, "memory://out/scored.jsonl"]) == 2
    assert "memory://out/scored.jsonl exists already" in capfd.readouterr().err


def test_what_could_not_be_sent_is_kept_and_sent_by_the_same_command(
    memory: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    upload = Store.upload

    def fails(self: Store, *rest: Any, **options: Any) -> None:
        if self.name == "scored.jsonl":
            raise UserError(f"{self}: cannot be written")
        upload(self, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", fails)
        assert main([*SCORE, "memory://out/scored.jsonl"]) == 2
    assert memory.find("/out") == []
    other = [part.replace("vowels", "spaces") for part in SCORE]
    assert main([*other, "memory://out/scored.jsonl"]) == 2
    assert "an earlier command's result lies at" in capfd.readouterr().err
    monkeypatch.setattr("rrhf.rewards.stage.score_file", None)  # nothing is scored again
    assert main([*SCORE, "memory://out/scored.jsonl"]) == 0
    assert len(lines(memory, "/out/scored.jsonl")) == 8 and "is sent now" in capfd.readouterr().err


def test_no_work_is_begun_for_a_place_that_cannot_be_written(
    memory: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rrhf.rewards.stage.score_file", None)

    def denied(self: Any, *rest: Any, **options: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(memory), "put_file", denied)
    assert main([*SCORE, "memory://out/scored.jsonl"]) == 2
    assert "Access Denied: give credentials" in capfd.readouterr().err


def test_models_are_read_and_written_at_urls(memory: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every command that reads or writes a model, one after another; no output names the copies in the cache."""
    memory.put(str(tiny.write_model(tmp_path / "policy")), "/in/policy", recursive=True)
    memory.pipe("/in/pairs.jsonl", memory.cat("/in/data.jsonl"))
    settings = tiny.config(tmp_path)["train"]
    steps = [f"--{name}={value}" for name, value in {**settings, "max_steps": 1}.items() if name != "num_train_epochs"]
    device = ["--device", "cpu", "--dtype", "float32"]
    model, data = ["--model", "memory://in/policy", *device], ["--data", "memory://in/data.jsonl"]
    reward, short = ["--reward", "tiny_rewards:vowels"], ["--max_new_tokens", "3"]

    def out(name: str) -> list[str]:
        return ["--output", f"memory://out/{name}"]

    train = ["train", *model, *data, "--eval_data", "memory://in/pairs.jsonl", *steps]
    watched = ["--watch_steps", "1", "--watch_data", "memory://in/data.jsonl", "--watch_reward", "tiny_rewards:vowels"]
    assert main([*train, *watched, "--watch_max_new_tokens", "3", *out("model")]) == 0
    assert "model.safetensors" in at(memory, "model") and "training.json" in at(memory, "model")
    assert main(["evaluate", "--model", "memory://out/model", *device, *data, "--pairs", "memory://in/pairs.jsonl",
                 *reward, *short, *out("numbers.json")]) == 0  # fmt: skip
    numbers = json.loads(memory.cat("/out/numbers.json"))
    assert numbers["perplexity_model"] == "memory://out/model"
    assert numbers["accuracy"]["file"] == "memory://in/pairs.jsonl" and memory.exists("/out/numbers.generations.jsonl")
    assert main(["publish", "memory://out/model", "--to", "card"]) == 0
    assert b"Written by rrhf" in memory.cat("/out/model/README.md")
    assert main(["baseline", "sft", "--fit", "human/1", *model, *data, *steps, *out("sft")]) == 0
    assert "model.safetensors" in at(memory, "sft") and memory.exists("/out/sft-data.jsonl")
    few = ["--rollout_queries", "2", "--max_steps", "1", "--ppo_epochs", "1", "--per_device_train_batch_size", "2"]
    assert main(["baseline", "ppo", *model, *data, *reward, *short, *few, "--num_responses", "2", *out("ppo")]) == 0
    assert "model.safetensors" in at(memory, "ppo")
    best = ["baseline", "best-of-n", *model, *data, *reward, *short, "--num_responses", "2", *out("best")]
    assert main(best) == main(best) == 0  # the second goes on, and finds all done
    assert "evaluation.json" in at(memory, "best")
    assert main(["reward-model", *model, *data, "--eval_data", "memory://in/pairs.jsonl", "--max_steps", "1",
                 "--max_length", "64", "--per_device_train_batch_size", "2", *out("rm")]) == 0  # fmt: skip
    assert main(["score", *data, "--reward", "memory://out/rm", *device, *out("scored.jsonl")]) == 0
    assert "memory://out/rm" in lines(memory, "/out/scored.jsonl")[0]["rewards"]
    assert main(["report", "memory://out/model", "memory://out/best", "--results", "memory://out/numbers.json",
                 *out("page.html")]) == 0  # fmt: skip
    assert b"Accuracy" in memory.cat("/out/page.html")
    here = re.compile(rb".{0,60}" + str(tmp_path).encode() + rb".{0,99}")  # but for transformers' own arguments
    named = {path: here.findall(memory.cat(path)) for path in memory.find("/out") if not path.endswith("args.bin")}
    assert not {path: found for path, found in named.items() if found}
    capfd.readouterr()
    assert main([*train, *out("model")]) == 2
    assert "memory://out/model exists already" in capfd.readouterr().err
    memory.pipe("/in/data.jsonl", b'{"query": 1}\n')
    assert main(["inspect", "memory://in/data.jsonl"]) == 2
    assert "memory://in/data.jsonl" in (said := capfd.readouterr().err) and str(tmp_path) not in said


def at(fs: Any, name: str) -> list[str]:
    """The files of a folder that a command has sent, without a checkpoint; all stand in its list."""
    sent = [path.removeprefix(f"/out/{name}/") for path in fs.find(f"/out/{name}")]
    assert not [path for path in sent if "checkpoint" in path]
    assert len(fs.cat(f"/out/{name}/{SUMS}").decode().splitlines()) == len(sent) - 1
    return sent


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A file system on a real server of S3's protocol on loopback, with a bucket; children find it too."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "planted-key", "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    yield fs
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def run(folder: Path, url: str, disk: str, *faults: Any) -> tiny.Result:
    """``rrhf run`` to a URL on a machine whose disk is ``disk``."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    env = {name: os.environ[name] for name in names} | {"RRHF_CACHE": str(folder / disk)}
    return tiny.warm("run", "config.yaml", "--output", url, cwd=folder, faults=faults, env=env)


def test_a_run_on_s3_is_killed_and_goes_on_with_an_empty_disk(s3: Any, tmp_path: Path) -> None:
    """Killed in training and again in the evaluation: what is up is not made again, and the end is the same."""
    s3.put(str(tiny.write_model(tmp_path / "policy")), "bucket/policy", recursive=True)
    config = tiny.config(Path("x"))
    config |= {"model": "s3://bucket/policy"}
    config["data"] = {"source": "s3://bucket/data.jsonl", "limit": 8, "held_out_limit": 3}
    config["train"]["num_train_epochs"] = 1
    folder = tiny.workplace(tmp_path / "work", config)
    s3.put(str(folder / "data.jsonl"), "bucket/data.jsonl")
    run(folder, "s3://bucket/whole", "disk").done()
    step = "rrhf.training.trainer:RRHFTrainer.training_step"
    assert run(folder, "s3://bucket/run", "first", tiny.die(step, 2)).code == -9
    up = {path.removeprefix("bucket/run/") for path in s3.find("bucket/run")}
    assert {"queries.jsonl", "responses.jsonl", "scored.jsonl"} <= up and not [n for n in up if n.startswith("model")]
    asked = tmp_path / "asked"
    faults = [tiny.count(f"rrhf.recipes.offline:{work}", asked) for work in ("write_queries", "_sample", "_score")]
    faults += [tiny.die("rrhf.evaluation.stage:write_text", 2)]
    assert run(folder, "s3://bucket/run", "second", *faults).code == -9
    done = run(folder, "s3://bucket/run", "third", tiny.count("rrhf.recipes.offline:_train", asked)).done()
    assert not asked.exists()  # what was up was made once
    assert "finished files were there already" in done.err and "report: " in done.out
    s3.invalidate_cache()
    assert {p.removeprefix("bucket/whole/") for p in s3.find("bucket/whole")} == {
        p.removeprefix("bucket/run/") for p in s3.find("bucket/run")
    }, done
    for name in ("queries.jsonl", "responses.jsonl", "scored.jsonl", "model/model.safetensors",
                 "evaluation.generations.jsonl"):  # fmt: skip
        assert s3.cat(f"bucket/run/{name}") == s3.cat(f"bucket/whole/{name}"), name
    everything = b"".join(s3.cat(path) for path in s3.find("bucket/run")) + done.err.encode() + done.out.encode()
    assert b"planted-" not in everything and yaml.safe_load(s3.cat("bucket/run/config.yaml"))["model"].startswith("s3:")
    listed = {line.partition("  ")[2] for line in s3.cat(f"bucket/run/{SUMS}").decode().splitlines()}
    assert listed == {path.removeprefix("bucket/run/") for path in s3.find("bucket/run")} - {SUMS}


def test_s3_faults_say_how_to_mend_them(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", ())
    monkeypatch.setenv("RRHF_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no such file, folder or bucket: check the name"):
        Store("s3://nowhere/out.jsonl").check_writable(tmp_path)
    with pytest.raises(UserError, match="no such file, folder or bucket: check the name"):
        remote.fetched("s3://bucket/none.jsonl")
    Store("s3://bucket/deep/out.jsonl").check_writable(tmp_path)
    assert not s3.exists("bucket/deep")
