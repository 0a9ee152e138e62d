"""Which pass a model takes: trees where that is shown to be right, padded rows everywhere else."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.attention import takes_layouts
from rrhf.models.flex_check import check_flex
from rrhf.models.forward import causal_lm
from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.shared_prefix import Forest, forest_logprobs, lay_out, tree_logprobs
from rrhf.models.tokenization import EncodedRecord

COPIED_PARAMETERS = 2_000_000_000  # a low-precision model up to this size is checked on a copy in fp32
# Settings of attention that tell no difference on rows they are longer than: windows, chunks, chosen keys.
LIMITS = ("sliding_window", "attention_chunk_size", "index_topk")
# Settings that give the number of experts. Their matrices have as many rows as tokens were sent to them, so that
# another response may change how a product is summed; in a dense model every number stays what it is.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERT_ULPS = 16  # units in the last place of a log-probability that may differ for that reason


def usable_path(model: PreTrainedModel, longest_row: int = 0) -> str:
    """``"tree"`` where the tree pass gives the padded pass's numbers on this model, else ``"padded"`` with a warning.

    A small random record runs through both. Every layer must have attended by the tree's layout, once; the sums must be
    equal; and exchanging one response for another must not change the others' sums. Layers with a window, a chunk or a
    number of chosen keys are only told apart by rows that outgrow it, so where ``longest_row`` (the longest tree
    of the data, in tokens) does, the check's row does too.
    """
    model = causal_lm(model)
    if not takes_layouts(model):
        return _padded(model, "its attention cannot be exchanged")
    was_training = model.training
    model.eval()
    try:
        check_flex(model, _probe(model, longest_row))
        with torch.no_grad():
            fault = _layers_without_layout(model) or _other_numbers(model, longest_row) or _leak(model)
    except Exception as error:  # whatever a model's code raises on an unusual layout, the padded pass remains
        fault = f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    return "tree" if fault is None else _padded(model, fault)


def _padded(model: PreTrainedModel, why: str) -> str:
    warnings.warn(
        f"{type(model).__name__} does not take the shared-prefix tree ({why}): every response is computed with its "
        "query in a padded row of its own, which is exact and slower",
        stacklevel=3,
    )
    return "padded"


class _Counted:
    """A forest as the ``Layout`` of a forward call, and how often each layer asked it."""

    def __init__(self, forest: Forest) -> None:
        self.forest, self.calls = forest, Counter[int]()

    def attend(self, layer: int, call: AttentionCall) -> Tensor:
        self.calls[layer] += 1
        return self.forest.attend(layer, call)


def _layers_without_layout(model: PreTrainedModel) -> str | None:
    """A layer that mixes tokens in another way (a convolution, a recurrence) cannot know of trees."""
    forest = lay_out([_probe(model, 0)], model.get_input_embeddings().weight.device)
    layout = _Counted(forest)
    forest_logprobs(model, forest, layout=layout)
    layers = model.config.get_text_config().num_hidden_layers
    if layout.calls == Counter(range(layers)):
        return None
    once = sum(layout.calls[layer] == 1 for layer in range(layers))
    return f"{once} of its {layers} layers attended by the tree once, {layout.calls.total()} calls in all"


def _other_numbers(model: PreTrainedModel, longest_row: int) -> str | None:
    record = _probe(model, longest_row)
    low = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    copied = low and model.num_parameters() <= COPIED_PARAMETERS
    probed = copy.deepcopy(model).float() if copied else model
    tree, padded = tree_logprobs(probed, [record]), padded_logprobs(probed, [record])
    lengths = tree.lengths.clamp(min=1)
    worst = float(((tree.sums - padded.sums) / lengths).abs().max())
    # bfloat16 logits of random tokens are some 10 to 20 large and so 0.1 apart where only the rounding differs.
    magnitude = float((padded.sums / lengths).abs().max())
    if worst <= (0.05 + 0.02 * magnitude if low and not copied else 1e-3):
        return None
    return f"its tree log-probabilities differ by {worst:.2g} a token"


def _leak(model: PreTrainedModel) -> str | None:
    """Exchange one response after the other for one of equal length: the others' sums must stay what they are."""
    record = _probe(model, 0)
    before = tree_logprobs(model, [record])
    config, allowed = model.config.get_text_config(), torch.zeros_like(before.sums)
    if any(getattr(config, name, None) for name in EXPERTS):
        ulp = torch.finfo(next(model.parameters()).dtype).eps
        allowed = EXPERT_ULPS * ulp * before.sums.abs()
    for i, response in enumerate(record.responses):
        responses = list(record.responses)
        responses[i] = [(token + 1) % config.vocab_size for token in response]
        change = (tree_logprobs(model, [replace(record, responses=responses)]).sums - before.sums).abs()
        change[i] = 0.0
        if not bool((change <= allowed).all()):
            return f"exchanging one response changes another's log-probability by {float(change.max()):.2g}"
    return None


def _probe(model: PreTrainedModel, longest_row: int) -> EncodedRecord:
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) or 0 for name in LIMITS]
    query = max([5, *(limit + 2 for limit in limits if limit < longest_row and limit)])
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()

    return EncodedRecord("probe", tokens(query), [tokens(4), tokens(7), tokens(5)], [None] * 3)
