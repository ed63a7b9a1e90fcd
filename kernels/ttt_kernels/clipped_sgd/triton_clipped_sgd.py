"""Passes over a list of fast weights in Triton.

Every pass reads and writes each weight once: with 346M of them on a device of 4.3 TB/s a norm
takes at least 0.32 ms in float32 (0.16 ms where gradients are bfloat16), a step (two reads, one
write) 0.97 ms. One launch a tensor: the fast weights of a block are tens of megabytes, so that a
launch is hidden behind the one before.

Sums go in two stages and without atomics: each program sums a range of a tensor that depends on
shapes alone into a place of its own, then one program a sequence adds up the places of the whole
list. Scales are read from device memory, one a sequence.

Tensors that lie alike are read as one row of memory. Others (autograd hands out transposed
gradients) are read tile by tile, each along its own contiguous axis.
"""
# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.triton_launch import launch

STEPS = 8
"""Tiles a program sums."""

IN_A_ROW = {"ROWS": 1, "COLUMNS": 4096, "num_warps": 8}
IN_TILES = {"ROWS": 64, "COLUMNS": 64, "num_warps": 8}
SUMS = 1024


@triton.jit
def _tile(index, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column numbers of a tile, and which of them exist."""
    across = tl.cdiv(columns, COLUMNS)
    row = (index // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (index % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def products_kernel(
    a_ptr,
    b_ptr,
    partial_ptr,
    rows,
    columns,
    stride_a,
    stride_a_row,
    stride_a_column,
    stride_b,
    stride_b_row,
    stride_b_column,
    stride_partial,
    SAME: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        index = tl.program_id(0) * STEPS + step
        row, column, inside = _tile(index, rows, columns, ROWS, COLUMNS)
        at = sequence * stride_a + row * stride_a_row + column * stride_a_column
        a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SAME:
            total += a * a
        else:
            at = sequence * stride_b + row * stride_b_row + column * stride_b_column
            total += a * tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    own = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(partial_ptr + sequence * stride_partial + tl.program_id(0), own)


@triton.jit
def sums_kernel(partial_ptr, out_ptr, count, stride_partial, COLUMNS: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        total += tl.load(
            partial_ptr + sequence * stride_partial + place, mask=place < count, other=0.0
        )
    tl.store(out_ptr + sequence, tl.sum(total, axis=0))


@triton.jit
def combine_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    scale_a_ptr,
    scale_b_ptr,
    rows,
    columns,
    stride_a,
    stride_a_row,
    stride_a_column,
    stride_b,
    stride_b_row,
    stride_b_column,
    stride_out,
    stride_out_row,
    stride_out_column,
    SCALED: tl.constexpr,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    row, column, inside = _tile(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    at = sequence * stride_a + row * stride_a_row + column * stride_a_column
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = sequence * stride_b + row * stride_b_row + column * stride_b_column
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        a *= tl.load(scale_a_ptr + sequence).to(tl.float32)
    scale = tl.load(scale_b_ptr + sequence).to(tl.float32)
    at = sequence * stride_out + row * stride_out_row + column * stride_out_column
    tl.store(out_ptr + at, a + SIGN * (scale * b), mask=inside)


class _Placed(NamedTuple):
    """Tensors [b, rows, columns] as a kernel goes through them, and the tiles it needs."""

    tensors: list[Tensor]
    constants: dict[str, int]
    tiles: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows and columns, then the strides of every tensor."""
        strides = [stride for x in self.tensors for stride in x.stride()]
        return *self.tensors[0].shape[1:], *strides


def _place(*tensors: Tensor) -> _Placed:
    """Tensors of equal shape [b, out, in]; raises ValueError if they are not."""
    shape = tensors[0].shape
    if len(shape) != 3 or any(x.shape != shape for x in tensors):
        raise ValueError(f"expected tensors of one shape [b, out, in], got {_shapes(tensors)}")
    for views in (list(tensors), [x.mT for x in tensors]):
        if all(x.is_contiguous() for x in views):
            flat = [x.view(shape[0], 1, -1) for x in views] if shape.numel() else views
            return _Placed(flat, IN_A_ROW, triton.cdiv(flat[0].shape[-1], IN_A_ROW["COLUMNS"]))
    tiles = triton.cdiv(shape[1], IN_TILES["ROWS"]) * triton.cdiv(shape[2], IN_TILES["COLUMNS"])
    return _Placed(list(tensors), IN_TILES, tiles)


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(str(list(x.shape)) for x in tensors)


def sequence_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """As `op.sequence_products`; float32."""
    placed = [_place(x, y) for x, y in zip(a, b, strict=True)]
    programs = [triton.cdiv(p.tiles, STEPS) for p in placed]
    sequences = a[0].shape[0]
    partial = a[0].new_empty(sequences, sum(programs), dtype=torch.float32)
    done = 0
    for one, count in zip(placed, programs, strict=True):
        launch(
            products_kernel,
            (count, sequences),
            *one.tensors,
            partial[:, done:],
            *one.sizes,
            partial.stride(0),
            SAME=_same(*one.tensors),
            STEPS=STEPS,
            **one.constants,
        )
        done += count
    out = a[0].new_empty(sequences, dtype=torch.float32)
    launch(sums_kernel, (sequences,), partial, out, done, partial.stride(0), COLUMNS=SUMS)
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype


def add_scaled_(
    totals: Sequence[Tensor], terms: Sequence[Tensor], scale: Tensor, sign: int
) -> None:
    """As `op.add_scaled_`."""
    scale = scale.contiguous()
    for total, term in zip(totals, terms, strict=True):
        if any(s == 0 and n > 1 for s, n in zip(total.stride(), total.shape, strict=True)):
            raise RuntimeError(
                "several entries of a tensor to be changed lie at one place in memory"
            )
        one = _place(total, term, total)
        _combine(one, scale, scale, scaled=False, sign=sign)


def scaled_differences(
    a: Sequence[Tensor], scale_a: Tensor, b: Sequence[Tensor], scale_b: Tensor
) -> list[Tensor]:
    """As `op.scaled_differences`."""
    scale_a, scale_b = scale_a.contiguous(), scale_b.contiguous()
    out = [torch.empty_like(x) for x in a]
    for x, y, to in zip(a, b, out, strict=True):
        _combine(_place(x, y, to), scale_a, scale_b, scaled=True, sign=-1)
    return out


def _combine(one: _Placed, scale_a: Tensor, scale_b: Tensor, scaled: bool, sign: int) -> None:
    sequences = one.tensors[0].shape[0]
    if scale_a.shape != (sequences,) or scale_b.shape != (sequences,):
        raise ValueError(f"expected {sequences} scales, got {_shapes([scale_a, scale_b])}")
    grid = one.tiles, sequences
    scales = scale_a, scale_b
    launch(
        combine_kernel,
        grid,
        *one.tensors,
        *scales,
        *one.sizes,
        SCALED=scaled,
        SIGN=sign,
        **one.constants,
    )
