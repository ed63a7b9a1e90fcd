"""A linear map with static weights in float8: e4m3 values, e5m2 gradients, float32 sums.

    y = x̂ Ŵᵀ    x̄ = ŷ̄ Ŵ    W̄ = ŷ̄ᵀ x̂

with a hat for what was rounded. On a pair, value and tangent are rounded each with a scale of
their own, and so are their cotangents: they differ by orders of magnitude.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.arguments import check_axes, check_floats, check_pair, check_shape
from ttt_kernels.deferred import Receiver, receiver
from ttt_kernels.fp8_linear import reference
from ttt_kernels.fp8_linear.float8 import ALIGNMENT, Float8, multiply
from ttt_kernels.fp8_linear.scaling import CurrentScaling, DelayedScaling, Role
from ttt_kernels.mode import uses_plain_definitions


@dataclass(frozen=True)
class Float8Weight:
    """A weight [out, in] as the output needs it, and [in, out] as the input's gradient does."""

    forward: Float8
    backward: Float8


@torch.no_grad()
def fp8_weight(weight: Tensor, scaling: CurrentScaling) -> Float8Weight:
    """Round a weight [out, in], to be used until it changes.

    Raises ValueError if `out` or `in` is no multiple of 16.
    """
    if weight.dim() != 2 or any(size % ALIGNMENT for size in weight.shape):
        raise ValueError(
            f"a float8 linear map takes weights [out, in] of multiples of {ALIGNMENT}, and this "
            f"one is {list(weight.shape)}"
        )
    return Float8Weight(*scaling.round_weight(weight))


@dataclass(frozen=True)
class WeightProduct:
    """W̄ = dyᵀx, from dyᵀ [out, n] and xᵀ [in, n]."""

    dy: Float8
    x: Float8

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.dy.nbytes + self.x.nbytes

    def form(self, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        return multiply(self.dy, self.x, dtype)


def _weight_gradient(
    products: list[WeightProduct], dtype: torch.dtype, put_off: Receiver | None
) -> Tensor | None:
    """The sum of the products, or None where they are put off or not wanted."""
    total = None
    for product in products:
        if put_off is not None:
            put_off.add_product(product)
        elif total is None:
            total = product.form(dtype)
        else:
            total.add_(product.form(dtype))
    return total


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rounded: Float8Weight,
        scaling: CurrentScaling,
        put_off: Receiver | None,
    ) -> Tensor:
        ctx.scaling, ctx.put_off, ctx.weight_dtype = scaling, put_off, weight.dtype
        ctx.forms_weight = ctx.needs_input_grad[1] or put_off is not None
        rows = x.reshape(-1, x.shape[-1])
        value, *turned = scaling.round_sides(rows, "input", turned=ctx.forms_weight)
        kept = [part for of_x in turned for part in (of_x.data, of_x.inverse)]
        ctx.save_for_backward(rounded.backward.data, rounded.backward.inverse, *kept)
        return multiply(value, rounded.forward, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        data, inverse, *kept = ctx.saved_tensors
        role: Role = "cotangent" if ctx.forms_weight else "adjoint"
        rows = cotangent.reshape(-1, cotangent.shape[-1])
        dy, *turned = ctx.scaling.round_sides(rows, role, turned=ctx.forms_weight)
        dx = multiply(dy, Float8(data, inverse), rows.dtype)
        products = [WeightProduct(of_dy, Float8(*kept)) for of_dy in turned]
        dweight = _weight_gradient(products, ctx.weight_dtype, ctx.put_off)
        return dx.view(*cotangent.shape[:-1], -1), dweight, None, None, None


class _Fp8LinearPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pair: Tensor,
        weight: Tensor,
        rounded: Float8Weight,
        scaling: CurrentScaling,
        primal: Tensor | None,
        dot_adjoint: Tensor | None,
        put_off: Receiver | None,
    ) -> Tensor:
        ctx.scaling, ctx.put_off, ctx.weight_dtype = scaling, put_off, weight.dtype
        ctx.forms_weight = ctx.needs_input_grad[1] or put_off is not None
        out = pair.new_empty(*pair.shape[:-1], weight.shape[0])
        kept: list[Tensor] = []
        roles: tuple[Role, ...] = ("input", "tangent")
        for half, (role, known) in enumerate(zip(roles, (primal, None), strict=True)):
            rows = pair[half].reshape(-1, pair.shape[-1])
            found = scaling.round_sides(rows, role, straight=known is None, turned=ctx.forms_weight)
            if known is None:
                product = multiply(found.pop(0), rounded.forward, pair.dtype)
                out[half].view(-1, weight.shape[0]).copy_(product)
            else:
                out[half].copy_(known)
            kept += [part for of_x in found for part in (of_x.data, of_x.inverse)]
        backward = rounded.backward
        ctx.save_for_backward(dot_adjoint, backward.data, backward.inverse, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        dot_adjoint, data, inverse, *kept = ctx.saved_tensors
        grad = cotangent.new_empty(*cotangent.shape[:-1], data.shape[0])
        roles: tuple[Role, ...] = ("cotangent", "tangent_cotangent")
        products = []
        for half, (role, known) in enumerate(zip(roles, (None, dot_adjoint), strict=True)):
            rows = cotangent[half].reshape(-1, cotangent.shape[-1])
            found = ctx.scaling.round_sides(
                rows, role, straight=known is None, turned=ctx.forms_weight
            )
            if known is None:
                product = multiply(found.pop(0), Float8(data, inverse), grad.dtype)
                grad[half].view(-1, data.shape[0]).copy_(product)
            else:
                grad[half].copy_(known)
            if found:
                of_x = Float8(*kept[2 * half : 2 * half + 2])
                products.append(WeightProduct(found[0], of_x))
        dweight = _weight_gradient(products, ctx.weight_dtype, ctx.put_off)
        return grad, dweight, None, None, None, None, None


def _refuse_unfit(name: str, x: Tensor, weight: Tensor, **others: Tensor | None) -> None:
    check_floats(**{name: x, "weight": weight, **others})
    check_axes(name, x, "[..., in]", 1)
    check_axes("weight", weight, "[out, in]", 2)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the input's last axis is {x.shape[-1]} long, and the weight {list(weight.shape)} "
            f"takes {weight.shape[1]}"
        )


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scaling: CurrentScaling,
    rounded: Float8Weight | None = None,
) -> Tensor:
    """x @ weightᵀ in float8, in x's dtype: x [..., in], weight [out, in] → [..., out].

    `rounded` is `fp8_weight(weight, scaling)`, which need not be made anew for every call. Where
    x or its cotangent is not finite, nothing that comes of it is. float64 is rounded likewise, and
    summed in float64.

    Raises ValueError if shapes do not fit, or a plain definition (`plain_definitions`) is asked
    for of delayed scaling: what it rounds has no role.
    """
    _refuse_unfit("x", x, weight)
    if uses_plain_definitions():
        if isinstance(scaling, DelayedScaling):
            raise ValueError(
                "delayed scaling of float8 has no plain definition: use current scaling"
            )
        return reference.fp8_linear(x, weight, rowwise=scaling.rowwise)
    put_off = receiver(x, weight)
    result: Tensor = _Fp8Linear.apply(
        x,
        weight if put_off is None else weight.detach(),
        rounded or fp8_weight(weight, scaling),
        scaling,
        put_off,
    )
    return result


def fp8_linear_pair(
    pair: Tensor,
    weight: Tensor,
    scaling: CurrentScaling,
    rounded: Float8Weight | None = None,
    primal: Tensor | None = None,
    dot_adjoint: Tensor | None = None,
) -> Tensor:
    """`fp8_linear` and its directional derivative, the weight held fixed.

    Shapes: pair [2, ..., in], weight [out, in] → [2, ..., out]; primal [..., out] and
    dot_adjoint [..., in] (the known cotangent of the input's tangent) are optional.
    """
    _refuse_unfit("pair", pair, weight, primal=primal, dot_adjoint=dot_adjoint)
    check_pair("pair", pair, "[2, ..., tokens, in]", 3)
    check_shape("primal", primal, (*pair.shape[1:-1], weight.shape[0]))
    check_shape("dot_adjoint", dot_adjoint, pair.shape[1:])
    put_off = receiver(pair, weight)
    result: Tensor = _Fp8LinearPair.apply(
        pair,
        weight if put_off is None else weight.detach(),
        rounded or fp8_weight(weight, scaling),
        scaling,
        primal,
        dot_adjoint,
        put_off,
    )
    return result
