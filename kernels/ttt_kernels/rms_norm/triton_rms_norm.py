"""RMSNorm in Triton, on tensors and on pairs; the formulas are those of `op.py`.

A program normalises whole rows, in float32 whatever the tensors' dtype. Every pass reads its
inputs and writes its outputs once: nothing but r (and, of a pair, r·mean(r x ẋ)) is kept, a number
a row. The gain's gradient is a sum over all rows: each program sums the rows of a range that
depends on the shape alone, and the ranges' sums are added in order, so that runs agree bit for bit.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.triton_launch import as_rows, launch, next_power_of_two

_TILE = 2048
_RANGES = 512


@triton.jit
def forward_kernel(
    x_ptr,
    gain_ptr,
    out_ptr,
    scale_ptr,
    rows,
    stride_x,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    known = column < WIDTH
    inside = (row < rows)[:, None] & known[None, :]
    at = row.to(tl.int64)[:, None]
    gain = tl.load(gain_ptr + column, mask=known, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + at * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(out_ptr + at * WIDTH + column[None, :], x * scale[:, None] * gain, mask=inside)


@triton.jit
def backward_kernel(
    x_ptr,
    gain_ptr,
    scale_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    steps,
    stride_x,
    stride_dy,
    WIDTH: tl.constexpr,
    GAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    known = column < WIDTH
    gain = tl.load(gain_ptr + column, mask=known, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros([COLUMNS], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        at = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + at * stride_x + column[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at * stride_dy + column[None, :], mask=inside, other=0.0)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x.to(tl.float32) * scale
        dy = dy.to(tl.float32)
        u = dy * gain
        along = tl.sum(u * normed, axis=1)[:, None] / WIDTH
        tl.store(dx_ptr + at * WIDTH + column[None, :], (u - normed * along) * scale, mask=inside)
        if GAIN:
            dgain += tl.sum(dy * normed, axis=0)
    if GAIN:
        tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, dgain, mask=known)


@triton.jit
def pair_forward_kernel(
    x_ptr,
    gain_ptr,
    out_ptr,
    scale_ptr,
    along_ptr,
    rows,
    stride_x,
    stride_x_pair,
    stride_out_pair,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    known = column < WIDTH
    inside = (row < rows)[:, None] & known[None, :]
    at = row.to(tl.int64)[:, None]
    gain = tl.load(gain_ptr + column, mask=known, other=0.0).to(tl.float32)[None, :]
    from_ = x_ptr + at * stride_x + column[None, :]
    x = tl.load(from_, mask=inside, other=0.0).to(tl.float32)
    dot_x = tl.load(from_ + stride_x_pair, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    normed = x * scale[:, None]
    along = tl.sum(normed * dot_x, axis=1) / WIDTH * scale
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(along_ptr + row, along, mask=row < rows)
    to = out_ptr + at * WIDTH + column[None, :]
    tl.store(to, normed * gain, mask=inside)
    dot_normed = dot_x * scale[:, None] - normed * along[:, None]
    tl.store(to + stride_out_pair, dot_normed * gain, mask=inside)


@triton.jit
def pair_backward_kernel(
    x_ptr,
    gain_ptr,
    scale_ptr,
    along_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    steps,
    stride_x,
    stride_x_pair,
    stride_dy,
    stride_dy_pair,
    stride_dx_pair,
    WIDTH: tl.constexpr,
    GAIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    known = column < WIDTH
    gain = tl.load(gain_ptr + column, mask=known, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros([COLUMNS], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        at = row.to(tl.int64)[:, None]
        value = x_ptr + at * stride_x + column[None, :]
        cotangent = dy_ptr + at * stride_dy + column[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        along = tl.load(along_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(value, mask=inside, other=0.0).to(tl.float32) * scale
        dot_scaled = tl.load(value + stride_x_pair, mask=inside, other=0.0).to(tl.float32) * scale
        dy = tl.load(cotangent, mask=inside, other=0.0).to(tl.float32)
        dot_dy = tl.load(cotangent + stride_dy_pair, mask=inside, other=0.0).to(tl.float32)
        u = dy * gain
        w = dot_dy * gain
        mean_wx = tl.sum(w * normed, axis=1)[:, None] / WIDTH
        mean_rest = tl.sum(w * dot_scaled + u * normed, axis=1)[:, None] / WIDTH
        inner = u + normed * (3 * along * mean_wx - mean_rest) - dot_scaled * mean_wx - w * along
        to = dx_ptr + at * WIDTH + column[None, :]
        tl.store(to, inner * scale, mask=inside)
        tl.store(to + stride_dx_pair, (w - normed * mean_wx) * scale, mask=inside)
        if GAIN:
            dgain += tl.sum(dy * normed + dot_dy * (dot_scaled - normed * along), axis=0)
    if GAIN:
        tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, dgain, mask=known)


def tile(width: int) -> dict[str, int]:
    """The constants of a launch on rows of this width."""
    columns = next_power_of_two(width)
    return {
        "WIDTH": width,
        "ROWS": max(1, _TILE // columns),
        "COLUMNS": columns,
        "num_warps": min(16, max(4, columns // 512)),
    }


def _ranges(rows: int, block: int, want_gain: bool) -> tuple[int, int]:
    """Programs of a backward pass, and row tiles for each."""
    tiles = triton.cdiv(rows, block)
    steps = triton.cdiv(tiles, _RANGES) if want_gain and tiles else 1
    return triton.cdiv(tiles, steps), steps


def forward(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y as x, contiguous, and r [rows], float32."""
    flat, constants = as_rows(x), tile(x.shape[-1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = x.new_empty(len(flat), dtype=torch.float32)
    grid = (triton.cdiv(len(flat), constants["ROWS"]),)
    gain = gain.contiguous()
    launch(
        forward_kernel, grid, flat, gain, out, scale, len(flat), flat.stride(0), eps, **constants
    )
    return out, scale


def backward(
    x: Tensor, gain: Tensor, scale: Tensor, dy: Tensor, want_gain: bool
) -> tuple[Tensor, Tensor | None]:
    """(x̄ as x, ḡ as gain if wanted)."""
    flat, flat_dy, constants = as_rows(x), as_rows(dy), tile(x.shape[-1])
    programs, steps = _ranges(len(flat), constants["ROWS"], want_gain)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial = scale.new_empty(programs if want_gain else 0, x.shape[-1])
    launch(
        backward_kernel,
        (programs,),
        flat,
        gain.contiguous(),
        scale,
        flat_dy,
        dx,
        partial,
        len(flat),
        steps,
        flat.stride(0),
        flat_dy.stride(0),
        GAIN=want_gain,
        **constants,
    )
    return dx, partial.sum(0).to(gain.dtype) if want_gain else None


def pair_forward(pair: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The pair (y, ẏ), contiguous, and for each row r and r·mean(r x ẋ), float32."""
    flat, constants = as_rows(pair, keep=1), tile(pair.shape[-1])
    out = torch.empty_like(pair, memory_format=torch.contiguous_format)
    scale, along = pair.new_empty(2, flat.shape[1], dtype=torch.float32).unbind(0)
    launch(
        pair_forward_kernel,
        (triton.cdiv(flat.shape[1], constants["ROWS"]),),
        flat,
        gain.contiguous(),
        out,
        scale,
        along,
        flat.shape[1],
        flat.stride(1),
        flat.stride(0),
        out.stride(0),
        eps,
        **constants,
    )
    return out, scale, along


def pair_backward(
    pair: Tensor, gain: Tensor, scale: Tensor, along: Tensor, cotangent: Tensor, want_gain: bool
) -> tuple[Tensor, Tensor | None]:
    """(the pair's cotangent as pair, ḡ as gain if wanted)."""
    flat, flat_dy = as_rows(pair, keep=1), as_rows(cotangent, keep=1)
    constants, rows = tile(pair.shape[-1]), flat.shape[1]
    programs, steps = _ranges(rows, constants["ROWS"], want_gain)
    grad = torch.empty_like(pair, memory_format=torch.contiguous_format)
    partial = scale.new_empty(programs if want_gain else 0, pair.shape[-1])
    launch(
        pair_backward_kernel,
        (programs,),
        flat,
        gain.contiguous(),
        scale,
        along,
        flat_dy,
        grad,
        partial,
        rows,
        steps,
        flat.stride(1),
        flat.stride(0),
        flat_dy.stride(1),
        flat_dy.stride(0),
        grad.stride(0),
        GAIN=want_gain,
        **constants,
    )
    return grad, partial.sum(0).to(gain.dtype) if want_gain else None
