"""Backward pass: one kernel for dq, one for dk and dv; without atomics, so deterministic."""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ttt_kernels.swa_attention.triton_common import (
    HIDDEN,
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
    query_tiles,
    seen_by,
    store_row_values,
    store_rows,
    visible,
)


@triton.jit
def _dq_tile(
    dq, q, d_out, lse2, delta, k_block, v_block, batch, head, row, start, low, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    k = load_block(k_block, 0, batch, head, start - low, KEYS, WIDTH)
    v = load_block(v_block, 0, batch, head, start - low, KEYS, WIDTH)
    s = product(q, tl.trans(k))
    if PARTIAL:
        s = tl.where(visible(row, start, low, window, ROWS, KEYS), s, HIDDEN)
    p = tl.exp2(s * (scale * LOG2E) - lse2[:, None])
    ds = p * (product(d_out, tl.trans(v)) - delta[:, None])
    return add_product(narrow(ds, k.dtype), k, dq)


@triton.jit
def _dq_keys(
    dq, q, d_out, lse2, delta, k_block, v_block, batch, head, row, origin, first, full, stop,
    last, low, window, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    for index in range(0, full - first + last - stop):
        start = origin + partial_tile(index, first, full, stop) * KEYS
        dq = _dq_tile(
            dq, q, d_out, lse2, delta, k_block, v_block, batch, head, row, start, low, window,
            scale, ROWS, KEYS, WIDTH, True,
        )  # fmt: skip
    for tile in range(full, stop):
        dq = _dq_tile(
            dq, q, d_out, lse2, delta, k_block, v_block, batch, head, row, origin + tile * KEYS,
            low, window, scale, ROWS, KEYS, WIDTH, False,
        )  # fmt: skip
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_block, v_block, past_k_block, past_v_block, out_ptr, d_out_ptr, lse_ptr, delta_ptr,
    dq_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_out_b, stride_out_t, stride_out_h,
    stride_d_out_b, stride_d_out_t, stride_d_out_h, stride_dq_b, stride_dq_t, stride_dq_h,
    length, past, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HAS_PAST: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ROWS queries, query heads, sequences). Also writes δ = rowsum(Ō∘O)."""
    row = tl.program_id(0) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // repeats
    q_head = at_head(q_ptr, batch, head, stride_q_b, stride_q_h)
    out_head = at_head(out_ptr, batch, head, stride_out_b, stride_out_h)
    d_out_head = at_head(d_out_ptr, batch, head, stride_d_out_b, stride_d_out_h)
    q = load_rows(q_head, row, stride_q_t, length, ROWS, D, WIDTH)
    d_out = load_rows(d_out_head, row, stride_d_out_t, length, ROWS, D, WIDTH)
    out = load_rows(out_head, row, stride_out_t, length, ROWS, D, WIDTH)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    statistics = batch * tl.num_programs(1) + head
    delta_head = at_head(delta_ptr, statistics, 0, length, 0)
    store_row_values(delta_head, delta, row, length, ROWS)
    lse_head = at_head(lse_ptr, statistics, 0, length, 0)
    lse2 = load_row_values(lse_head, row, length, ROWS) * LOG2E
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    if HAS_PAST:
        origin, full, last = past_key_tiles(row, past, window, ROWS, KEYS)
        dq = _dq_keys(
            dq, q, d_out, lse2, delta, past_k_block, past_v_block, batch, kv_head, row, origin,
            0, full, last, last, -past, window, scale, ROWS, KEYS, WIDTH,
        )  # fmt: skip
    first, full, stop, last = own_key_tiles(row, length, window, ROWS, KEYS)
    dq = _dq_keys(
        dq, q, d_out, lse2, delta, k_block, v_block, batch, kv_head, row, 0,
        first, full, stop, last, 0, window, scale, ROWS, KEYS, WIDTH,
    )  # fmt: skip
    dq_head = at_head(dq_ptr, batch, head, stride_dq_b, stride_dq_h)
    store_rows(dq_head, dq * scale, row, stride_dq_t, length, ROWS, D, WIDTH)


@triton.jit
def _dkv_tile(
    dk, dv, k, v, q_block, d_out_block, batch, head, lse_ptr, delta_ptr, row, key, length, window,
    scale, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    q = load_block(q_block, 0, batch, head, row, ROWS, WIDTH)
    d_out = load_block(d_out_block, 0, batch, head, row, ROWS, WIDTH)
    lse2 = load_row_values(lse_ptr, row, length, ROWS) * LOG2E
    delta = load_row_values(delta_ptr, row, length, ROWS)
    s = product(k, tl.trans(q))
    if PARTIAL:
        s = tl.where(seen_by(row, key, length, window, ROWS, KEYS), s, HIDDEN)
    p = tl.exp2(s * (scale * LOG2E) - lse2[None, :])
    dv = add_product(narrow(p, q.dtype), d_out, dv)
    ds = p * (product(v, tl.trans(d_out)) - delta[None, :])
    dk = add_product(narrow(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit
def dkv_kernel(
    k_ptr, v_ptr, q_block, d_out_block, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    length, num_keys, offset, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of KEYS keys, key heads, sequences); key j sits at position j + offset."""
    start = tl.program_id(0) * KEYS
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    k_head = at_head(k_ptr, batch, kv_head, stride_k_b, stride_k_h)
    v_head = at_head(v_ptr, batch, kv_head, stride_v_b, stride_v_h)
    k = load_rows(k_head, start, stride_k_t, num_keys, KEYS, D, WIDTH)
    v = load_rows(v_head, start, stride_v_t, num_keys, KEYS, D, WIDTH)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    key, end = start + offset, tl.minimum(start + KEYS, num_keys) + offset
    first, full, stop, last = query_tiles(key, end, length, window, ROWS)
    for repeat in range(0, repeats):
        head = kv_head * repeats + repeat
        statistics = batch * tl.num_programs(1) * repeats + head
        lse_head = at_head(lse_ptr, statistics, 0, length, 0)
        delta_head = at_head(delta_ptr, statistics, 0, length, 0)
        for index in range(0, full - first + last - stop):
            row = partial_tile(index, first, full, stop) * ROWS
            dk, dv = _dkv_tile(
                dk, dv, k, v, q_block, d_out_block, batch, head, lse_head, delta_head, row, key,
                length, window, scale, ROWS, KEYS, WIDTH, True,
            )  # fmt: skip
        for tile in range(full, stop):
            dk, dv = _dkv_tile(
                dk, dv, k, v, q_block, d_out_block, batch, head, lse_head, delta_head,
                tile * ROWS, key, length, window, scale, ROWS, KEYS, WIDTH, False,
            )  # fmt: skip
    dk_head = at_head(dk_ptr, batch, kv_head, stride_dk_b, stride_dk_h)
    dv_head = at_head(dv_ptr, batch, kv_head, stride_dv_b, stride_dv_h)
    store_rows(dk_head, dk * scale, start, stride_dk_t, num_keys, KEYS, D, WIDTH)
    store_rows(dv_head, dv, start, stride_dv_t, num_keys, KEYS, D, WIDTH)
