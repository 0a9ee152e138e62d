"""A cache of keys in blocks, for plain products: on CPUs in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from rrhf.models.kernels.attention_call import AttentionCall
from rrhf.models.kernels.key_cache import KeyBlock
from rrhf.models.kernels.reference import with_sinks

BLOCK = 64  # columns of a block


class BlockedCache:
    """A ``KeyCache`` of several blocks, the queries' and then one for every ``BLOCK`` columns.

    A product reads whole tensors as they lie and copies parts of them first, so that its operands are whole blocks;
    keys lie as [N, H_kv, D, C].
    """

    def __init__(self, key: Tensor, value: Tensor, count: int, prompt: int, width: int, columns: int) -> None:
        self.columns, self.step = columns, max(BLOCK // width, 1) * width
        self.blocks = [_empty(key, value, count, 0, prompt)]

    def block(self, column: int) -> KeyBlock:
        last = self.blocks[-1]
        if column >= last.end:
            end = min(column + self.step, self.columns)
            self.blocks.append(_empty(last.keys, last.values, len(last.values), column, end))
        return self.blocks[-1]

    def columns_read(self, end: int) -> int:
        return self.blocks[-1].end

    def mask_type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def attend(self, call: AttentionCall, queries: Tensor, mask: Tensor) -> Tensor:
        """Products a block around one softmax in fp32."""
        scaling = call.scaling
        scores = torch.empty(*queries.shape[:3], mask.shape[-1], dtype=torch.float32, device=queries.device)
        for block in self.blocks:
            scores[..., block.start : block.end] = torch.matmul(queries, block.keys.transpose(2, 3))
        if call.softcap is not None:
            scores, scaling = scores.mul_(scaling / call.softcap).tanh_(), call.softcap
        torch.add(mask, scores, alpha=scaling, out=scores)
        weights = torch.softmax(scores, dim=-1)
        parts = [torch.matmul(weights[..., b.start : b.end].to(queries.dtype), b.values) for b in self.blocks]
        output = parts[0]
        if len(parts) > 1:
            output = output.float()
            for part in parts[1:]:
                output += part
        if call.sinks is not None:
            output = with_sinks(output, scores.logsumexp(dim=-1, keepdim=True), call.sinks[..., None])
        return output.to(queries.dtype)

    def select(self, rows: Tensor) -> None:
        for block in self.blocks:
            block.keys = block.keys.transpose(2, 3)[rows].transpose(2, 3)
            block.values = block.values[rows]


def _empty(key: Tensor, value: Tensor, count: int, start: int, end: int) -> KeyBlock:
    keys = key.new_zeros(count, key.shape[1], key.shape[-1], end - start).transpose(2, 3)
    return KeyBlock(start, keys, value.new_zeros(count, value.shape[1], end - start, value.shape[-1]))
