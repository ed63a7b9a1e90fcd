"""What the attention kernels share: products, loads, and which tiles of keys or queries to visit.

Positions are counted from the first own query: query i sits at i, own key j at j, and the cached
keys at −P … −1. Query i sees key j if 0 ≤ i − j < window.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies the raw bits of bfloat16, so there products are of float32."""

HIDDEN = tl.constexpr(-1e30)
"""The score of a key that a query does not see; finite, so that no row of a tile turns to NaN."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b):
    """a b, summed in float32."""
    if INTERPRETED or a.dtype == tl.float32:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b)
    return result


@triton.jit
def add_product(a, b, total):
    """total + a b, summed in float32."""
    if INTERPRETED or a.dtype == tl.float32:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        result = tl.dot(a, b, total)
    return result


@triton.jit
def narrow(x, element: tl.constexpr):
    """float32 values in the type `element`, rounded to nearest.

    The interpreter cuts bits off where it converts to bfloat16: round there by hand.
    """
    if INTERPRETED and element == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(element)


@triton.jit
def load_block(block, part, batch, head, start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows start … start + ROWS − 1 of one head of a [parts, b, n, rows, d] tensor descriptor.

    Whatever lies outside the tensor is zero. Loops read their operands by descriptors: the tensor
    memory accelerator needs no registers for addresses and masks.
    """
    return tl.reshape(block.load([part, batch, head, start, 0]), [ROWS, WIDTH])


@triton.jit
def load_rows(ptr, start, stride, high, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows start … start + ROWS − 1 of a matrix of D columns and `high` rows, as [ROWS, WIDTH].

    Whatever lies outside the matrix is zero.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    pointers = ptr + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    there = (start + rows < high)[:, None]
    if WIDTH != D:
        there = there & (columns < D)[None, :]
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def store_rows(
    ptr, tile, start, stride, high, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    """Write rows start … of a matrix of D columns and `high` rows."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    pointers = ptr + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    there = (start + rows < high)[:, None]
    if WIDTH != D:
        there = there & (columns < D)[None, :]
    tl.store(pointers, narrow(tile, ptr.dtype.element_ty), mask=there)


@triton.jit
def load_row_values(ptr, start, high, ROWS: tl.constexpr):
    """One float32 a row; zero past the last."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(ptr + rows, mask=rows < high, other=0.0)


@triton.jit
def store_row_values(ptr, values, start, high, ROWS: tl.constexpr):
    """One float32 a row."""
    rows = start + tl.arange(0, ROWS)
    tl.store(ptr + rows, values, mask=rows < high)


@triton.jit
def at_head(ptr, batch, head, stride_b, stride_h):
    """The pointer to one head of one sequence."""
    return ptr + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def own_key_tiles(row, length, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Tiles of own keys that queries row … row + ROWS − 1 see: (first, full, stop, last).

    Tiles first … last − 1 hold a visible key; of full … stop − 1 every query sees every key.
    """
    last = tl.cdiv(tl.minimum(row + ROWS, length), KEYS)
    first = tl.maximum(row - window + 1, 0) // KEYS
    full = tl.cdiv(tl.maximum(row + ROWS - window, 0), KEYS)
    full = tl.minimum(tl.maximum(full, first), last)
    stop = tl.minimum(tl.maximum((row + 1) // KEYS, full), last)
    return first, full, stop, last


@triton.jit
def past_key_tiles(row, past, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """As `own_key_tiles`, of cached keys: (origin, full, last). Tile t begins at origin + t·KEYS.

    Tiles end with the cache, so every tile but the leading ones is full.
    """
    last = tl.cdiv(tl.maximum(tl.minimum(past, window - 1 - row), 0), KEYS)
    full = last - tl.minimum(tl.maximum(tl.minimum(past, window - row - ROWS), 0) // KEYS, last)
    return -last * KEYS, full, last


@triton.jit
def query_tiles(key, end, length, window, ROWS: tl.constexpr):
    """Tiles of queries that see keys at key … end − 1: (first, full, stop, last)."""
    first = tl.maximum(key, 0) // ROWS
    reached = tl.minimum(end - 1 + window, length)
    last = tl.maximum(tl.cdiv(tl.maximum(reached, 0), ROWS), first)
    full = tl.cdiv(tl.maximum(end - 1, 0), ROWS)
    full = tl.minimum(tl.maximum(full, first), last)
    stop = tl.minimum(tl.maximum(key + window, 0), length) // ROWS
    stop = tl.minimum(tl.maximum(stop, full), last)
    return first, full, stop, last


@triton.jit
def partial_tile(index, first, full, stop):
    """The index-th of the tiles first … full − 1, stop … ."""
    leading = full - first
    return tl.where(index < leading, first + index, stop + index - leading)


@triton.jit
def visible(row, start, low, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether queries row … see keys start …, of which there are none before `low`."""
    keys = start + tl.arange(0, KEYS)[None, :]
    distance = row + tl.arange(0, ROWS)[:, None] - keys
    return (distance >= 0) & (distance < window) & (keys >= low)


@triton.jit
def seen_by(row, key, length, window, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether keys key … are seen by queries row … length − 1: [KEYS, ROWS]."""
    queries = row + tl.arange(0, ROWS)[None, :]
    distance = queries - key - tl.arange(0, KEYS)[:, None]
    return (distance >= 0) & (distance < window) & (queries < length)
