"""SwiGLU in Triton, on tensors and on pairs; the formulas are those of `op.py`.

Elementwise in float32 over [rows, width], the gate's columns left of the up projection's in one
tensor. Every pass reads its inputs and writes its outputs once and keeps nothing.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.triton_launch import as_rows, launch, next_power_of_two

COLUMNS = 1024
"""The most columns one program takes."""


@triton.jit
def _silu_and_slope(gate):
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return sigmoid, silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def forward_kernel(x_ptr, out_ptr, width, stride_x, stride_out, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    value = x_ptr + row * stride_x + column
    gate = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(value + width, mask=inside, other=0.0).to(tl.float32)
    _, silu, _ = _silu_and_slope(gate)
    tl.store(out_ptr + row * stride_out + column, silu * up, mask=inside)


@triton.jit
def backward_kernel(
    x_ptr, dy_ptr, dx_ptr, width, stride_x, stride_dy, stride_dx, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    value = x_ptr + row * stride_x + column
    gate = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(value + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
    _, silu, slope = _silu_and_slope(gate)
    to = dx_ptr + row * stride_dx + column
    tl.store(to, slope * up * dy, mask=inside)
    tl.store(to + width, silu * dy, mask=inside)


@triton.jit
def pair_forward_kernel(
    x_ptr,
    out_ptr,
    width,
    stride_x,
    stride_x_pair,
    stride_out,
    stride_out_pair,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    value = x_ptr + row * stride_x + column
    gate = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(value + width, mask=inside, other=0.0).to(tl.float32)
    value += stride_x_pair
    dot_gate = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    dot_up = tl.load(value + width, mask=inside, other=0.0).to(tl.float32)
    _, silu, slope = _silu_and_slope(gate)
    to = out_ptr + row * stride_out + column
    tl.store(to, silu * up, mask=inside)
    tl.store(to + stride_out_pair, slope * dot_gate * up + silu * dot_up, mask=inside)


@triton.jit
def pair_backward_kernel(
    x_ptr,
    dy_ptr,
    dx_ptr,
    width,
    stride_x,
    stride_x_pair,
    stride_dy,
    stride_dy_pair,
    stride_dx,
    stride_dx_pair,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    value = x_ptr + row * stride_x + column
    cotangent = dy_ptr + row * stride_dy + column
    gate = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(value + width, mask=inside, other=0.0).to(tl.float32)
    value += stride_x_pair
    dot_gate = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    dot_up = tl.load(value + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(cotangent, mask=inside, other=0.0).to(tl.float32)
    dot_dy = tl.load(cotangent + stride_dy_pair, mask=inside, other=0.0).to(tl.float32)
    sigmoid, silu, slope = _silu_and_slope(gate)
    curvature = (1.0 - sigmoid) * (2.0 * sigmoid + silu * (1.0 - 2.0 * sigmoid))
    second = curvature * dot_gate * up + slope * dot_up
    to = dx_ptr + row * stride_dx + column
    tl.store(to, dy * slope * up + dot_dy * second, mask=inside)
    tl.store(to + width, dy * silu + dot_dy * slope * dot_gate, mask=inside)
    to += stride_dx_pair
    tl.store(to, dot_dy * slope * up, mask=inside)
    tl.store(to + width, dot_dy * silu, mask=inside)


def _grid(rows: int, width: int) -> tuple[tuple[int, int], int]:
    """The grid, and the columns of one program."""
    columns = min(COLUMNS, next_power_of_two(width))
    return (rows, triton.cdiv(width, columns)), columns


def forward(gate_up: Tensor) -> Tensor:
    """[..., 2I] → [..., I], contiguous."""
    flat, width = as_rows(gate_up), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid, columns = _grid(len(flat), width)
    launch(forward_kernel, grid, flat, out, width, flat.stride(0), width, COLUMNS=columns)
    return out


def backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """The cotangent of gate_up, contiguous."""
    flat, flat_dy, width = as_rows(gate_up), as_rows(dy), gate_up.shape[-1] // 2
    grad = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grid, columns = _grid(len(flat), width)
    strides = flat.stride(0), flat_dy.stride(0), 2 * width
    launch(backward_kernel, grid, flat, flat_dy, grad, width, *strides, COLUMNS=columns)
    return grad


def pair_forward(pair: Tensor) -> Tensor:
    """[2, ..., 2I] → [2, ..., I], contiguous."""
    flat, width = as_rows(pair, keep=1), pair.shape[-1] // 2
    out = pair.new_empty(*pair.shape[:-1], width)
    grid, columns = _grid(flat.shape[1], width)
    strides = flat.stride(1), flat.stride(0), width, out.stride(0)
    launch(pair_forward_kernel, grid, flat, out, width, *strides, COLUMNS=columns)
    return out


def pair_backward(pair: Tensor, cotangent: Tensor) -> Tensor:
    """The pair's cotangent, contiguous."""
    flat, flat_dy, width = as_rows(pair, keep=1), as_rows(cotangent, keep=1), pair.shape[-1] // 2
    grad = torch.empty_like(pair, memory_format=torch.contiguous_format)
    grid, columns = _grid(flat.shape[1], width)
    strides = (
        *(flat.stride(1), flat.stride(0)),
        *(flat_dy.stride(1), flat_dy.stride(0)),
        *(2 * width, grad.stride(0)),
    )
    launch(pair_backward_kernel, grid, flat, flat_dy, grad, width, *strides, COLUMNS=columns)
    return grad
