"""The log-probabilities of k responses in one forward pass: the query once, its responses behind it as a tree.

A record's row is ``[query | y_1 | y_2 | … | y_k]``; every response sees the query and its own beginning, its
positions go on where the query ends, and the rows of several records stand behind each other without padding. The last
token of a response predicts nothing and is left out. Logits are made in chunks, so that [tokens, vocabulary] never
exists whole.

``response_logprobs`` is the one entry; ``usable_path`` finds out by numbers whether a model takes trees.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rrhf.attention import NO_MASK, masked_attention, our_attention, takes_layouts
from rrhf.text import EncodedRecord

PATHS = ("tree", "padded")
LOGIT_ROWS = 128  # rows of logits that exist at a time
COPIED_PARAMETERS = 2_000_000_000  # a low-precision model up to this size is checked on a copy in fp32


@dataclass(frozen=True)
class Tree:
    """Where one record stands in the row: ``start``, the query's length, the responses' input lengths (‖y_i‖ − 1)."""

    start: int
    query: int
    responses: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.query + sum(self.responses)


@dataclass(frozen=True)
class Forest:
    """Several records in one row of T tokens; it is the ``Layout`` of that forward call.

    ``input_ids``, ``position_ids``: [1, T]. ``rows``, ``targets``, ``owners``: [N], for each of the N response tokens
    the row whose output predicts it, its id, and the response (counted through all records) it belongs to.
    ``lengths``: ‖y_i‖ of all responses.
    """

    trees: tuple[Tree, ...]
    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    targets: Tensor
    owners: Tensor
    lengths: Tensor
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        # split, not slices: its backward is one concatenation instead of a zeroed row a tree
        sizes = [tree.size for tree in self.trees]
        pieces = zip(query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
        attend = self._attend_dense if query.is_cuda else self._attend_branches
        outputs = [attend(index, q, k, v, scaling, window, softcap, dropout) for index, (q, k, v) in enumerate(pieces)]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _attend_dense(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """A whole tree in one call with its mask: few launches, for GPUs."""
        mask = self._mask(index, window, query.dtype)
        return masked_attention(query, key, value, mask, scaling, softcap, dropout)

    def _attend_branches(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """The query by itself, then each response against the query and itself: no work on what is masked between
        branches, for CPUs, where a call costs little."""
        tree = self.trees[index]
        sizes = [tree.query, *tree.responses]
        whole = None if window is None else self._mask(index, window, query.dtype)
        outputs, begin = [], 0
        pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), sizes, strict=True)
        for branch, (q, k, v, size) in enumerate(pieces):
            if branch == 0:
                first_key, first_value = k, v
            elif size:
                k, v = torch.cat([first_key, k], dim=2), torch.cat([first_value, v], dim=2)
            seen = tree.query if branch else 0
            if whole is None:
                mask = self._branch_mask(seen, size, query)
            else:
                rows = whole[begin : begin + size]
                mask = torch.cat([rows[:, :seen], rows[:, begin : begin + size]], dim=1)
            if size:
                outputs.append(masked_attention(q, k, v, mask, scaling, softcap, dropout))
            begin += size
        return torch.cat(outputs, dim=2)

    def _branch_mask(self, query: int, size: int, like: Tensor) -> Tensor:
        """Additive mask [size, query + size] of a response behind its query: all of the query, itself causally."""
        found = self._masks.get((query, size, like.dtype))
        if found is None:
            found = torch.full((size, query + size), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
            found = found.triu_(query + 1)
            self._masks[query, size, like.dtype] = found
        return found

    def _mask(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive tree mask [t, t] of one record, with positions at least ``window`` apart hidden."""
        found = self._masks.get((index, window, dtype, "tree"))
        if found is None:
            tree = self.trees[index]
            positions = self.position_ids[0, tree.start : tree.start + tree.size]
            if window is not None and int(positions.max()) < window:
                return self._mask(index, None, dtype)
            visible = tree_mask(tree, positions, window)
            found = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            found.masked_fill_(~visible, torch.finfo(dtype).min)
            self._masks[index, window, dtype, "tree"] = found
        return found


def tree_mask(tree: Tree, positions: Tensor, window: int | None = None) -> Tensor:
    """Who sees whom in a tree: Tensor of shape (t, t), bool; row i may read column j.

    A token sees the query up to itself and, in its own branch, what stands before it; with a sliding ``window`` only
    where position_i − position_j < window.
    """
    branches = torch.repeat_interleave(
        torch.arange(1 + len(tree.responses), device=positions.device),
        torch.tensor([tree.query, *tree.responses], device=positions.device),
    )
    order = torch.arange(tree.size, device=positions.device)
    visible = (order[:, None] >= order[None, :]) & ((branches[None, :] == 0) | (branches[:, None] == branches[None, :]))
    if window is not None:
        visible &= positions[:, None] - positions[None, :] < window
    return visible


def plant(records: Sequence[EncodedRecord], device: torch.device | str = "cpu") -> Forest:
    """Lay records out as one row of trees. Responses may be empty: they have length 0 and log-probability 0."""
    trees: list[Tree] = []
    input_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    for record in records:
        start, last_of_query = len(input_ids), len(input_ids) + len(record.query) - 1
        input_ids += record.query
        positions += range(len(record.query))
        for response in record.responses:
            if response:
                rows += [last_of_query, *range(len(input_ids), len(input_ids) + len(response) - 1)]
            input_ids += response[:-1]
            positions += range(len(record.query), len(record.query) + len(response[:-1]))
            targets += response
            owners += [len(lengths)] * len(response)
            lengths.append(len(response))
        inputs = tuple(len(response[:-1]) for response in record.responses)
        trees.append(Tree(start, len(record.query), inputs))

    def ids(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Forest(
        tuple(trees), ids(input_ids)[None], ids(positions)[None], ids(rows), ids(targets), ids(owners), ids(lengths)
    )


class _TokenLogprobs(torch.autograd.Function):
    """log P(target | hidden) for every row, with logits made chunk by chunk in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        partitions = torch.empty_like(logprobs)
        for start in range(0, len(targets), LOGIT_ROWS):
            chunk = slice(start, start + LOGIT_ROWS)
            logits = _logits(hidden[chunk], weight, bias, scale, softcap)
            partitions[chunk] = logits.logsumexp(dim=-1)
            logprobs[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - partitions[chunk]
        ctx.save_for_backward(hidden, weight, bias, targets, partitions)
        ctx.scale, ctx.softcap = scale, softcap
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, partitions = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        gradient = gradients[0].to(partitions.dtype)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=partitions.dtype) if need_bias else None
        for start in range(0, len(targets), LOGIT_ROWS):
            chunk = slice(start, start + LOGIT_ROWS)
            logits = _logits(hidden[chunk], weight, bias, ctx.scale, ctx.softcap)
            # ∂ log P(target) / ∂ logit = [is target] − P(token)
            d_logits = torch.exp(logits - partitions[chunk, None]).mul_(-gradient[chunk, None])
            d_logits.scatter_add_(1, targets[chunk, None], gradient[chunk, None])
            if ctx.softcap is not None:
                d_logits *= 1 - (logits / ctx.softcap) ** 2
            d_logits = (d_logits * ctx.scale if ctx.scale != 1.0 else d_logits).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight.addmm_(d_logits.t(), hidden[chunk])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0, dtype=partitions.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logit_shape(model: PreTrainedModel) -> tuple[float, float | None]:
    """What a model does to its output layer's result: a factor (Cohere, Granite) and a soft cap (Gemma 2)."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, V] of last hidden states [N, hidden_size], in the output layer's type."""
    scale, softcap = _logit_shape(model)
    logits = model.get_output_embeddings()(hidden)
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logprobs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P(target) under the model's output layer, in fp32.

    Args:
        hidden: the last hidden states, Tensor of shape (N, hidden_size).
        targets: token ids, Tensor of shape (N,).

    Returns:
        Tensor of shape (N,).
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        elif hidden.dtype != weight.dtype:
            hidden = hidden.to(weight.dtype)
        logprobs: Tensor = _TokenLogprobs.apply(hidden, weight, bias, targets, *_logit_shape(model))
        return logprobs

    def chunk(part: Tensor, ids: Tensor) -> Tensor:  # an output layer with an adapter in it
        return torch.log_softmax(output_logits(model, part).float(), dim=-1).gather(1, ids[:, None])[:, 0]

    pieces = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(chunk, part, ids, use_reentrant=False) for part, ids in pieces])


@dataclass
class Logprobs:
    """What a pass over records gives, for all R responses of the records in order.

    ``sums``: Σ_t log P(y_t | …), [R], fp32 with a graph. ``lengths``: ‖y‖, [R]. ``router_loss``: the auxiliary loss of
    a mixture of experts, where its configuration asks for it. ``tokens``: rows of the forward pass.
    """

    sums: Tensor
    lengths: Tensor
    tokens: int
    router_loss: Tensor | None = None


def response_logprobs(model: PreTrainedModel, records: Sequence[EncodedRecord], path: str = "tree") -> Logprobs:
    """Score every response of ``records`` under ``model``: as trees, or (``padded``) one padded row a response."""
    return PASSES[path](model, records)


def tree_logprobs(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> Logprobs:
    """The tree pass; ``model`` must look its attention up in transformers' interface."""
    model = causal_lm(model)
    device = model.get_input_embeddings().weight.device
    forest = plant(records, device)
    with our_attention(model):
        outputs = model.base_model(
            input_ids=forest.input_ids,
            position_ids=forest.position_ids,
            attention_mask=NO_MASK.to(device),
            use_cache=False,
            rrhf_layout=forest,
            **_router_options(model),
        )
    hidden = outputs.last_hidden_state[0]
    logprobs = token_logprobs(model, hidden[forest.rows], forest.targets)
    sums = torch.zeros(len(forest.lengths), dtype=logprobs.dtype, device=logprobs.device)
    sums = sums.index_add(0, forest.owners, logprobs)
    return Logprobs(sums, forest.lengths, forest.input_ids.shape[1], _router_loss(model, outputs))


def padded_logprobs(model: PreTrainedModel, records: Sequence[EncodedRecord]) -> Logprobs:
    """One row a response, padded on the right; for models that do not take trees. Eq. 1's sums, token for token."""
    device = model.get_input_embeddings().weight.device
    rows = [(record.query, response) for record in records for response in record.responses]
    width = max(len(query) + len(response) for query, response in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    target = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (query, response) in enumerate(rows):
        size = len(query) + len(response)
        input_ids[i, :size] = torch.tensor([*query, *response])
        mask[i, :size] = 1
        target[i, len(query) : size] = True
    input_ids, mask, target = input_ids.to(device), mask.to(device), target.to(device)
    outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **_router_options(model))
    logits = outputs.logits[:, :-1]
    sums = []
    for i in range(len(rows)):  # a row at a time: its log-softmax in fp32 is the largest tensor of the pass
        keep = target[i, 1:]
        rest = logits[i][keep]
        logprobs = torch.log_softmax(rest if rest.dtype == torch.float64 else rest.float(), dim=-1)
        sums.append(logprobs.gather(1, input_ids[i, 1:][keep][:, None]).sum())
    lengths = torch.tensor([len(response) for _, response in rows], device=device)
    return Logprobs(torch.stack(sums), lengths, int(mask.sum()), _router_loss(model, outputs))


PASSES = {"tree": tree_logprobs, "padded": padded_logprobs}


def _router_options(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {"output_router_logits": True} if getattr(config, "output_router_logits", False) else {}


def _router_loss(model: PreTrainedModel, outputs: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, weighted as its configuration says."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    loss = getattr(outputs, "aux_loss", None)
    if loss is None:
        import sys

        balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        experts = (
            getattr(model, "num_experts", None) or getattr(config, "num_local_experts", None) or config.num_experts
        )
        if balance is None or getattr(outputs, "router_logits", None) is None:
            raise RuntimeError(f"{type(model).__name__} asks for a router loss that cannot be computed here")
        loss = balance(outputs.router_logits, experts, config.num_experts_per_tok)
    return float(config.router_aux_loss_coef) * loss


def usable_path(model: PreTrainedModel, longest_row: int = 0) -> str:
    """``"tree"`` where the tree pass gives the padded pass's numbers on this model, else ``"padded"`` with a warning.

    The check runs a small random record through both. Layers with a sliding window are only told apart by rows that
    outgrow it, so where ``longest_row`` (the longest tree of the data, in tokens) does, the check's row does too.
    """
    model = causal_lm(model)
    if not takes_layouts(model):
        return _warn(model, "its attention cannot be exchanged")
    record = _probe(model, longest_row)
    low = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    copied = low and model.num_parameters() <= COPIED_PARAMETERS
    probed = copy.deepcopy(model).float() if copied else model
    was_training = probed.training
    probed.eval()
    try:
        with torch.no_grad():
            tree, padded = tree_logprobs(probed, [record]), padded_logprobs(probed, [record])
    except Exception as error:  # whatever a model's code raises on an unusual layout, the padded pass remains
        return _warn(model, f"{type(error).__name__}: {error}")
    finally:
        probed.train(was_training)
    lengths = tree.lengths.clamp(min=1)
    worst = float(((tree.sums - padded.sums) / lengths).abs().max())
    # bfloat16 logits of random tokens are some 10 to 20 large and so 0.1 apart where only the rounding differs.
    magnitude = float((padded.sums / lengths).abs().max())
    if not worst <= (0.05 + 0.02 * magnitude if low and not copied else 1e-3):
        return _warn(model, f"its tree log-probabilities differ by {worst:.2g} a token")
    return "tree"


def _warn(model: PreTrainedModel, why: str) -> str:
    warnings.warn(
        f"{type(model).__name__} does not take the shared-prefix tree ({why}): every response is computed with its "
        "query in a padded row of its own, which is exact and slower",
        stacklevel=3,
    )
    return "padded"


def _probe(model: PreTrainedModel, longest_row: int) -> EncodedRecord:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    query = 5 if longest_row <= window or not window else window + 2
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()

    return EncodedRecord("probe", tokens(query), [tokens(4), tokens(7), tokens(5)], [None] * 3)
