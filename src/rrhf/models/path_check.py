"""Which pass a model takes: trees where their numbers are those of padded rows."""

from __future__ import annotations

import copy
import warnings

import torch
from transformers import PreTrainedModel

from rrhf.models.attention import takes_layouts
from rrhf.models.forward import causal_lm
from rrhf.models.padded_rows import padded_logprobs
from rrhf.models.shared_prefix import tree_logprobs
from rrhf.models.tokenization import EncodedRecord

COPIED_PARAMETERS = 2_000_000_000  # a low-precision model up to this size is checked on a copy in fp32


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
