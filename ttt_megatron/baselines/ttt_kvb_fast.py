"""The fast MLPs of a TTT-KVB layer: what they put out, and their loss's gradient, in closed form.

Shapes: b sequences, n heads, t tokens; d a head's width, I the fast hidden width, F = I, or 2I
where a gate comes first. Matrix products are in the compute dtype, sums and everything else in
float32 (float64 of float64). All of it is ordinary torch, differentiable any number of times:
the outer gradient passes through inner gradients by autograd.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype
from ttt_megatron.config.mixers import BindingLoss, FastMLPKind


class FastWeights(NamedTuple):
    """One fast MLP a head: fc1 [b, n, F, d], fc2 [b, n, d, I], bias1 [b, n, F], bias2 [b, n, d]."""

    fc1: Tensor
    fc2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None


class Activations(NamedTuple):
    """Of a fast MLP on t tokens: before [b, n, t, F], hidden [b, n, t, I], out [b, n, t, d]."""

    before: Tensor
    hidden: Tensor
    out: Tensor


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y, multiplied in `dtype`; the result in its accumulation dtype."""
    return (x.to(dtype) @ y.to(dtype)).to(accumulation_dtype(dtype))


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ weightᵀ + bias: [b, n, t, in], [b, n, out, in] → [b, n, t, out]."""
    out = product(x, weight.mT, dtype)
    return out if bias is None else out + bias.unsqueeze(-2)


def activate(before: Tensor, kind: FastMLPKind) -> Tensor:
    """[..., F] → [..., I]: GELU (tanh form), or silu(gate) ⊙ up."""
    if kind == "gelu":
        return F.gelu(before, approximate="tanh")
    gate, up = before.chunk(2, dim=-1)
    return F.silu(gate) * up


_GELU_SLOPE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def activation_adjoint(hidden_adjoint: Tensor, before: Tensor, kind: FastMLPKind) -> Tensor:
    """The transposed derivative of `activate`: [..., I], [..., F] → [..., F]."""
    if kind == "gelu":
        square = before.square()
        curve = torch.tanh(_GELU_SLOPE * before * (1 + _GELU_CUBIC * square))
        slope = _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * square)
        return hidden_adjoint * 0.5 * (1 + curve + before * (1 - curve.square()) * slope)
    gate, up = before.chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    to_gate = hidden_adjoint * up * share * (1 + gate * (1 - share))
    return torch.cat((to_gate, hidden_adjoint * gate * share), dim=-1)


def run_fast(x: Tensor, weights: FastWeights, kind: FastMLPKind, dtype: torch.dtype) -> Activations:
    """The fast MLPs on x [b, n, t, d]."""
    before = affine(x, weights.fc1, weights.bias1, dtype)
    hidden = activate(before, kind)
    return Activations(before, hidden, affine(hidden, weights.fc2, weights.bias2, dtype))


@dataclass(frozen=True, kw_only=True)
class Binding:
    """How a fast MLP's output f is read, and the loss that binds keys to values.

    squared: read as x + LN(f), gain and bias [n, d], with the loss ½‖k + LN(f) − v‖²;
    dot: read as f, with the loss −⟨f, v⟩.
    """

    loss: BindingLoss
    gain: Tensor | None
    bias: Tensor | None
    eps: float

    def read(self, x: Tensor, out: Tensor) -> Tensor:
        """What a token whose input was x reads: [b, n, t, d] both."""
        if self.loss == "dot":
            return out
        return x.to(out.dtype) + self._scaled(self._normalised(out)[0])

    def adjoint(self, out: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The loss's gradient with respect to f(k), a token at a time: [b, n, t, d] all."""
        if self.loss == "dot":
            return -v.to(out.dtype)
        assert self.gain is not None
        normal, inverse = self._normalised(out)
        error = self._scaled(normal) + k.to(out.dtype) - v.to(out.dtype)
        adjoint = error * self.gain.to(out.dtype).unsqueeze(-2)
        along = (adjoint * normal).mean(-1, keepdim=True)
        return inverse * (adjoint - adjoint.mean(-1, keepdim=True) - normal * along)

    def _normalised(self, out: Tensor) -> tuple[Tensor, Tensor]:
        centred = out - out.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * inverse, inverse

    def _scaled(self, normal: Tensor) -> Tensor:
        assert self.gain is not None
        assert self.bias is not None
        gain, bias = self.gain.to(normal.dtype), self.bias.to(normal.dtype)
        return normal * gain.unsqueeze(-2) + bias.unsqueeze(-2)
