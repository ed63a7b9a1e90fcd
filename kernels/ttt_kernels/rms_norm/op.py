"""RMSNorm with closed-form backwards, on tensors and on pairs.

With r = rsqrt(mean(x²) + eps) and means over the last axis:

    y  = g r x                        ẏ = g (r ẋ − r³ μ x),   μ = mean(x ẋ)

and for cotangents (ȳ, ẏ̄), u = g ȳ, w = g ẏ̄:

    ẋ̄ = r w − r³ mean(w x) x
    x̄ = r u − r³ mean(u x) x − r³ mean(w ẋ) x + 3 r⁵ μ mean(w x) x − r³ mean(w x) ẋ − r³ μ w

Below as plain PyTorch; on CUDA, but in float64, `triton_rms_norm` does the same in one kernel each.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels.arguments import check_axes, check_floats, check_pair, check_shape
from ttt_kernels.dtypes import accumulation_dtype
from ttt_kernels.mode import uses_plain_definitions
from ttt_kernels.rms_norm.reference import rms_norm_reference
from ttt_kernels.triton_launch import suits_triton


def _row_mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1) / a.shape[-1]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        if suits_triton(x, gain):
            from ttt_kernels.rms_norm import triton_rms_norm

            out, scale = triton_rms_norm.forward(x, gain, eps)
            ctx.save_for_backward(x, gain, scale)
            return out
        wide = x.to(accumulation_dtype(x.dtype))
        scale = (_row_mean(wide, wide) + eps).rsqrt()
        ctx.save_for_backward(x, gain, scale)
        return ((wide * scale) * gain).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        if suits_triton(x, gain):
            from ttt_kernels.rms_norm import triton_rms_norm

            return *triton_rms_norm.backward(x, gain, scale, dy, ctx.needs_input_grad[1]), None
        normed = x.to(scale.dtype) * scale
        dy = dy.to(scale.dtype)
        u = dy * gain
        dx = ((u - normed * _row_mean(u, normed)) * scale).to(x.dtype)
        dgain = None
        if ctx.needs_input_grad[1]:
            dgain = (dy * normed).flatten(0, -2).sum(0).to(gain.dtype)
        return dx, dgain, None


class _RMSNormPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: Tensor, gain: Tensor, eps: float) -> Tensor:
        if suits_triton(pair, gain):
            from ttt_kernels.rms_norm import triton_rms_norm

            out, scale, along = triton_rms_norm.pair_forward(pair, gain, eps)
            ctx.save_for_backward(pair, gain, scale, along)
            return out
        wide = pair.to(accumulation_dtype(pair.dtype))
        x, dot_x = wide[0], wide[1]
        scale = (_row_mean(x, x) + eps).rsqrt()
        normed = x * scale
        # tangent of the normalised row: its part along the row is projected out (up to eps)
        along = _row_mean(normed, dot_x) * scale
        ctx.save_for_backward(pair, gain, scale, along)
        out = torch.empty_like(wide)
        torch.mul(normed, gain, out=out[0])
        torch.mul(torch.addcmul(dot_x * scale, normed, along, value=-1), gain, out=out[1])
        return out.to(pair.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        pair, gain, scale, along = ctx.saved_tensors
        if suits_triton(pair, gain):
            from ttt_kernels.rms_norm import triton_rms_norm

            want_gain = ctx.needs_input_grad[1]
            kept = gain, scale, along
            return *triton_rms_norm.pair_backward(pair, *kept, cotangent, want_gain), None
        wide = pair.to(scale.dtype)
        cotangent = cotangent.to(scale.dtype)
        normed = wide[0] * scale
        dot_scaled = wide[1] * scale
        u, w = (cotangent * gain).unbind(0)
        mean_wx = _row_mean(w, normed)
        grad = torch.empty_like(wide)
        torch.mul(torch.addcmul(w, normed, mean_wx, value=-1), scale, out=grad[1])
        along_x = 3 * along * mean_wx - _row_mean(w, dot_scaled) - _row_mean(u, normed)
        inner = torch.addcmul(u, normed, along_x)
        inner.addcmul_(dot_scaled, mean_wx, value=-1).addcmul_(w, along, value=-1)
        torch.mul(inner, scale, out=grad[0])
        dgain = None
        if ctx.needs_input_grad[1]:
            dot_normed = dot_scaled.addcmul_(normed, along, value=-1)
            rows = (cotangent[0] * normed).addcmul_(cotangent[1], dot_normed)
            dgain = rows.flatten(0, -2).sum(0).to(gain.dtype)
        return grad.to(pair.dtype), dgain, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS-normalise the last axis. Shapes: x [..., H], gain [H]; result as x.

    Raises ValueError or TypeError if the arguments do not fit together.
    """
    check_floats(x=x, gain=gain)
    check_axes("x", x, "[..., H]", 1)
    check_shape("gain", gain, x.shape[-1:])
    if uses_plain_definitions():
        return rms_norm_reference(x, gain, eps)
    result: Tensor = _RMSNorm.apply(x, gain, eps)
    return result


def rms_norm_pair(pair: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`rms_norm` and its directional derivative. Shapes: pair [2, ..., H], gain [H].

    Raises ValueError or TypeError if the arguments do not fit together.
    """
    check_floats(pair=pair, gain=gain)
    check_pair("pair", pair, "[2, ..., H]", 2)
    check_shape("gain", gain, pair.shape[-1:])
    result: Tensor = _RMSNormPair.apply(pair, gain, eps)
    return result
