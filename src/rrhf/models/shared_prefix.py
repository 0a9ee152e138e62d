"""The log-probabilities of k responses in one forward pass: the query once, its responses behind it as a tree.

A record's row is ``[query | y_1 | y_2 | … | y_k]``; every response sees the query and its own beginning, its
positions go on where the query ends, and the rows of several records stand behind each other without padding. The last
token of a response predicts nothing and is left out.

``response_logprobs`` is the one entry; ``usable_path`` finds out by numbers whether a model takes trees.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrhf.models.attention import NO_MASK, masked_attention, our_attention, takes_layouts
from rrhf.models.kernels.cpu.branch_attention import Branches, branch_attention, branches
from rrhf.models.logprobs import token_logprobs
from rrhf.models.tokenization import EncodedRecord

BRANCHED = ("cpu",)  # where many small products are cheaper than few with work on what is masked
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
    _cut: list[Branches] = field(default_factory=list)

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
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        narrow = window is not None and self.reach > window
        if query.device.type in BRANCHED and softcap is None and not narrow and not dropout:
            return branch_attention(query, key, value, scaling, self._branches())
        # A whole tree in one call with its mask: few launches, for GPUs, and all that attention can ask for.
        # split, not slices: its backward is one concatenation instead of a zeroed row a tree
        sizes = [tree.size for tree in self.trees]
        pieces = zip(query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
        outputs = [
            masked_attention(q, k, v, self._mask(index, window, q.dtype), scaling, softcap, dropout)
            for index, (q, k, v) in enumerate(pieces)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    @property
    def reach(self) -> int:
        """Positions of the longest query and response together."""
        return max(tree.query + max(tree.responses, default=0) for tree in self.trees)

    def _branches(self) -> Branches:
        if not self._cut:
            self._cut.append(branches([(tree.start, tree.query, tree.responses) for tree in self.trees]))
        return self._cut[0]

    def _mask(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive tree mask [t, t] of one record, with positions at least ``window`` apart hidden."""
        found = self._masks.get((index, window, dtype))
        if found is None:
            tree = self.trees[index]
            positions = self.position_ids[0, tree.start : tree.start + tree.size]
            if window is not None and int(positions.max()) < window:
                return self._mask(index, None, dtype)
            visible = tree_mask(tree, positions, window)
            found = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            found.masked_fill_(~visible, torch.finfo(dtype).min)
            self._masks[index, window, dtype] = found
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


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def response_logprobs(
    model: PreTrainedModel, records: Sequence[EncodedRecord], path: str = "tree", keep_logits: bool = False
) -> Logprobs:
    """Score every response of ``records`` under ``model``: as trees, or (``padded``) one padded row a response.

    ``keep_logits`` lets the tree pass keep its logits for the backward pass where they are not large, which is faster.
    """
    return tree_logprobs(model, records, keep_logits) if path == "tree" else padded_logprobs(model, records)


def tree_logprobs(model: PreTrainedModel, records: Sequence[EncodedRecord], keep_logits: bool = False) -> Logprobs:
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
    logprobs = token_logprobs(model, hidden[forest.rows], forest.targets, keep_logits)
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
