"""Matrices of eight-bit floats with the scales that give them their values back.

Scales are powers of two: multiplying by them rounds nothing, and as long as nothing underflows or
saturates, which power it is changes no result. So it matters little whether a scale was found
from a whole tensor or from one process's part of it, from this step or from the one before.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_kernels.triton_launch import suits_triton

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

ALIGNMENT = 16
"""What tensor cores want the lengths of a product's sums, and its columns, to be multiples of."""

# Both largest values are 1.75 times a power of two.
_LARGEST = {E4M3: 448.0, E5M2: 57344.0}
_EXPONENT = {E4M3: 8, E5M2: 15}
_MOST = 126
_MANTISSA_BITS, _MANTISSA_OF_1_75 = 23, 0x600000


@dataclass(frozen=True)
class Float8:
    """A matrix [rows, k], rows contiguous: `data` · `inverse`.

    inverse is float32: one value [], or one a row [rows, 1]. It is NaN where what was rounded
    held an infinity or NaN, so that no product with it is finite.
    """

    data: Tensor
    inverse: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.inverse.nbytes

    def values(self, dtype: torch.dtype) -> Tensor:
        """What the matrix stands for: [rows, k]."""
        return self.data.to(dtype) * self.inverse.to(dtype)


def largest(x: Tensor, rowwise: bool) -> Tensor:
    """The largest absolute value of x [rows, k], float32: [], or [rows, 1]. NaN where there is one.

    An infinity stays one.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dim = -1 if rowwise else None
    return torch.linalg.vector_norm(x, torch.inf, dim=dim, keepdim=rowwise, dtype=wide).float()


def fitting_exponent(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest k (int32) for which 2^k · amax is no more than the dtype's largest value.

    k is 0 where amax is 0 or NaN, and between −126 and 126, so that 2^k and 2^−k are normal
    float32 numbers.
    """
    bits = amax.view(torch.int32)
    exponent = (bits >> _MANTISSA_BITS) - 127
    above = (bits & ((1 << _MANTISSA_BITS) - 1)) > _MANTISSA_OF_1_75
    fitting = _EXPONENT[dtype] - exponent - above.int()
    return torch.where(amax > 0, fitting, 0).clamp(-_MOST, _MOST).int()


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float32 and exact, for int32 exponents between −126 and 127."""
    return ((exponent + 127) << _MANTISSA_BITS).view(torch.float32)


def round_to_float8(
    x: Tensor, dtype: torch.dtype, amax: Tensor, exponent: Tensor | None = None
) -> Float8:
    """x [rows, k] times a power of two, rounded; k is filled up with zeros to a multiple of 16.

    amax is `largest(x, …)`, by rows or not. Without an exponent it is the one that fits amax; with
    one of other origin, what is too large saturates.
    """
    fits = exponent is None
    if exponent is None:
        exponent = fitting_exponent(amax, dtype)
    # float16 has too few exponents to be scaled in.
    wide = x.float() if x.dtype == torch.float16 else x
    scaled = wide * power_of_two(exponent).to(wide.dtype)
    if not fits:
        scaled = scaled.clamp(-_LARGEST[dtype], _LARGEST[dtype])
    if x.shape[-1] % ALIGNMENT:
        scaled = F.pad(scaled, (0, -x.shape[-1] % ALIGNMENT))
    # Casts and clamps make finite numbers of infinities: the scale tells of them instead.
    inverse = power_of_two(-exponent) + amax * 0
    return Float8(scaled.to(dtype).contiguous(), inverse)


class History(NamedTuple):
    """A scale from past steps: the power of two [] int32 (one below −126: there is none yet, and
    the one that fits is taken), and the largest finite value of this step so far, [] float32,
    which grows.
    """

    power: Tensor
    pending: Tensor


def round_sides(
    x: Tensor,
    dtype: torch.dtype,
    *,
    straight: bool = True,
    turned: bool = False,
    rowwise: bool = False,
    history: History | None = None,
) -> list[Float8]:
    """x [rows, k] for sums over k, its transpose [k, rows] for sums over rows, as asked for.

    By rows, the transpose has scales of its own. Scales that have a history are one a matrix. In
    Triton on CUDA, but for float64.
    """
    if not (straight or turned):
        return []
    amax = largest(x, rowwise) if straight or not rowwise else x.new_empty((), dtype=torch.float32)
    turned_amax = largest(x.t(), True) if turned and rowwise else amax
    if suits_triton(x):
        from ttt_kernels.fp8_linear import triton_round

        found = triton_round.round_sides(
            x,
            dtype,
            amax,
            turned_amax,
            straight=straight,
            turned=turned,
            by_row=rowwise,
            power=None if history is None else history.power,
            pending=None if history is None else history.pending,
        )
        return [Float8(*one) for one in found if one is not None]
    exponent = None
    if history is not None:
        seen = torch.where(amax.isfinite(), amax, 0.0)
        history.pending.copy_(torch.maximum(history.pending, seen))
        known = history.power >= -_MOST
        exponent = torch.where(known, history.power, fitting_exponent(amax, dtype))
    if rowwise:
        ways = ((straight, x, amax), (turned, x.t(), turned_amax))
        return [round_to_float8(way, dtype, most) for wanted, way, most in ways if wanted]
    one = round_to_float8(x, dtype, amax, exponent)
    both = [one] if straight else []
    return [*both, _transposed(one, x.shape[1])] if turned else both


def _transposed(matrix: Float8, k: int) -> Float8:
    """[k, rows] of a matrix [rows, k or more] with one scale, rows filled up with zeros."""
    rows = matrix.data.shape[0]
    raw = torch.empty if rows % ALIGNMENT == 0 else torch.zeros
    data = raw(k, rows + -rows % ALIGNMENT, dtype=torch.uint8, device=matrix.data.device)
    data[:, :rows].copy_(matrix.data.view(torch.uint8)[:, :k].t())
    return Float8(data.view(matrix.data.dtype), matrix.inverse)


def multiply(a: Float8, b: Float8, dtype: torch.dtype) -> Tensor:
    """a bᵀ: [m, k], [n, k] → [m, n], summed in float32; float64 is summed in float64.

    Both have one scale, or both one a row.
    """
    if dtype == torch.float64:
        return a.values(dtype) @ b.values(dtype).t()
    rowwise = a.inverse.dim() > 0
    # CUDA's kernel with scales by rows writes bfloat16 alone.
    written = torch.bfloat16 if rowwise and a.data.is_cuda else dtype
    product = torch._scaled_mm(
        a.data,
        b.data.t(),
        scale_a=a.inverse,
        scale_b=b.inverse.t() if rowwise else b.inverse,
        out_dtype=written,
    )
    return product.to(dtype)
