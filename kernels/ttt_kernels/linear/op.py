"""A linear map with static weights, on tensors and on pairs.

On a pair it is the same map on twice the tokens. What the forward sweep of a meta step already
computed can be handed in: the primal output (saves its product) and the first-order adjoint of
the input (the tangent's cotangent is a multiple of it, which saves another).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_kernels.arguments import check_axes, check_floats, check_pair, check_shape
from ttt_kernels.deferred import Receiver, receiver
from ttt_kernels.rounded import rounded


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must be [out, {x.shape[-1]}] for {name} {list(x.shape)}, and its shape is"
            f" {list(weight.shape)}."
        )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, in x's dtype. Shapes: x [..., in], weight [out, in] → [..., out].

    Raises ValueError or TypeError if the arguments do not fit together.
    """
    check_floats(x=x, weight=weight)
    check_axes("x", x, "[..., in]", 1)
    _check("x", x, weight)
    put_off = receiver(x, weight)
    if put_off is None:
        return F.linear(x, rounded(weight, x.dtype))
    result: Tensor = _LinearPutOff.apply(x, weight.detach(), put_off)
    return result


class _LinearPutOff(torch.autograd.Function):
    """The weight's gradient is left to whoever forms those put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, put_off: Receiver) -> Tensor:
        matrix = rounded(weight, x.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.put_off = put_off
        return F.linear(x, matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        rows = cotangent.contiguous().flatten(0, -2)
        ctx.put_off.add(rows, x.flatten(0, -2))
        return torch.mm(rows, matrix).view(x.shape), None, None


class _LinearPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pair: Tensor,
        weight: Tensor,
        primal: Tensor | None,
        dot_adjoint: Tensor | None,
        put_off: Receiver | None,
    ) -> Tensor:
        matrix = rounded(weight, pair.dtype)
        ctx.save_for_backward(pair, matrix, dot_adjoint)
        ctx.weight_dtype, ctx.put_off = weight.dtype, put_off
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
        if ctx.put_off is not None:
            ctx.put_off.add(rows, pair.flatten(0, -2))
        elif ctx.needs_input_grad[1]:
            dweight = torch.mm(rows.mT, pair.flatten(0, -2)).to(ctx.weight_dtype)
        return grad, dweight, None, None, None


def linear_pair(
    pair: Tensor,
    weight: Tensor,
    primal: Tensor | None = None,
    dot_adjoint: Tensor | None = None,
) -> Tensor:
    """`linear` and its directional derivative, the weight held fixed.

    Shapes: pair [2, ..., in], weight [out, in] → [2, ..., out]; primal [..., out] and
    dot_adjoint [..., in] (the known cotangent of the input's tangent) are optional.
    Raises ValueError or TypeError if the arguments do not fit together.
    """
    check_floats(pair=pair, weight=weight, primal=primal, dot_adjoint=dot_adjoint)
    check_pair("pair", pair, "[2, ..., tokens, in]", 3)
    _check("pair", pair, weight)
    check_shape("primal", primal, (*pair.shape[1:-1], weight.shape[0]))
    check_shape("dot_adjoint", dot_adjoint, pair.shape[1:])
    put_off = receiver(pair, weight)
    used = weight if put_off is None else weight.detach()
    result: Tensor = _LinearPair.apply(pair.contiguous(), used, primal, dot_adjoint, put_off)
    return result
