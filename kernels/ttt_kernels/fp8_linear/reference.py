"""The plain definition of a linear map in float8, differentiable any number of times.

Every matrix product rounds both of its factors, along the axis it sums over, and is otherwise
differentiated as if they had not been rounded (straight through). Its derivatives are products of
the same kind.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels.fp8_linear.float8 import E4M3, E5M2, largest, round_to_float8


def _rounded(x: Tensor, dtype: torch.dtype, rowwise: bool) -> Tensor:
    values = round_to_float8(x, dtype, largest(x, rowwise)).values(x.dtype)
    return values[:, : x.shape[-1]]


class _Product(torch.autograd.Function):
    """a bᵀ of a [m, k] and b [n, k]; formats: a's, b's, and that of the product's gradient."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, formats: tuple[torch.dtype, ...], rowwise: bool
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.formats, ctx.rowwise = formats, rowwise
        return _rounded(a, formats[0], rowwise) @ _rounded(b, formats[1], rowwise).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a, of_b, of_dy = ctx.formats
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _Product.apply(dy, b.t(), (of_dy, of_b, of_a), ctx.rowwise)
        if ctx.needs_input_grad[1]:
            db = _Product.apply(dy.t(), a.t(), (of_dy, of_a, of_b), ctx.rowwise)
        return da, db, None, None


def fp8_linear(x: Tensor, weight: Tensor, *, rowwise: bool) -> Tensor:
    """x @ weightᵀ with scales of the tensors at hand: [..., in], [out, in] → [..., out].

    x and weight are e4m3 and all gradients e5m2; the gradient of a gradient, which has an input's
    place, is e4m3 again.
    """
    rows = x.reshape(-1, x.shape[-1])
    product: Tensor = _Product.apply(rows, weight.to(x.dtype), (E4M3, E4M3, E5M2), rowwise)
    return product.view(*x.shape[:-1], weight.shape[0])
