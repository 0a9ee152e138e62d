"""How much memory a training run needs, before it starts, and how many tokens a forward pass may have.

At its fullest, before the backward pass of a step's last forward, a process holds

    weights + gradients + fp32 masters + the optimiser's moments + activations + logits

A step of one forward has no gradients yet at that moment.
Activations grow linearly with a forward's tokens; what a token takes depends on the model's code, the precision and the
kernels, so it is counted: two small forward passes, whose difference gives the bytes of one token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rrhf.common.presentation import text_table
from rrhf.models.batching import SIZES
from rrhf.models.devices import free_memory
from rrhf.models.forward import causal_lm
from rrhf.models.load import positions_in_table
from rrhf.models.logprobs import KEPT_BYTES
from rrhf.models.tokenization import EncodedRecord
from rrhf.training.config import RRHFConfig
from rrhf.training.forward import forward_records
from rrhf.training.master_weights import BUCKET

GB = 1e9

# -- the token budget

CPU_TOKENS, MOST_TOKENS, LEAST_TOKENS = 2048, 16384, 1024
SHARE = 0.7  # of what weights and optimiser leave free: the rest is for logits, gradients in passing and fragments
TOKEN_STEP = 512


def token_budget(device: str, free_bytes: int | None, parameters: int, width: int, layers: int) -> int:
    """The default of ``--max_tokens_per_forward``.

    A CPU takes 2,048: larger forwards are no faster there. A GPU takes as many as fit, at most 16,384: what is free
    once the weights are loaded, less 14 bytes a parameter (gradient, fp32 master, two moments), at 34 numbers of 2
    bytes of the model's width a token and layer (arXiv 2205.05198, without attention's weights).

    Args:
        device: its kind: ``cpu``, ``cuda``, ``mps``.
        free_bytes: after the weights were loaded; None where it is not known.
        parameters: that are trained.
        width, layers: of the model: the size of a hidden state, and how many layers there are.
    """
    if device == "cpu" or free_bytes is None:
        return CPU_TOKENS
    left = SHARE * (free_bytes - 14 * parameters)
    tokens = int(left / max(34 * 2 * width * layers, 1))
    return min(max(tokens - tokens % TOKEN_STEP, LEAST_TOKENS), MOST_TOKENS)


# -- what a run needs


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at its fullest.

    ``activations`` and ``logits`` are those of a forward of ``tokens`` tokens; ``step`` is what an optimiser's step
    takes in passing, when activations are gone. ``one_forward``: a step has no second one, so that gradients come only
    as the activations go. ``free``: what the device has, the weights that are loaded counted.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    logits: int
    step: int
    tokens: int
    one_forward: bool
    device: str
    free: int | None

    @property
    def total(self) -> int:
        forward, kept = self.activations + self.logits, self.weights + self.masters + self.moments
        if self.one_forward:
            return kept + max(forward, self.gradients + self.step)
        return kept + self.gradients + max(forward, self.step)

    @property
    def fits(self) -> bool:
        return self.free is None or self.total <= self.free

    def rows(self) -> list[tuple[str, int | None]]:
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("fp32 masters", self.masters),
            ("optimiser's moments", self.moments),
            (f"activations, {self.tokens} tokens a forward", self.activations),
            ("logits and the output layer's gradient", self.logits),
            ("sum, at its fullest", self.total),
            (f"the device has ({self.device})", self.free),
        ]

    def table(self) -> str:
        rows = [[name, "unknown" if size is None else f"{size / GB:.2f} GB"] for name, size in self.rows()]
        return text_table(["memory of one process", "size"], rows)

    def line(self) -> str:
        parts = [f"{name} {size / GB:.2f}" for name, size in self.rows()[:-2] if size]
        has = "" if self.free is None else f"; the device has {self.free / GB:.2f}"
        return f"memory: about {self.total / GB:.2f} GB ({', '.join(parts)}){has}"

    def advice(self) -> str:
        return (
            "this run will probably not fit: take a smaller --max_tokens_per_forward, --gradient_checkpointing, "
            "--keep_logits false, --optim adafactor, --peft lora, or FSDP2 over several GPUs (docs/distributed.md)"
        )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory, shared memory counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# Bytes of an optimiser's state for a parameter of so many numbers and this shape, fp32 where nothing else is said.
def _two_moments(shape: Sequence[int], size: int) -> int:
    return 8 * size


def _eight_bit(shape: Sequence[int], size: int) -> int:
    return 2 * size + 8 * -(-size // 256) if size >= 4096 else 8 * size  # bitsandbytes: blocks of 256; small ones fp32


def _factored(shape: Sequence[int], size: int) -> int:
    return 4 * (size // shape[-1] + size // shape[-2]) if len(shape) > 1 else 4 * size


def _none(shape: Sequence[int], size: int) -> int:
    return 0


MOMENTS: dict[str, Callable[[Sequence[int], int], int]] = {
    "adafactor": _factored,
    "sgd": _none,
    "adagrad": lambda shape, size: 4 * size,
    "rmsprop": lambda shape, size: 4 * size,
    "lion_8bit": lambda shape, size: _eight_bit(shape, size) // 2,
    "lion": lambda shape, size: 4 * size,
    "8bit": _eight_bit,
    "adamw": _two_moments,
}


def moment_bytes(optimiser: str, parameters: Iterable[nn.Parameter]) -> int:
    """The state of transformers' ``--optim`` name; an unknown one counts as Adam's two fp32 moments."""
    size = next((rule for part, rule in MOMENTS.items() if part in optimiser), _two_moments)
    return sum(size(p.shape, p.numel()) for p in parameters)


def step_bytes(optimiser: str, parameters: Sequence[nn.Parameter]) -> int:
    """What a step takes in passing: fp32 gradients of low-precision weights, a bucket at a time."""
    low = [p.numel() for p in parameters if p.dtype != torch.float32]
    bucket = 4 * min(sum(low), max(BUCKET, max(low, default=0)))
    largest = max((p.numel() for p in parameters), default=0)
    return bucket + (4 * 2 * largest if "adafactor" in optimiser else 0)


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that were made while it is active and still live: ``now``, and at most ``most``.

    Args:
        known: tensors that were there before, such as parameters.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known or key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.now += self.live[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


PROBES = (64, 192)  # tokens of the two forward passes that are counted
PROBE_RESPONSE = 9


def plan_memory(
    model: PreTrainedModel,
    records: Sequence[EncodedRecord],
    args: RRHFConfig,
    path: str,
    autocast: Callable[[], AbstractContextManager[Any]],
    shards: int = 1,
) -> MemoryPlan:
    """What training ``model`` on ``records`` will take in one process; two small forward passes are made for it.

    Args:
        model: prepared by ``accept_records``, on its device; not sharded yet. Its random states and modes are put back.
        autocast: the context that its forward passes run in.
        shards: processes that weights, gradients and optimiser will be split over (FSDP).
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    sizes = sorted((SIZES[path](record) for record in records), reverse=True)
    step = sizes[: args.per_device_train_batch_size * args.gradient_accumulation_steps]
    budget = int(args.max_tokens_per_forward or CPU_TOKENS)
    tokens = min(max(budget, _largest_part(records, path)), sum(step))
    fixed, slope = _activations(model, records, args, path, autocast)
    answered = sum(len(response) for record in records for response in record.responses) / max(sum(sizes), 1)
    head = causal_lm(model).get_output_embeddings().weight
    free = free_memory(device)
    copies = 2 if args.world_size > 1 and shards == 1 else 1  # DDP's buckets hold the gradients a second time
    low = [p for p in trained if p.dtype != torch.float32]
    return MemoryPlan(
        weights=weights // shards,
        gradients=copies * sum(p.nbytes for p in trained) // shards,
        masters=sum(4 * p.numel() for p in low) // shards,
        moments=moment_bytes(str(args.optim.value), trained) // shards,
        activations=int(fixed + slope * tokens),
        logits=_logit_bytes(head, int(answered * tokens), args.keep_logits),
        step=step_bytes(str(args.optim.value), trained),
        tokens=tokens,
        one_forward=sum(step) <= budget and copies == 1,
        device=str(device),
        free=None if free is None else free + weights,
    )


def _largest_part(records: Sequence[EncodedRecord], path: str) -> int:
    """The rows of the largest query with one response: what no slice can be smaller than."""

    def rows(record: EncodedRecord) -> int:
        longest = max(record.responses, key=len, default=[])
        return SIZES[path](EncodedRecord(record.id, record.query, [longest], [None]))

    return max(map(rows, records), default=0)


def _logit_bytes(head: Tensor, rows: int, keep: bool) -> int:
    """Logits that are kept, the output layer's gradient before it is added up, and its hidden states' (twice)."""
    kept = rows * head.shape[0] * head.element_size()
    kept = kept if keep and kept <= KEPT_BYTES else 0
    return kept + (head.nbytes if head.requires_grad else 0) + 2 * rows * head.shape[1] * 4


def _activations(
    model: PreTrainedModel,
    records: Sequence[EncodedRecord],
    args: RRHFConfig,
    path: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float]:
    """Bytes that a forward's graph keeps whatever its tokens, and bytes a token."""
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    positions = positions_in_table(causal_lm(model)) or max(PROBES)
    sizes, kept = [], []
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(forked), autocast():
            for size in PROBES:
                record = _probe(records, size, positions)
                sizes.append(SIZES[path](record))
                kept.append(_kept(model, record, path, device))
    finally:
        model.train(was_training)
    slope = max(kept[1] - kept[0], 0) / max(sizes[1] - sizes[0], 1)
    # newer transformers call the same activation_checkpointing
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
        # a hidden state a layer, and all of one layer that is computed again
        layers = causal_lm(model).config.get_text_config().num_hidden_layers
        embedding = model.get_input_embeddings().weight
        slope = slope / layers + embedding.shape[-1] * embedding.element_size() * layers
    return max(kept[0] - slope * sizes[0], 0.0), slope


def _probe(records: Sequence[EncodedRecord], tokens: int, positions: int) -> EncodedRecord:
    """A record of about so many tokens, with the data's share of query tokens, in rows within ``positions``."""
    query = sum(len(record.query) for record in records)
    share = query / max(query + sum(len(y) for record in records for y in record.responses), 1)
    most = max(1, min(round(tokens * share), positions - PROBE_RESPONSE))
    responses = max(1, round((tokens - most) / PROBE_RESPONSE))
    return EncodedRecord("probe", [0] * most, [[0] * PROBE_RESPONSE] * responses, [None] * responses)


def _kept(model: PreTrainedModel, record: EncodedRecord, path: str, device: torch.device) -> int:
    """Bytes of the graph after one forward pass."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        outputs = forward_records(model, [record], path)
        kept = torch.cuda.memory_allocated(device) - before
        del outputs
        return kept
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        outputs = forward_records(model, [record], path)
        kept = live.now
    del outputs
    return kept
