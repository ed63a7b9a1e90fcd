"""Rounding to float8 in Triton: a matrix and, if asked for, its transpose from one read of it.

A tile is read once, scaled, rounded and written either way, each with scales of its own. The scales
are worked out within the kernel from the largest values (or a power given from the host's side of
a step), so that rounding takes two launches: the largest values, and this.

The bits are formed by integers, to the nearest with ties to even: the same on every device, and in
Triton's interpreter, whose own casts to float8 are not exact.
"""
# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.triton_launch import launch

TILE = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}
FORMATS = {
    torch.float8_e4m3fn: {"MANTISSA": 3, "BIAS": 7, "TOP": 0x43E00000, "TOP_EXPONENT": 8},
    torch.float8_e5m2: {"MANTISSA": 2, "BIAS": 15, "TOP": 0x47600000, "TOP_EXPONENT": 15},
}
"""`TOP` are the float32 bits of the largest value, 1.75 · 2^TOP_EXPONENT in either format."""


@triton.jit
def _fitting(amax, TOP_EXPONENT: tl.constexpr):
    """As `float8.fitting_exponent`."""
    bits = amax.to(tl.int32, bitcast=True)
    above = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    fitting = TOP_EXPONENT - ((bits >> 23) - 127) - above
    fitting = tl.minimum(tl.maximum(fitting, -126), 126)
    return tl.where(amax > 0, fitting, 0)


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr):
    """The bits of x [float32] in float8, uint8; what is too large saturates, NaN stays one."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    unknown = size > 0x7F800000
    size = tl.minimum(size, TOP)
    shift: tl.constexpr = 23 - MANTISSA
    rounded = size + ((1 << (shift - 1)) - 1) + ((size >> shift) & 1)
    normal = (rounded >> shift) - ((127 - BIAS) << MANTISSA)
    # Beside a number whose last place is the smallest float8's, nothing smaller is kept.
    beside: tl.constexpr = (1 - BIAS - MANTISSA + 23 + 127) << 23
    number = size.to(tl.float32, bitcast=True)
    sum_of_both = number + tl.full(number.shape, beside, tl.int32).to(tl.float32, bitcast=True)
    small = sum_of_both.to(tl.int32, bitcast=True) - beside
    code = tl.where(size < ((127 + 1 - BIAS) << 23), small, normal)
    code = tl.where(unknown, 0x7F, code) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def round_kernel(
    x_ptr,
    amax_ptr,
    turned_amax_ptr,
    power_ptr,
    pending_ptr,
    out_ptr,
    inverse_ptr,
    turned_ptr,
    turned_inverse_ptr,
    rows,
    columns,
    stride_x,
    stride_out,
    stride_turned,
    BY_ROW: tl.constexpr,
    GIVEN: tl.constexpr,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
    TOP_EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = row.to(tl.int64)[:, None], (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + at * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if BY_ROW:
        if STRAIGHT:
            amax = tl.load(amax_ptr + row, mask=row < rows, other=0.0)
            power = _fitting(amax, TOP_EXPONENT)
            if tl.program_id(1) == 0:
                tl.store(inverse_ptr + row, _power(-power) + amax * 0, mask=row < rows)
            code = _encode(x * _power(power)[:, None], MANTISSA, BIAS, TOP)
            tl.store(
                out_ptr + at * stride_out + column[None, :],
                code,
                mask=(row < rows)[:, None] & (column < stride_out)[None, :],
            )
        if TURNED:
            amax = tl.load(turned_amax_ptr + column, mask=column < columns, other=0.0)
            power = _fitting(amax, TOP_EXPONENT)
            if tl.program_id(0) == 0:
                inverse = _power(-power) + amax * 0
                tl.store(turned_inverse_ptr + column, inverse, mask=column < columns)
            code = _encode(x * _power(power)[None, :], MANTISSA, BIAS, TOP)
            tl.store(
                turned_ptr + column.to(tl.int64)[None, :] * stride_turned + row[:, None],
                code,
                mask=(row < stride_turned)[:, None] & (column < columns)[None, :],
            )
    else:
        amax = tl.load(amax_ptr)
        power = _fitting(amax, TOP_EXPONENT)
        if GIVEN:
            given = tl.load(power_ptr)
            power = tl.where(given < -126, power, given)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(inverse_ptr, _power(-power) + amax * 0)
            if GIVEN:
                seen = tl.where(amax < float("inf"), amax, 0.0)
                tl.store(pending_ptr, tl.maximum(tl.load(pending_ptr), seen))
        code = _encode(x * _power(power), MANTISSA, BIAS, TOP)
        if STRAIGHT:
            tl.store(
                out_ptr + at * stride_out + column[None, :],
                code,
                mask=(row < rows)[:, None] & (column < stride_out)[None, :],
            )
        if TURNED:
            tl.store(
                turned_ptr + column.to(tl.int64)[None, :] * stride_turned + row[:, None],
                code,
                mask=(row < stride_turned)[:, None] & (column < columns)[None, :],
            )


class Sides(NamedTuple):
    """Data and inverse scales of a matrix and of its transpose, where they were asked for."""

    straight: tuple[Tensor, Tensor] | None
    turned: tuple[Tensor, Tensor] | None


def round_sides(
    x: Tensor,
    dtype: torch.dtype,
    amax: Tensor,
    turned_amax: Tensor,
    *,
    straight: bool,
    turned: bool,
    by_row: bool,
    power: Tensor | None = None,
    pending: Tensor | None = None,
) -> Sides:
    """x [rows, columns] and its transpose in float8, the sums' axes filled up to multiples of 16.

    amax is float32, [] or, by row, [rows, 1]; turned_amax [] or [columns, 1]. power [] int32
    replaces the power of two that fits, unless it is below −126; pending [] float32 then grows to
    the largest finite value.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    row_pitch, column_pitch = columns + -columns % 16, rows + -rows % 16

    def made(wanted: bool, first: int, second: int) -> tuple[Tensor, Tensor] | None:
        if not wanted:
            return None
        scales = (first, 1) if by_row else ()
        return (
            torch.empty(first, second, dtype=torch.uint8, device=x.device),
            torch.empty(scales, dtype=torch.float32, device=x.device),
        )

    found = Sides(made(straight, rows, row_pitch), made(turned, columns, column_pitch))
    some = found.straight or found.turned
    assert some is not None
    # One scale is one for both: it is written once.
    out, inverse = found.straight or some
    turned_out, turned_inverse = found.turned or some
    launch(
        round_kernel,
        (triton.cdiv(column_pitch, TILE["ROWS"]), triton.cdiv(row_pitch, TILE["COLUMNS"])),
        x,
        amax,
        turned_amax,
        amax if power is None else power,
        amax if pending is None else pending,
        out,
        inverse,
        turned_out,
        turned_inverse,
        rows,
        columns,
        x.stride(0),
        row_pitch,
        column_pitch,
        BY_ROW=by_row,
        GIVEN=power is not None,
        STRAIGHT=straight,
        TURNED=turned,
        **FORMATS[dtype],
        **TILE,
    )
    return Sides(
        found.straight and (out.view(dtype), inverse),
        found.turned and (turned_out.view(dtype), turned_inverse if by_row else inverse),
    )
