"""A linear map whose weights differ from sequence to sequence, and move.

y = x Wᵀ        ẏ = ẋ Wᵀ + x vᵀ         (v: the direction the fast weights move in)
x̄ = ȳ W + ẏ̄ v   ẋ̄ = ẏ̄ W   W̄ = ȳᵀx + ẏ̄ᵀẋ
"""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels.arguments import check_floats, check_pair, check_shape
from ttt_kernels.linear.op import linear
from ttt_kernels.rounded import rounded


def _check(x: Tensor, weight: Tensor) -> None:
    """x [b, T, in], weight [b, out, in]."""
    if x.dim() != 3 or weight.dim() != 3 or x.shape[::2] != weight.shape[::2]:
        raise ValueError(
            "x must be [b, T, in] and weight [b, out, in], and their shapes are"
            f" {list(x.shape)} and {list(weight.shape)}."
        )


def fast_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ per sequence, in x's dtype.

    Shapes: x [b, T, in], weight [b, out, in] (or [out, in], shared) → [b, T, out].
    Raises ValueError or TypeError if the arguments do not fit together.
    """
    check_floats(x=x, weight=weight)
    if weight.dim() == 2:
        return linear(x, weight)
    _check(x, weight)
    return torch.bmm(x, rounded(weight, x.dtype).mT)


class _FastLinearPair(torch.autograd.Function):
    """x is a pair [2, b, T, in], or [b, T, in] where the input has no tangent."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        direction: Tensor,
        primal: Tensor | None,
        dot_adjoint: Tensor | None,
    ) -> Tensor:
        matrix, moving = weight.to(x.dtype), direction.to(x.dtype)
        ctx.save_for_backward(x, matrix, moving, dot_adjoint)
        ctx.weight_dtype = weight.dtype
        has_tangent = x.dim() == 4
        value = x[0] if has_tangent else x
        out = x.new_empty(2, *value.shape[:-1], matrix.shape[1])
        if primal is None:
            torch.bmm(value, matrix.mT, out=out[0])
        else:
            out[0].copy_(primal)
        torch.bmm(value, moving.mT, out=out[1])
        if has_tangent:
            out[1].baddbmm_(x[1], matrix.mT)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, moving, dot_adjoint = ctx.saved_tensors
        dy, dot_dy = cotangent.unbind(0)
        has_tangent = x.dim() == 4
        value = x[0] if has_tangent else x
        dweight = torch.bmm(dy.mT, value)
        grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        dx = grad[0] if has_tangent else grad
        torch.bmm(dy, matrix, out=dx)
        dx.baddbmm_(dot_dy, moving)
        if has_tangent:
            dweight.baddbmm_(dot_dy.mT, x[1])
            if dot_adjoint is None:
                torch.bmm(dot_dy, matrix, out=grad[1])
            else:
                grad[1].copy_(dot_adjoint)
        return grad, dweight.to(ctx.weight_dtype), None, None, None


def fast_linear_pair(
    x: Tensor,
    weight: Tensor,
    direction: Tensor,
    primal: Tensor | None = None,
    dot_adjoint: Tensor | None = None,
) -> Tensor:
    """`fast_linear` and its derivative as the weights move in `direction`.

    Shapes: x [2, b, T, in], or [b, T, in] for an input without tangent; weight and direction
    [b, out, in] → [2, b, T, out]; primal [b, T, out] and dot_adjoint [b, T, in] are what the
    forward sweep kept. The direction is a constant: it gets no gradient. Raises ValueError or
    TypeError if the arguments do not fit together.
    """
    check_floats(x=x, weight=weight, direction=direction, primal=primal, dot_adjoint=dot_adjoint)
    if x.dim() == 4:
        check_pair("x", x, "[2, b, T, in]", 4)
    value = x[0] if x.dim() == 4 else x
    _check(value, weight)
    check_shape("direction", direction, weight.shape)
    check_shape("primal", primal, (*value.shape[:2], weight.shape[1]))
    check_shape("dot_adjoint", dot_adjoint, value.shape)
    result: Tensor = _FastLinearPair.apply(x.contiguous(), weight, direction, primal, dot_adjoint)
    return result
