"""RoPE in Triton: rotates [..., T, n, d] where it lies, by a table of cosines and sines.

One kernel turns forwards and, for the backward pass, back. A head's components are read and written
in one piece, each once; a pair is one more leading axis.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.triton_launch import launch, next_power_of_two

_TILE = 2048


@triton.jit
def rotate_kernel(
    x_ptr,
    table_ptr,
    out_ptr,
    rows,
    tokens,
    heads,
    stride_lead,
    stride_token,
    stride_head,
    WIDTH: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 2 * HALF)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    token = (row // heads) % tokens
    at = (row // heads // tokens).to(tl.int64) * stride_lead
    at += token.to(tl.int64) * stride_token + (row % heads).to(tl.int64) * stride_head
    x = tl.load(x_ptr + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(table_ptr + token[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    cos, sin = tl.split(tl.reshape(turn, (ROWS, HALF, 2)))
    if BACK:
        sin = -sin
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, 2 * HALF))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], turned, mask=inside)


def tile(width: int) -> dict[str, int]:
    """The constants of a launch on heads of this width."""
    half = next_power_of_two(width // 2)
    return {"WIDTH": width, "HALF": half, "ROWS": max(1, _TILE // (2 * half)), "num_warps": 4}


def rotate(x: Tensor, rotation: Tensor, back: bool) -> Tensor:
    """x [..., T, n, d] turned by rotation [T, d/2], complex, or back; contiguous."""
    heads = x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4)
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    table = torch.view_as_real(rotation.to(torch.complex64).resolve_conj()).contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    constants = tile(x.shape[-1])
    lead, tokens, count, _ = heads.shape
    rows = lead * tokens * count
    grid = (triton.cdiv(rows, constants["ROWS"]),)
    sizes = rows, tokens, count, *heads.stride()[:3]
    launch(rotate_kernel, grid, heads, table, out, *sizes, BACK=back, **constants)
    return out
