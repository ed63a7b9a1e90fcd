"""Forward pass of a pair: output, its tangent, μ and log-sum-exp in one pass over the keys."""
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
    load_row_values,
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
    out, dot_out, total, moment, highest, q, dot_q, k_block, v_block, batch, head, row, start, low,
    window, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr, TANGENTS: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    k = load_block(k_block, 0, batch, head, start - low, KEYS, WIDTH)
    v = load_block(v_block, 0, batch, head, start - low, KEYS, WIDTH)
    s = product(q, tl.trans(k)) * (scale * LOG2E)
    dot_s = product(dot_q, tl.trans(k))
    if TANGENTS:
        dot_k = load_block(k_block, 1, batch, head, start - low, KEYS, WIDTH)
        dot_s = add_product(q, tl.trans(dot_k), dot_s)
    if PARTIAL:
        # Scaled before, as in the plain forward pass: rows that see nothing yet must not overflow.
        s = tl.where(visible(row, start, low, window, ROWS, KEYS), s, HIDDEN)
    if not SAVED:
        higher = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2(highest - higher)
        highest = higher
        total *= shrink
        moment *= shrink
        out *= shrink[:, None]
        dot_out *= shrink[:, None]
    p = tl.exp2(s - highest[:, None])
    moved = p * (dot_s * scale)
    moment += tl.sum(moved, 1)
    dot_out = add_product(narrow(moved, v.dtype), v, dot_out)
    if not SAVED:
        total += tl.sum(p, 1)
        out = add_product(narrow(p, v.dtype), v, out)
    if TANGENTS:
        dot_v = load_block(v_block, 1, batch, head, start - low, KEYS, WIDTH)
        dot_out = add_product(narrow(p, v.dtype), dot_v, dot_out)
    return out, dot_out, total, moment, highest


@triton.jit
def _keys(
    out, dot_out, total, moment, highest, q, dot_q, k_block, v_block, batch, head, row, origin,
    first, full, stop, last, low, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    TANGENTS: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    for index in range(0, full - first + last - stop):
        start = origin + partial_tile(index, first, full, stop) * KEYS
        out, dot_out, total, moment, highest = _tile(
            out, dot_out, total, moment, highest, q, dot_q, k_block, v_block, batch, head, row,
            start, low, window, scale, ROWS, KEYS, WIDTH, True, TANGENTS, SAVED,
        )  # fmt: skip
    for tile in range(full, stop):
        out, dot_out, total, moment, highest = _tile(
            out, dot_out, total, moment, highest, q, dot_q, k_block, v_block, batch, head, row,
            origin + tile * KEYS, low, window, scale, ROWS, KEYS, WIDTH, False, TANGENTS, SAVED,
        )  # fmt: skip
    return out, dot_out, total, moment, highest


@triton.jit
def pair_forward_kernel(
    q_ptr, dot_q_ptr, k_block, v_block, past_k_block, past_v_block,
    saved_out_ptr, out_ptr, dot_out_ptr, lse_ptr, mu_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_saved_b, stride_saved_t, stride_saved_h,
    stride_out_b, stride_out_t, stride_out_h,
    length, past, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HAS_PAST: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ROWS queries, query heads, sequences).

    If SAVED, the output and the log-sum-exp of the same inputs are read, not computed.
    """
    row = tl.program_id(0) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // repeats
    q_head = at_head(q_ptr, batch, head, stride_q_b, stride_q_h)
    dot_q_head = at_head(dot_q_ptr, batch, head, stride_q_b, stride_q_h)
    q = load_rows(q_head, row, stride_q_t, length, ROWS, D, WIDTH)
    dot_q = load_rows(dot_q_head, row, stride_q_t, length, ROWS, D, WIDTH)
    lse_head = at_head(lse_ptr, batch * tl.num_programs(1) + head, 0, length, 0)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    dot_out = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], HIDDEN, tl.float32)
    if SAVED:
        highest = load_row_values(lse_head, row, length, ROWS) * LOG2E
    if HAS_PAST:
        origin, full, last = past_key_tiles(row, past, window, ROWS, KEYS)
        out, dot_out, total, moment, highest = _keys(
            out, dot_out, total, moment, highest, q, dot_q, past_k_block, past_v_block, batch,
            kv_head, row, origin, 0, full, last, last, -past, window, scale, ROWS, KEYS, WIDTH,
            False, SAVED,
        )  # fmt: skip
    first, full, stop, last = own_key_tiles(row, length, window, ROWS, KEYS)
    out, dot_out, total, moment, highest = _keys(
        out, dot_out, total, moment, highest, q, dot_q, k_block, v_block, batch, kv_head, row, 0,
        first, full, stop, last, 0, window, scale, ROWS, KEYS, WIDTH, True, SAVED,
    )  # fmt: skip
    if SAVED:
        saved_head = at_head(saved_out_ptr, batch, head, stride_saved_b, stride_saved_h)
        out = load_rows(saved_head, row, stride_saved_t, length, ROWS, D, WIDTH)
        out = out.to(tl.float32)
    else:
        out = out / total[:, None]
        dot_out = dot_out / total[:, None]
        moment = moment / total
        store_row_values(lse_head, (highest + tl.log2(total)) * LN2, row, length, ROWS)
    dot_out -= moment[:, None] * out
    mu_head = at_head(mu_ptr, batch * tl.num_programs(1) + head, 0, length, 0)
    store_row_values(mu_head, moment, row, length, ROWS)
    out_head = at_head(out_ptr, batch, head, stride_out_b, stride_out_h)
    dot_out_head = at_head(dot_out_ptr, batch, head, stride_out_b, stride_out_h)
    store_rows(out_head, out, row, stride_out_t, length, ROWS, D, WIDTH)
    store_rows(dot_out_head, dot_out, row, stride_out_t, length, ROWS, D, WIDTH)
