"""A whole tiny world for end-to-end tests: a random model with a real tokenizer, rewards, data, and a command line.

Faults are put into real processes: a process kills itself (or counts) at the n-th call of a named function, so a test
needs neither sleeps nor luck. ``cold`` starts ``python -m rrhf.cli``, which takes them through ``sitecustomize``;
``warm`` runs the same ``main`` in a child of a process that has imported the libraries already, which saves their
import at every call.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rrhf.common.files import json_lines

LONG = bool(os.environ.get("RRHF_LONG"))
FAULTS = "RRHF_TEST_FAULTS"
HANGS_AFTER = 240  # seconds

SENTENCES = (
    "The river was high that spring and the old bridge stood in the water up to its stones.",
    "She read the letter twice, folded it and put it into the drawer of the kitchen table.",
    "Nobody in the village could say who had rung the bell, or why it had rung so long.",
    "A good film needs a story, two people who want something, and a door between them.",
    "He counted the lamps along the harbour: nine, ten, eleven, and then the dark again.",
    "What is the capital of the country where the bread is sweet and the coffee is bitter?",
    "The train left on time, which surprised the three passengers and the conductor alike.",
    "Write a short poem about the sea, a list of the tools on the table, and a joke.",
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

REWARDS = '''"""Rewards of the tests: functions of the text alone."""


def vowels(prompts, completions, **columns):
    return [share(text(completion), "aeiou") for completion in completions]


def spaces(prompts, completions):
    return [share(text(completion), " ") for completion in completions]


def text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def share(text, letters):
    return sum(letter in letters for letter in text) / (len(text) or 1)
'''


# --- model, data, configuration --------------------------------------------------------------------------------------


def write_model(folder: Path, chat: bool = True) -> Path:
    """A random Llama of two layers with a byte-level BPE tokenizer of 320 entries, a chat template and an end token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    if chat:
        fast.add_special_tokens({"additional_special_tokens": special[1:]})
        fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=fast.eos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_rewards(folder: Path) -> None:
    """The module ``tiny_rewards`` for commands that run in ``folder``."""
    (folder / "tiny_rewards.py").write_text(REWARDS, encoding="utf-8")


def rows(count: int, responses: int = 2, scores: bool = True, messages: bool = False) -> list[dict[str, Any]]:
    """Rows with distinct queries and provided responses."""
    made = []
    for i in range(count):
        words = SENTENCES[i % len(SENTENCES)].split()
        query: Any = f"{i} " + " ".join(words[: 3 + i % 4])
        if messages:
            query = [{"role": "user", "content": query}]
        row: dict[str, Any] = {"id": f"q{i}", "query": query, "topic": f"topic {i % 3}"}
        if responses:
            row["responses"] = [" " + " ".join(words[4 + j : 9 + j]) for j in range(responses)]
            row["sources"] = [f"human/{j}" for j in range(responses)]
            row["finish"] = ["length"] * responses
        if responses and scores:
            row["scores"] = [round(0.1 * j + 0.01 * i, 3) for j in range(responses)]
        made.append(row)
    return made


def write_rows(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json_lines(path)


def config(model: Path) -> dict[str, Any]:
    """A run of 20 queries in seconds: 3 parts of sampling, 10 steps with a checkpoint every second."""
    return {
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "seed": 3,
        "data": {"source": "data.jsonl", "limit": 20, "held_out_limit": 9},
        "sample": {"policy": "top-p", "num_responses": 3, "max_new_tokens": 6, "batch_size": 2},
        "score": {"reward": ["tiny_rewards:vowels"]},
        "train": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_length": 64,
            "logging_steps": 1,
            "save_steps": 2,
            "bf16": False,
            "report_to": "none",
        },
        "evaluate": {
            "reward": ["tiny_rewards:vowels", "tiny_rewards:spaces"],
            "policy": "top-k",
            "top_k": 20,
            "max_new_tokens": 6,
            "batch_size": 1,
        },
    }


def workplace(folder: Path, settings: dict[str, Any], data: Iterable[dict[str, Any]] | None = None) -> Path:
    """A folder to run commands in: ``config.yaml``, ``data.jsonl`` and the rewards."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    write_rewards(folder)
    write_rows(folder / "data.jsonl", rows(29) if data is None else data)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def refused_before_any_work(folder: Path, command: Sequence[str], overrides: Sequence[str], message: str) -> None:
    """A run of ``folder`` that ends with the message, and no traceback, before it has read its data."""
    result = warm(*command, *overrides, cwd=folder)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (folder / "run/queries.jsonl").exists()


# --- faults ----------------------------------------------------------------------------------------------------------


def die(at: str, call: int, how: str = "KILL") -> dict[str, Any]:
    """The process sends itself a signal at the n-th ``call`` of the function ``at`` (module:name), before it runs."""
    return {"at": at, "call": call, "how": how}


def count(at: str, file: Path) -> dict[str, Any]:
    """Every call of ``at`` adds a line to ``file``."""
    return {"at": at, "file": str(file)}


def put(at: str, value: Any) -> dict[str, Any]:
    """``at`` gets another value."""
    return {"at": at, "value": value}


def fill(at: str, call: int, limit: int) -> dict[str, Any]:
    """From the n-th ``call`` of ``at`` on no file of the process can grow past ``limit`` bytes: a disk that is full."""
    return {"at": at, "call": call, "limit": limit}


def lack(at: str, call: int, times: int = 1) -> dict[str, Any]:
    """From the n-th ``call`` of ``at`` on it runs out of memory so many ``times``, as torch says it."""
    return {"at": at, "call": call, "lack": times}


def at_moment(line: int, **action: Any) -> dict[str, Any]:
    """Before the n-th ``line`` that the package runs: ``how`` a signal (default KILL), ``remove`` a folder, let the
    ``clock`` jump by seconds, ``limit`` all files to so many bytes, or ``hold`` still until two FIFOs there are met."""
    return {"at": "rrhf:", "line": line, **action}


def poison(at: str, call: int) -> dict[str, Any]:
    """After the n-th ``call`` of the method ``at`` of a trainer a gradient is not a number."""
    return {"at": at, "call": call, "poison": True}


def install_faults(faults: Sequence[dict[str, Any]]) -> None:
    """Install faults in this process: in modules that are loaded now, in the others when they are."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for fault in faults:
        if "line" in fault or "lines" in fault:
            _watch_lines(fault)
            continue
        module = fault["at"].partition(":")[0]
        if module in sys.modules:
            _install(fault, sys.modules[module])
        else:
            waiting.setdefault(module, []).append(fault)
    if waiting:
        sys.meta_path.insert(0, _FaultImporter(waiting))  # type: ignore[arg-type]


class _FaultImporter:
    """Finds modules as the others do and installs their faults once they are loaded."""

    def __init__(self, waiting: dict[str, list[dict[str, Any]]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        faults = self.waiting.get(name)
        if not faults:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                for fault in faults:
                    _install(fault, module)

            spec.loader.exec_module = exec_module
        return spec


def _watch_lines(fault: dict[str, Any]) -> None:
    """Die before the n-th ``line`` that the package runs, in whatever file; or note in ``lines`` how many it ran."""
    package = str(Path(importlib.import_module(fault["at"].partition(":")[0]).__file__ or "").parent)
    seen = 0

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            seen += 1
            if seen == fault.get("line"):
                sys.settrace(None)
                _act(fault)
        return watch

    sys.settrace(watch)
    if "lines" in fault:
        _AT_THE_END.append(lambda: Path(fault["lines"]).write_text(str(seen), encoding="utf-8"))


_AT_THE_END: list[Callable[[], object]] = []  # of a child


def _act(fault: dict[str, Any]) -> None:
    """Do to this process what the fault says."""
    if "limit" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
    elif "remove" in fault:
        shutil.rmtree(fault["remove"], ignore_errors=True)
    elif "clock" in fault:
        now = time.time
        time.time = lambda: now() + fault["clock"]
    elif "hold" in fault:
        Path(fault["hold"], "entered").open("w").close()
        with Path(fault["hold"], "met").open("rb", buffering=0) as released:
            released.read(1)
    else:
        os.kill(os.getpid(), signal.Signals[f"SIG{fault.get('how', 'KILL')}"])


def _install(fault: dict[str, Any], module: Any) -> None:
    *path, name = fault["at"].partition(":")[2].split(".")
    owner = functools.reduce(getattr, path, module)
    if "value" in fault:
        setattr(owner, name, fault["value"])
        return
    function = getattr(owner, name)
    calls = 0

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if "file" in fault:
            with open(fault["file"], "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(fault["at"] + "\n")
        elif "poison" in fault:
            result = function(*args, **kwargs)
            if calls == fault["call"]:
                owner = args[0]
                found = owner.parameters if hasattr(owner, "parameters") else list(owner.model.parameters())
                next(p for p in found if p.grad is not None).grad.view(-1)[0] = float("nan")
            return result
        elif "lack" in fault:
            if fault["call"] <= calls < fault["call"] + fault["lack"]:
                import torch

                raise torch.OutOfMemoryError("out of memory: tried to allocate 1 TiB")
        elif calls == fault["call"]:
            _act(fault)
        return function(*args, **kwargs)

    setattr(owner, name, watched)


# --- the command line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a process ended: its exit code (minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str

    def done(self) -> Result:
        assert self.code == 0, self.err[-3000:]
        return self


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """One thread a process: the same sums in every run."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a forked child would lack that thread
        **(extra or {}),
    }


def heed_signals() -> None:
    """Give a child its signals' default effects (as ``preexec_fn``): a test run in the background ignores some."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def cold(
    *arguments: str,
    cwd: Path,
    faults: Sequence[dict[str, Any]] = (),
    env: dict[str, str] | None = None,
    launcher: Sequence[str] = (),
    **options: Any,
) -> Result:
    """``python [launcher] -m rrhf.cli …`` in a process of its own."""
    limits = options.pop("preexec_fn", None)

    def prepare() -> None:
        heed_signals()
        if limits is not None:
            limits()

    with tempfile.TemporaryDirectory() as folder:
        site = "import sys\nsys.path.append({!r})\nfrom support import tiny\ntiny.install_faults_from_environment()\n"
        Path(folder, "sitecustomize.py").write_text(site.format(str(Path(__file__).parent.parent)), encoding="utf-8")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        extra = {**(env or {}), "PYTHONPATH": os.pathsep.join(paths), FAULTS: json.dumps(list(faults))}
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "rrhf.cli", *arguments],
            cwd=cwd,
            env=environment(extra),
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * HANGS_AFTER,
            preexec_fn=prepare,
            **options,
        )
    return Result(done.returncode, done.stdout, done.stderr)


def install_faults_from_environment() -> None:
    install_faults(json.loads(os.environ.get(FAULTS, "[]")))


class Forks:
    """Runs functions in children of a process that has modules in memory and has computed nothing.

    The children are processes of their own, with their own signals, files and exit codes.
    """

    def __init__(self, *modules: str) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            preexec_fn=heed_signals,
        )
        self.folder = tempfile.TemporaryDirectory()
        self.number = 0

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        call: str,
        *arguments: Any,
        cwd: Path | None = None,
        faults: Sequence[dict[str, Any]] = (),
        env: dict[str, str] | None = None,
    ) -> tuple[int, Path]:
        """Start ``module:function`` with arguments that JSON can carry; its process id, and where it writes."""
        self.number += 1
        output = Path(self.folder.name, str(self.number))
        question = {
            "call": call,
            "arguments": arguments,
            "faults": list(faults),
            "env": env or {},
            "output": str(output),
        }
        return self._ask({**question, "cwd": str(cwd or self.folder.name)}), output

    def wait(self, started: tuple[int, Path]) -> Result:
        pid, output = started
        code = self._ask({"wait": pid})
        texts = [output.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err")]
        return Result(code, *texts)

    def __call__(self, call: str, *arguments: Any, **options: Any) -> Result:
        return self.wait(self.start(call, *arguments, **options))

    def close(self) -> None:
        if self.server.stdin is not None:
            self.server.stdin.close()
        self.server.wait()
        self.folder.cleanup()


@functools.cache
def forks(*modules: str) -> Forks:
    """The one such process of this test session with these modules."""
    server = Forks(*modules)
    atexit.register(server.close)
    return server


def warm(
    *arguments: str, cwd: Path, faults: Sequence[dict[str, Any]] = (), env: dict[str, str] | None = None
) -> Result:
    """``rrhf …`` in a process of its own that need not import the libraries first."""
    return forks(*PRELOADED)("rrhf.cli.main:main", list(arguments), cwd=cwd, faults=faults, env=env)


PRELOADED = (
    "torch", "rrhf.training.stage", "rrhf.recipes.reproduce.page", "rrhf.training.online", "rrhf.report.page",
    "rrhf.report.plots",
    "rrhf.evaluation.evaluate",
    "rrhf.sampling.decoding", "rrhf.sampling.policies", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "pyarrow.parquet",
    "matplotlib.pyplot", "yaml", "rrhf.cli.run", "rrhf.cli.sample", "rrhf.cli.score",
    "rrhf.cli.train", "rrhf.cli.evaluate",
)  # fmt: skip


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(question)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


_COPIERS: list[int] = []


def _unlimited(path: str) -> int:
    """A pipe into ``path`` through a process of its own, which the limits on files of this one do not meet."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor in (1, 2, writing):
            os.close(descriptor)
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        while block := os.read(reading, 65536):
            os.write(file, block)
        os._exit(0)
    os.close(reading)
    _COPIERS.append(pid)
    return writing


def _child(question: dict[str, Any]) -> None:
    """Become the process that was asked for."""
    code: Any = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(question["output"] + suffix, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
            if any("limit" in fault for fault in question["faults"]):
                pipe = _unlimited(question["output"] + suffix)
                os.dup2(pipe, descriptor)
                os.close(pipe)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)  # rather than a test run that never ends
        os.chdir(question["cwd"])
        os.environ.update(question["env"])
        install_faults(question["faults"])
        module, _, name = question["call"].partition(":")
        code = getattr(importlib.import_module(module), name)(*question["arguments"]) or 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        traceback.print_exc()
        code = 2 if type(error).__name__ == "UserError" else 1
    finally:
        for act in _AT_THE_END:
            act()
        sys.stdout.flush()
        sys.stderr.flush()
        if _COPIERS:
            for descriptor in (1, 2):
                os.close(descriptor)
            for pid in _COPIERS:
                os.waitpid(pid, 0)
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # where tests find each other
    _serve()
