"""SwiGLU with closed-form backwards, on tensors and on pairs.

With σ = sigmoid(a), s = aσ, s' = σ + s(1 − σ), s'' = σ(1 − σ)(2 + a(1 − 2σ)):

    y = s b        ẏ = s' ȧ b + s ḃ
    ā = ȳ s' b + ẏ̄ (s'' ȧ b + s' ḃ)      b̄ = ȳ s + ẏ̄ s' ȧ
    ǡ = ẏ̄ s' b                           ḃ̄ = ẏ̄ s

Below as plain PyTorch; on CUDA, but in float64, `triton_swiglu` does the same in one kernel each.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels.arguments import check_axes, check_floats, check_pair
from ttt_kernels.dtypes import accumulation_dtype
from ttt_kernels.mode import uses_plain_definitions
from ttt_kernels.swiglu.reference import swiglu_reference
from ttt_kernels.triton_launch import suits_triton


def _silu_and_slope(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ(a), silu(a) and silu'(a)."""
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    return sigmoid, silu, slope


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if suits_triton(gate_up):
            from ttt_kernels.swiglu import triton_swiglu

            return triton_swiglu.forward(gate_up)
        gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if suits_triton(gate_up):
            from ttt_kernels.swiglu import triton_swiglu

            return triton_swiglu.backward(gate_up, dy)
        wide = gate_up.to(accumulation_dtype(gate_up.dtype))
        gate, up = wide.chunk(2, dim=-1)
        dy = dy.to(wide.dtype)
        _, silu, slope = _silu_and_slope(gate)
        grad = torch.empty_like(wide)
        dgate, dup = grad.chunk(2, dim=-1)
        torch.mul(slope.mul_(up), dy, out=dgate)
        torch.mul(silu, dy, out=dup)
        return grad.to(gate_up.dtype)


class _SwiGLUPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: Tensor) -> Tensor:
        ctx.save_for_backward(pair)
        if suits_triton(pair):
            from ttt_kernels.swiglu import triton_swiglu

            return triton_swiglu.pair_forward(pair)
        wide = pair.to(accumulation_dtype(pair.dtype))
        gate, up = wide[0].chunk(2, dim=-1)
        dot_gate, dot_up = wide[1].chunk(2, dim=-1)
        _, silu, slope = _silu_and_slope(gate)
        out = wide.new_empty(*pair.shape[:-1], gate.shape[-1])
        torch.mul(silu, up, out=out[0])
        torch.addcmul(slope.mul_(dot_gate).mul_(up), silu, dot_up, out=out[1])
        return out.to(pair.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (pair,) = ctx.saved_tensors
        if suits_triton(pair):
            from ttt_kernels.swiglu import triton_swiglu

            return triton_swiglu.pair_backward(pair, cotangent)
        wide = pair.to(accumulation_dtype(pair.dtype))
        gate, up = wide[0].chunk(2, dim=-1)
        dot_gate, dot_up = wide[1].chunk(2, dim=-1)
        dy, dot_dy = cotangent.to(wide.dtype).unbind(0)
        sigmoid, silu, slope = _silu_and_slope(gate)
        # silu'' = σ(1 − σ)(2 + a(1 − 2σ)) = (1 − σ)(2σ + silu(1 − 2σ)) with silu = aσ
        curvature = (1 - sigmoid) * torch.addcmul(2 * sigmoid, silu, 1 - 2 * sigmoid)
        grad = torch.empty_like(wide)
        dgate, dup = grad[0].chunk(2, dim=-1)
        dot_dgate, dot_dup = grad[1].chunk(2, dim=-1)
        slope_up = slope * up
        second = curvature.mul_(dot_gate).mul_(up).addcmul_(slope, dot_up)
        torch.addcmul(dy * slope_up, dot_dy, second, out=dgate)
        torch.addcmul(dy * silu, dot_dy, slope.mul_(dot_gate), out=dup)
        torch.mul(dot_dy, slope_up, out=dot_dgate)
        torch.mul(dot_dy, silu, out=dot_dup)
        return grad.to(pair.dtype)


def _check_halves(name: str, x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(
            f"{name}'s last axis holds gate and up projection, and its length {x.shape[-1]} is odd."
        )


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up. Shapes: gate_up [..., 2I] (gate first) → [..., I].

    Raises ValueError or TypeError for anything else.
    """
    check_floats(gate_up=gate_up)
    check_axes("gate_up", gate_up, "[..., 2I]", 1)
    _check_halves("gate_up", gate_up)
    if uses_plain_definitions():
        return swiglu_reference(gate_up)
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


def swiglu_pair(pair: Tensor) -> Tensor:
    """`swiglu` and its directional derivative. Shapes: [2, ..., 2I] → [2, ..., I].

    Raises ValueError or TypeError for anything else.
    """
    check_floats(pair=pair)
    check_pair("pair", pair, "[2, ..., 2I]", 2)
    _check_halves("pair", pair)
    result: Tensor = _SwiGLUPair.apply(pair)
    return result
