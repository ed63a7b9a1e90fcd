"""A linear map with static weights, on tensors and on pairs.

On a pair it is the same map on twice the tokens. What the forward sweep of a meta step already
computed can be handed in: the primal output (saves its product) and the first-order adjoint of
the input (the tangent's cotangent is a multiple of it, which saves another).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, in x's dtype. Shapes: x [..., in], weight [out, in] → [..., out]."""
    return F.linear(x, weight.to(x.dtype))


class _LinearPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pair: Tensor, weight: Tensor, primal: Tensor | None, dot_adjoint: Tensor | None
    ) -> Tensor:
        matrix = weight.to(pair.dtype)
        ctx.save_for_backward(pair, matrix, dot_adjoint)
        ctx.weight_dtype = weight.dtype
        if primal is None:
            return F.linear(pair, matrix)
        out = pair.new_empty(*pair.shape[:-1], matrix.shape[0])
        out[0].copy_(primal)
        torch.mm(pair[1].flatten(0, -2), matrix.mT, out=out[1].flatten(0, -2))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        pair, matrix, dot_adjoint = ctx.saved_tensors
        rows = cotangent.contiguous().flatten(0, -2)
        if dot_adjoint is None:
            grad = torch.mm(rows, matrix).view_as(pair)
        else:
            grad = torch.empty_like(pair, memory_format=torch.contiguous_format)
            torch.mm(rows[: rows.shape[0] // 2], matrix, out=grad[0].flatten(0, -2))
            grad[1].copy_(dot_adjoint)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.mm(rows.mT, pair.flatten(0, -2)).to(ctx.weight_dtype)
        return grad, dweight, None, None


def linear_pair(
    pair: Tensor,
    weight: Tensor,
    primal: Tensor | None = None,
    dot_adjoint: Tensor | None = None,
) -> Tensor:
    """`linear` and its directional derivative, the weight held fixed.

    Shapes: pair [2, ..., in], weight [out, in] → [2, ..., out]; primal [..., out] and
    dot_adjoint [..., in] (the known cotangent of the input's tangent) are optional.
    """
    result: Tensor = _LinearPair.apply(pair.contiguous(), weight, primal, dot_adjoint)
    return result
