"""Forward pass: output and log-sum-exp, one program a tile of queries."""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ttt_kernels.swa_attention.triton_common import (
    HIDDEN,
    LN2,
    LOG2E,
    add_product,
    at_head,
    load_rows,
    narrow,
    own_key_tiles,
    partial_tile,
    past_key_tiles,
    product,
    store_row_values,
    store_rows,
    visible,
)


@triton.jit
def _tile(
    out, total, highest, q, k_ptr, v_ptr, stride_k, stride_v, row, start, low, high, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_ptr, start, stride_k, low, high, KEYS, D, WIDTH, PARTIAL)
    v = load_rows(v_ptr, start, stride_v, low, high, KEYS, D, WIDTH, PARTIAL)
    s = product(q, tl.trans(k)) * (scale * LOG2E)
    if PARTIAL:
        queries = row + tl.arange(0, ROWS)[:, None]
        keys = start + tl.arange(0, KEYS)[None, :]
        s = tl.where(visible(queries, keys, low, window), s, HIDDEN)
    higher = tl.maximum(highest, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(p, 1)
    out = add_product(narrow(p, v_ptr), v, out * shrink[:, None])
    return out, total, higher


@triton.jit
def _keys(
    out, total, highest, q, k_ptr, v_ptr, stride_k, stride_v, row, origin, first, full, stop, last,
    low, high, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    for index in range(0, full - first + last - stop):
        start = origin + partial_tile(index, first, full, stop) * KEYS
        out, total, highest = _tile(
            out, total, highest, q, k_ptr, v_ptr, stride_k, stride_v, row, start, low, high,
            window, scale, ROWS, KEYS, D, WIDTH, True,
        )  # fmt: skip
    for tile in range(full, stop):
        out, total, highest = _tile(
            out, total, highest, q, k_ptr, v_ptr, stride_k, stride_v, row, origin + tile * KEYS,
            low, high, window, scale, ROWS, KEYS, D, WIDTH, False,
        )  # fmt: skip
    return out, total, highest


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, past_k_ptr, past_v_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_past_k_b, stride_past_k_t, stride_past_k_h,
    stride_past_v_b, stride_past_v_t, stride_past_v_h, stride_out_b, stride_out_t, stride_out_h,
    length, past, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HAS_PAST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ROWS queries, query heads, sequences)."""
    row = tl.program_id(0) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // repeats
    q_head = at_head(q_ptr, batch, head, stride_q_b, stride_q_h)
    q = load_rows(q_head, row, stride_q_t, 0, length, ROWS, D, WIDTH, True)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], HIDDEN, tl.float32)
    if HAS_PAST:
        origin, full, last = past_key_tiles(row, past, window, ROWS, KEYS)
        past_k_end = at_head(past_k_ptr, batch, kv_head, stride_past_k_b, stride_past_k_h)
        past_v_end = at_head(past_v_ptr, batch, kv_head, stride_past_v_b, stride_past_v_h)
        past_k_end += tl.cast(past, tl.int64) * stride_past_k_t
        past_v_end += tl.cast(past, tl.int64) * stride_past_v_t
        out, total, highest = _keys(
            out, total, highest, q, past_k_end, past_v_end, stride_past_k_t, stride_past_v_t, row,
            origin, 0, full, last, last, -past, 0, window, scale, ROWS, KEYS, D, WIDTH,
        )  # fmt: skip
    first, full, stop, last = own_key_tiles(row, length, window, ROWS, KEYS)
    k_head = at_head(k_ptr, batch, kv_head, stride_k_b, stride_k_h)
    v_head = at_head(v_ptr, batch, kv_head, stride_v_b, stride_v_h)
    out, total, highest = _keys(
        out, total, highest, q, k_head, v_head, stride_k_t, stride_v_t, row,
        0, first, full, stop, last, 0, length, window, scale, ROWS, KEYS, D, WIDTH,
    )  # fmt: skip
    out_head = at_head(out_ptr, batch, head, stride_out_b, stride_out_h)
    store_rows(out_head, out / total[:, None], row, stride_out_t, length, ROWS, D, WIDTH)
    lse_head = at_head(lse_ptr, batch * tl.num_programs(1) + head, 0, length, 0)
    store_row_values(lse_head, (highest + tl.log2(total)) * LN2, row, length, ROWS)
