"""The mask of NLPO: which tokens are in it, and its probability under the policy."""

from __future__ import annotations

import numpy as np
import torch

from rrhf.sampling.nucleus import in_nucleus, log_mass, nucleus_of
from support.models import tiny_model


def test_the_smallest_set_of_likeliest_tokens() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]))
    assert in_nucleus(logits, 0.74).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert in_nucleus(logits, 0.76).tolist() == [[False, True, True, True], [True, True, True, True]]
    assert in_nucleus(logits, 1e-6).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert in_nucleus(logits, 1.0).all()


def test_masks_are_kept_in_bits_and_hold_what_was_drawn() -> None:
    masking, policy = tiny_model("llama", 97), tiny_model("llama", 97, seed=1)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    drawn = torch.arange(50)
    masks = nucleus_of(masking, hidden, drawn, 0.4)
    assert masks.shape == (50, 13) and masks.dtype == np.uint8
    whole = torch.from_numpy(np.unpackbits(masks, axis=1, count=97)).bool()
    expected = in_nucleus(masking.lm_head(hidden), 0.4)
    expected[drawn, drawn] = True
    assert torch.equal(whole, expected)
    naive = torch.log((torch.softmax(policy.lm_head(hidden), dim=-1) * whole).sum(dim=-1))
    found = log_mass(policy, hidden, masks)
    assert torch.allclose(found, naive, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), policy.lm_head.weight)
    (same,) = torch.autograd.grad(naive.sum(), policy.lm_head.weight)
    assert torch.allclose(gradient, same, atol=1e-5) and float(same.abs().max()) > 0
