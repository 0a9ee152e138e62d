"""Which pass a model takes: trees where that is shown to be right, padded rows everywhere else."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.common.errors import UserError
from rrhf.models.attention import Layout, takes_layouts
from rrhf.models.batching import tree_tokens
from rrhf.models.end_states import padded_end_states, tree_end_states
from rrhf.models.flex_check import check_flex
from rrhf.models.forward import causal_lm
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.choice import wants_flex
from rrhf.models.load import context_length
from rrhf.models.out_of_memory import is_out_of_memory
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.shared_prefix import Forest, forest_logprobs, lay_out
from rrhf.models.tokenization import EncodedRecord

log = logging.getLogger("rrhf")

COPIED_PARAMETERS = 2_000_000_000  # a low-precision model up to this size is checked on a copy in fp32
# Settings of attention that change nothing in rows up to their length: windows, chunks, chosen keys, Llama 4's scale.
LIMITS = ("sliding_window", "attention_chunk_size", "index_topk", "floor_scale")
# Settings that give the number of experts. Their matrices have as many rows as tokens were sent to them, so that
# another response may change how a product is summed; in a dense model every number stays what it is.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERT_ULPS = 16  # units in the last place of a log-probability that may differ for that reason
# Products of quantised weights may round all rows by the largest of them: the others' sums then change by what their
# padded rows, which cannot read each other, change by in the same exchange; up to so many times that is no leak.
QUANTISED_CHANGE = 4


class Numbers(NamedTuple):
    """What a pass gives for R responses: ``values`` [R, n], and [R, 1] by how much to divide them for one token's."""

    values: Tensor
    tokens: Tensor


class Passes(NamedTuple):
    """Two passes whose numbers are compared. The tree's may get a function that gives the layout for the forest's."""

    name: str
    tree: Callable[[PreTrainedModel, Sequence[EncodedRecord], Callable[[Forest], Layout] | None], Numbers]
    padded: Callable[[PreTrainedModel, Sequence[EncodedRecord]], Numbers]


def _tree_logprobs(
    model: PreTrainedModel, records: Sequence[EncodedRecord], watch: Callable[[Forest], Layout] | None
) -> Numbers:
    forest = lay_out(records, model.get_input_embeddings().weight.device, wants_flex(model))
    logprobs = forest_logprobs(model, forest, layout=None if watch is None else watch(forest))
    return Numbers(logprobs.sums[:, None], logprobs.lengths.clamp(min=1)[:, None])


def _padded_logprobs(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> Numbers:
    logprobs = padded_logprobs(model, records)
    return Numbers(logprobs.sums[:, None], logprobs.lengths.clamp(min=1)[:, None])


def _states(states: Tensor) -> Numbers:
    """Of vectors, each divided by its length: their size is a matter of the model's, not of the pass."""
    values = states if states.dtype == torch.float64 else states.float()
    return Numbers(values, values.norm(dim=1, keepdim=True).clamp(min=1e-6))


LOGPROBS = Passes("log-probabilities", _tree_logprobs, _padded_logprobs)
END_STATES = Passes(
    "last hidden states",
    lambda model, records, watch: _states(tree_end_states(model, records, watch)),
    lambda model, records: _states(padded_end_states(model, records)),
)


def usable_path(model: PreTrainedModel, longest_row: int = 0, passes: Passes = LOGPROBS) -> str:
    """``"tree"`` where the tree pass gives the padded pass's numbers on this model, else ``"padded"``, which is logged.

    A small random record runs through both. Every layer must have attended by the tree's layout, once; the sums must be
    equal; and exchanging one response for another must not change the others' sums. Layers with a window, a chunk or a
    number of chosen keys are only told apart by rows that outgrow it, so where ``longest_row`` (the longest tree
    of the data, in tokens) does, the check's row does too.

    Sums are equal to 0.001 a token in fp32, where a model in a lower precision is compared by a copy in fp32. Compared
    as they are, and to 0.05 + 0.02 · |log-probability| a token, are models too large for a copy, those for whose copy
    the memory does not suffice, and quantised weights, which cannot be cast.

    ``passes``: ``END_STATES`` compares the vectors that heads read, for a model without an output layer, instead.

    Raises:
        UserError: the memory does not suffice for a record of a few tokens.
    """
    model = causal_lm(model)
    if not takes_layouts(model):
        return _padded(model, "its attention cannot be exchanged")
    was_training = model.training
    model.eval()
    try:
        check_flex(model, _probe(model, longest_row))
        with torch.no_grad(), _full_precision():
            fault = (
                _layers_without_layout(model, passes)
                or _other_numbers(model, passes, longest_row)
                or _leak(model, passes)
            )
    except Exception as error:  # whatever a model's code raises on an unusual layout, the padded pass remains
        if is_out_of_memory(error):
            raise UserError(_without_memory(model, longest_row, error)) from error
        fault = f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    return "tree" if fault is None else _padded(model, fault)


class KeptPath:
    """``usable_path`` of one model, checked again only where rows outgrow one of its windows."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._checked = 0  # tokens of the longest tree that the path was checked for

    def __call__(self, model: PreTrainedModel, records: Sequence[EncodedRecord]) -> str:
        longest = max(map(tree_tokens, records), default=0)
        config = model.config.get_text_config()
        limits = [getattr(config, name, None) or 0 for name in LIMITS]
        if self._path is None or any(self._checked <= limit < longest for limit in limits if limit):
            self._path, self._checked = usable_path(model, longest), longest
        self._checked = max(self._checked, longest)
        return self._path


def _padded(model: PreTrainedModel, why: str) -> str:
    if vars(model).get(_SAID) != why:  # stages that share a model ask one after the other
        vars(model)[_SAID] = why
        log.warning(
            f"{type(model).__name__} does not take the shared-prefix tree ({why}): every response is computed with its "
            "query in a padded row of its own, which is exact and slower"
        )
    return "padded"


_SAID = "_rrhf_padded_because"  # the attribute in which a model carries the reason that was logged


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """While it lasts, matrices in fp32 are multiplied in fp32: not in TF32 on a GPU or in bfloat16 by oneDNN."""
    before = torch.get_float32_matmul_precision()
    switches = [device.matmul for device in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(device, "matmul")]
    switches = [switch for switch in switches if hasattr(switch, "fp32_precision")]  # torch 2.9 and later
    each = [switch.fp32_precision for switch in switches]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for switch, precision in zip(switches, each, strict=True):
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


def _without_memory(model: PreTrainedModel, longest_row: int, error: Exception) -> str:
    device, tokens = model.get_input_embeddings().weight.device, len(_probe(model, longest_row).query)
    return (
        f"{type(model).__name__} in {model.dtype} on {device}: out of memory in the first forward pass, over {tokens} "
        "tokens and a few more. Give --dtype bfloat16, another --device or a smaller model, or free the device's "
        "memory; a smaller --max_tokens_per_forward helps only where more than this fits "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )


def _is_quantised(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "is_quantized", False)) or any(not p.is_floating_point() for p in model.parameters())


class _Counted:
    """A forest as the ``Layout`` of a forward call, how often each layer asked it, and which of them told a window."""

    def __init__(self, forest: Forest) -> None:
        self.forest, self.calls, self.windowed = forest, Counter[int](), set[int]()
        self.position_ids = forest.position_ids

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        self.calls[layer] += 1
        if call.window is not None:
            self.windowed.add(layer)
        return self.forest.attend(layer, call)


def _layers_without_layout(model: PreTrainedModel, passes: Passes) -> str | None:
    """A layer that mixes tokens in another way (a convolution, a recurrence) cannot know of trees."""
    layouts: list[_Counted] = []

    def watch(forest: Forest) -> Layout:
        layouts.append(_Counted(forest))
        return layouts[0]

    passes.tree(model, [_probe(model, 0)], watch)
    layers, calls = model.config.get_text_config().num_hidden_layers, layouts[0].calls
    if calls == Counter(range(layers)):
        return _windows_of_masks(model, passes, set(range(layers)) - layouts[0].windowed)
    once = sum(calls[layer] == 1 for layer in range(layers))
    return f"{once} of its {layers} layers attended by the tree once, {calls.total()} calls in all"


def _windows_of_masks(model: PreTrainedModel, passes: Passes, layers: set[int]) -> str | None:
    """A window that a mask alone tells (PhiMoE's, Qwen2-MoE's) is lost under a layout, which replaces the mask.

    Whether ``layers``, which told none, have one shows in a row of a few tokens once the configuration's is shorter.
    """
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    untold = [layer for layer in layers if not kinds or kinds[layer] == "sliding_attention"]
    if not window or not untold or window >= (context_length(config) or math.inf):
        return None
    record = _probe(model, 0)
    before = passes.padded(model, [record]).values
    config.sliding_window = 2
    try:
        after = passes.padded(model, [record]).values
    finally:
        config.sliding_window = window
    if torch.equal(before, after):
        return None  # a setting that this family does not read
    return f"{len(untold)} of its {config.num_hidden_layers} layers told a window of {window} tokens by the mask alone"


def _other_numbers(model: PreTrainedModel, passes: Passes, longest_row: int) -> str | None:
    record = _probe(model, longest_row)
    quantised = _is_quantised(model)
    low = quantised or any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    compared = None
    if low and not quantised and model.num_parameters() <= COPIED_PARAMETERS:
        compared = _compare_in_fp32(model, passes, record)
    exact = compared is not None or not low
    compared = compared or _compare(model, passes, record)
    # bfloat16 logits of random tokens are some 10 to 20 large and so 0.1 apart where only the rounding differs.
    if compared.worst <= (1e-3 if exact else 0.05 + 0.02 * compared.magnitude):
        return None
    return f"its tree {passes.name} differ by {compared.worst:.2g} a token"


@dataclass(frozen=True)
class _Comparison:
    """The largest difference of numbers a token between tree and padded rows, and the largest of them."""

    worst: float
    magnitude: float


def _compare(model: PreTrainedModel, passes: Passes, record: EncodedRecord) -> _Comparison:
    tree, padded = passes.tree(model, [record], None), passes.padded(model, [record])
    difference = ((tree.values - padded.values) / tree.tokens).norm(dim=1).max()
    return _Comparison(float(difference), float((padded.values / tree.tokens).norm(dim=1).max()))


def _compare_in_fp32(model: PreTrainedModel, passes: Passes, record: EncodedRecord) -> _Comparison | None:
    """``_compare`` on a copy, which then goes; ``None`` where the memory does not suffice for one."""
    try:
        return _compare(copy.deepcopy(model).float(), passes, record)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


def _leak(model: PreTrainedModel, passes: Passes) -> str | None:
    """Exchange one response after the other for one of equal length: the others' numbers must stay what they are."""
    record = _probe(model, 0)
    before = passes.tree(model, [record], None).values
    unread = passes.padded(model, [record]).values if _is_quantised(model) else None
    config, allowed = model.config.get_text_config(), torch.zeros(len(before), device=before.device)
    if any(getattr(config, name, None) for name in EXPERTS):
        ulp = torch.finfo(next(model.parameters()).dtype).eps
        allowed = EXPERT_ULPS * ulp * before.abs().amax(dim=1)
    for i, response in enumerate(record.responses):
        responses = list(record.responses)
        responses[i] = [(token + 1) % config.vocab_size for token in response]
        exchanged = replace(record, responses=responses)
        change = (passes.tree(model, [exchanged], None).values - before).abs().amax(dim=1)
        change[i] = 0.0
        by_rounding = torch.zeros_like(change)
        if unread is not None:
            by_rounding = (passes.padded(model, [exchanged]).values - unread).abs().amax(dim=1)
            by_rounding[i] = 0.0
        if not bool((change <= allowed + QUANTISED_CHANGE * by_rounding.max()).all()):
            return f"exchanging one response changes another's {passes.name} by {float(change.max()):.2g}"
    return None


def _probe(model: PreTrainedModel, longest_row: int) -> EncodedRecord:
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) or 0 for name in LIMITS]
    query = max([5, *(limit + 2 for limit in limits if limit < longest_row and limit)])
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()

    return EncodedRecord("probe", tokens(query), [tokens(4), tokens(7), tokens(5)], [None] * 3)
