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
    load_block,
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
    out, total, highest, q, k_block, v_block, batch, head, row, start, low, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    k = load_block(k_block, 0, batch, head, start - low, KEYS, WIDTH)
    v = load_block(v_block, 0, batch, head, start - low, KEYS, WIDTH)
    s = product(q, tl.trans(k)) * (scale * LOG2E)
    if PARTIAL:
        # Scaled before: where a row sees nothing, the difference below must be exactly zero, and a
        # product fused with it would be rounded only once.
        s = tl.where(visible(row, start, low, window, ROWS, KEYS), s, HIDDEN)
    higher = tl.maximum(highest, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(p, 1)
    out = add_product(narrow(p, v.dtype), v, out * shrink[:, None])
    return out, total, higher


@triton.jit
def _keys(
    out, total, highest, q, k_block, v_block, batch, head, row, origin, first, full, stop, last,
    low, window, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    for index in range(0, full - first + last - stop):
        start = origin + partial_tile(index, first, full, stop) * KEYS
        out, total, highest = _tile(
            out, total, highest, q, k_block, v_block, batch, head, row, start, low, window, scale,
            ROWS, KEYS, WIDTH, True,
        )  # fmt: skip
    for tile in range(full, stop):
        out, total, highest = _tile(
            out, total, highest, q, k_block, v_block, batch, head, row, origin + tile * KEYS, low,
            window, scale, ROWS, KEYS, WIDTH, False,
        )  # fmt: skip
    return out, total, highest


@triton.jit
def forward_kernel(
    q_ptr, k_block, v_block, past_k_block, past_v_block, out_ptr, lse_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_out_b, stride_out_t, stride_out_h,
    length, past, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HAS_PAST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ROWS queries, query heads, sequences)."""
    row = tl.program_id(0) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // repeats
    q_head = at_head(q_ptr, batch, head, stride_q_b, stride_q_h)
    q = load_rows(q_head, row, stride_q_t, length, ROWS, D, WIDTH)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], HIDDEN, tl.float32)
    if HAS_PAST:
        origin, full, last = past_key_tiles(row, past, window, ROWS, KEYS)
        out, total, highest = _keys(
            out, total, highest, q, past_k_block, past_v_block, batch, kv_head, row, origin,
            0, full, last, last, -past, window, scale, ROWS, KEYS, WIDTH,
        )  # fmt: skip
    first, full, stop, last = own_key_tiles(row, length, window, ROWS, KEYS)
    out, total, highest = _keys(
        out, total, highest, q, k_block, v_block, batch, kv_head, row, 0,
        first, full, stop, last, 0, window, scale, ROWS, KEYS, WIDTH,
    )  # fmt: skip
    out_head = at_head(out_ptr, batch, head, stride_out_b, stride_out_h)
    store_rows(out_head, out / total[:, None], row, stride_out_t, length, ROWS, D, WIDTH)
    lse_head = at_head(lse_ptr, batch * tl.num_programs(1) + head, 0, length, 0)
    store_row_values(lse_head, (highest + tl.log2(total)) * LN2, row, length, ROWS)
