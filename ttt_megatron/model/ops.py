"""The operations the model is written over.

Each takes ordinary tensors, or operands of another kind whose rules are registered from outside
(`meta` registers pairs of a primal and a tangent). The model is thereby written once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ttt_kernels

Operand = Any
"""A tensor, or an operand of a registered kind that stands for one."""


class Operation:
    """A function on tensors, with one further rule for each registered kind of operand."""

    def __init__(self, on_tensors: Callable[..., Any]) -> None:
        self._on_tensors = on_tensors
        self._rules: dict[type, Callable[..., Any]] = {}
        self.__doc__ = on_tensors.__doc__
        self.__name__ = on_tensors.__name__

    def rule(self, kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the implementation used as soon as one operand is of this kind."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._rules[kind] = function
            return function

        return register

    def __call__(self, *operands: Operand, **settings: Any) -> Any:
        for operand in operands:
            rule = self._rules.get(type(operand))
            if rule is not None:
                return rule(*operands, **settings)
        return self._on_tensors(*operands, **settings)


@Operation
def add(x: Operand, y: Operand) -> Operand:
    """x + y, of equal shapes."""
    return x + y


@Operation
def linear(x: Operand, weight: Tensor) -> Operand:
    """x @ weightᵀ with static weights: [b, T, in], [out, in] → [b, T, out]."""
    return ttt_kernels.linear(x, weight)


@Operation
def float8_linear(x: Operand, weight: Tensor, product: Callable[..., Tensor]) -> Operand:
    """The same in float8, as the layer's `product` does it."""
    return product(x, weight)


@Operation
def fast_linear(x: Operand, weight: Operand) -> Operand:
    """x @ weightᵀ, weights per sequence: [b, T, in], [b, out, in] (or [out, in]) → [b, T, out]."""
    return ttt_kernels.fast_linear(x, weight)


@Operation
def rms_norm(x: Operand, gain: Tensor, *, eps: float) -> Operand:
    """RMS-normalise the last axis and scale it by gain."""
    return ttt_kernels.rms_norm(x, gain, eps)


@Operation
def swiglu(gate_up: Operand) -> Operand:
    """silu(gate) ⊙ up: [b, T, 2I] → [b, T, I]."""
    return ttt_kernels.swiglu(gate_up)


@Operation
def rope(x: Operand, rotation: Tensor) -> Operand:
    """Rotate [b, T, n, d] by the tokens' angles [T, d/2]."""
    return ttt_kernels.rope(x, rotation)


@Operation
def split_heads(qkv: Operand, *, num_kv_heads: int, head_dim: int) -> tuple[Operand, ...]:
    """[b, T, (n + 2 n_kv)·d] → q [b, T, n, d], k and v [b, T, n_kv, d].

    The columns are grouped by key head: its query heads, then its key, then its value, so that
    a tensor-parallel cut by key heads is a cut into contiguous columns.
    """
    grouped = qkv.unflatten(-1, (num_kv_heads, -1, head_dim))
    q, k, v = torch.split(grouped, [grouped.shape[-2] - 2, 1, 1], dim=-2)
    return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)


@Operation
def merge_heads(x: Operand) -> Operand:
    """[b, T, n, d] → [b, T, n·d]."""
    return x.flatten(-2)


@Operation
def attention(
    q: Operand,
    k: Operand,
    v: Operand,
    past_k: Tensor | None,
    past_v: Tensor | None,
    *,
    window: int | None,
) -> Operand:
    """Causal attention over [past | own] keys: [b, T, n, d] → [b, T, n, d]."""
    return ttt_kernels.swa_attention(q, k, v, window, past_k, past_v)


@Operation
def map_tokens(x: Operand, function: Callable[[Tensor], Tensor]) -> Operand:
    """Apply a linear function of [..., T, H] that treats leading axes alike."""
    return function(x)


@Operation
def primal(x: Operand) -> Tensor:
    """The ordinary tensor an operand stands for."""
    return x
