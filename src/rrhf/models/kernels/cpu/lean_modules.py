"""RMSNorm and gated MLPs that keep for the backward pass what cannot be made again cheaply.

transformers' modules are composed of small operations whose results autograd keeps: an RMSNorm five copies of its
input, a gated MLP four of its widest tensor. Here each is one autograd function that keeps its inputs (and the gate's
and the up projection's results) and makes the rest again by elementwise work. A norm's result, which the layers behind
it keep as their input, is made again for them from the norm's own. That halves the memory and takes less time on a
CPU. Modules are recognised by what they contain and by their numbers, never by name.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rrhf.models.kernels.cpu import products


class _RMSNorm(torch.autograd.Function):
    """y = w · x / √(mean(x²) + ε); the quotient in fp32 and rounded to x's type, as transformers does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _norm(x, weight, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        exact, scale = _normalised(x, ctx.epsilon)
        exact = exact.mul_(scale)
        outer, factors = gradients[0].to(exact.dtype), weight.to(exact.dtype)
        both = outer * exact
        d_weight = both.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = torch.matmul(both, factors[:, None] / -len(factors))
        d_x = torch.mul(outer, factors, out=both).addcmul_(exact, mean).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


def _normalised(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """A copy of x in fp32 (fp64), and 1 / √(mean(x²) + ε) of each row."""
    exact = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return exact, norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    exact, scale = _normalised(x, epsilon)
    return weight * exact.mul_(scale).to(x.dtype)


class _GatedMLP(torch.autograd.Function):
    """W_down (silu(W_gate x) · W_up x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gated, raised = products.linear(x, gate), products.linear(x, up)
        ctx.save_for_backward(x, gate, up, down, gated, raised)
        return products.linear(nn.functional.silu(gated).mul_(raised), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, gated, raised = ctx.saved_tensors
        shape = x.shape
        x, gated, raised, outer = (t.flatten(0, -2) for t in (x, gated, raised, gradients[0]))
        need = ctx.needs_input_grad
        activated = nn.functional.silu(gated)
        d_product = products.matmul(outer, down)
        d_down = products.matmul(outer.t(), activated * raised) if need[3] else None
        d_raised = activated.mul_(d_product)
        d_gated = torch.ops.aten.silu_backward(d_product.mul_(raised), gated)
        return (
            products.addmm(products.matmul(d_gated, gate), d_raised, up).view(shape) if need[0] else None,
            products.matmul(d_gated.t(), x) if need[1] else None,
            products.matmul(d_raised.t(), x) if need[2] else None,
            d_down,
        )


class _Remade:
    """A norm's result that the graph need not keep: it is made again when the first of its users asks for it."""

    def __init__(self, x: Tensor, weight: Tensor, epsilon: float, version: int) -> None:
        self.x, self.weight, self.epsilon = x.detach(), weight.detach(), epsilon
        self.version = version  # of the result: what was changed in place since is not what would be made again
        self.users = 0
        self._made: Tensor | None = None

    @torch.no_grad()
    def tensor(self) -> Tensor:
        made = self._made
        if made is None:
            made = _norm(self.x, self.weight, self.epsilon)
        self.users -= 1
        self._made = made if self.users > 0 else None
        return made


_REMADE = "_rrhf_remade"  # the attribute in which a norm's result carries how it is made again


def _pack(tensor: Tensor) -> Any:
    """What the graph keeps in place of ``tensor``, which is a norm's result, a view of one, or something else."""
    whole = tensor if tensor._base is None else tensor._base
    remade: _Remade | None = getattr(whole, _REMADE, None)
    if remade is None or tensor.dtype != whole.dtype or tensor._version != remade.version:
        return tensor.detach()  # an operation's own result would hold it, and it that result, until a backward pass
    remade.users += 1
    return remade, tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    remade, *place = kept
    return torch.as_strided(remade.tensor(), *place)


def _norm_forward(self: Any, hidden_states: Tensor, *gate: Tensor | None) -> Tensor:
    if gate or not _plain(hidden_states, self.weight):  # Mamba 2's norms take a gate too
        return type(self).forward(self, hidden_states, *gate)
    if not torch.is_grad_enabled():
        return _norm(hidden_states, self.weight, _epsilon(self))
    result: Tensor = _RMSNorm.apply(hidden_states, self.weight, _epsilon(self))
    if result.requires_grad and result.is_contiguous():
        setattr(result, _REMADE, _Remade(hidden_states, self.weight, _epsilon(self), result._version))
    return result


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    if hooked or not _plain(x, *(layer.weight for layer in layers)):
        return type(self).forward(self, x)
    gate, up, down = (layer.weight for layer in layers)
    if not torch.is_grad_enabled():
        activated = nn.functional.silu(products.linear(x, gate), inplace=True)
        return products.linear(activated.mul_(products.linear(x, up)), down)
    result: Tensor = _GatedMLP.apply(x, gate, up, down)
    return result


def _gelu_forward(self: Any, x: Tensor) -> Tensor:
    layer = self.dense
    if torch.is_grad_enabled() or layer._forward_hooks or layer._forward_pre_hooks or not _plain(x, layer.weight):
        return type(self).forward(self, x)
    return products.linear_gelu(x, layer.weight, layer.bias)


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    if not _plain(x, self.weight):
        return type(self).forward(self, x)
    if not torch.is_grad_enabled():
        return products.linear(x, self.weight, self.bias)
    result: Tensor = products.Linear.apply(x, self.weight, self.bias)
    return result


def _plain(x: Tensor, *weights: Any) -> bool:
    """Ordinary tensors of one type on a CPU: not sharded, quantised, gathered layer by layer, or cast on the way."""
    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(type(w) in (Tensor, nn.Parameter) and w.dtype == x.dtype and w.numel() for w in weights)
    )


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if epsilon is None else epsilon)


def _is_norm(module: nn.Module) -> bool:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    return isinstance(epsilon, float) and list(own) == ["weight"] and own["weight"].dim() == 1


def _is_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    activation = children.pop("act_fn", None)
    return (
        set(children) == {"gate_proj", "up_proj", "down_proj"}
        and all(type(layer) is nn.Linear and layer.bias is None for layer in children.values())
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
    )


def _is_gelu(module: nn.Module) -> bool:
    """Whether it is what BERT's family calls intermediate: a linear layer and GELU of its result."""
    children = dict(module.named_children())
    return set(children) == {"dense", "intermediate_act_fn"} and type(children["dense"]) is nn.Linear


def _is_linear(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    exact = module.weight.dtype == torch.float32 and products.onednn_is_faster()
    return exact or products.is_packed(module.weight)


_FORWARDS = {_is_norm: _norm_forward, _is_mlp: _mlp_forward, _is_gelu: _gelu_forward, _is_linear: _linear_forward}


_CHECKED = "_rrhf_checked"  # the attribute in which a model carries which forward pass fits its classes of modules


@contextlib.contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Give ``model``'s RMSNorms, MLPs and linear layers the forward passes of this file, and theirs back again."""
    kinds: dict[type[nn.Module], Any] = vars(model).setdefault(_CHECKED, {})  # by the first module of each
    changed: list[nn.Module] = []
    for module in model.modules():
        for fits, forward in _FORWARDS.items():
            if "forward" in vars(module) or not fits(module):
                continue
            if type(module) not in kinds:
                kinds[type(module)] = forward if _equal(module, forward) else None
            if kinds[type(module)] is forward:
                module.forward = types.MethodType(forward, module)
                changed.append(module)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack) if changed else contextlib.nullcontext():
            yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


@torch.no_grad()
def _equal(module: nn.Module, forward: Any) -> bool:
    """Whether ``forward`` gives the module's numbers, tried in fp64 on random input (products round in fp32)."""
    try:
        probe = copy.deepcopy(module).double()
        weight = next(probe.parameters())
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(2, weight.shape[-1], generator=generator, device=weight.device, dtype=torch.float64)
        return torch.allclose(probe(x), forward(probe, x), rtol=1e-4, atol=1e-5)
    except Exception:  # a module that looks alike and is called otherwise keeps its own forward pass
        return False
