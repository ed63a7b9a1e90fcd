"""Backward pass: one kernel for dq, one for dk and dv; without atomics, so deterministic."""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ttt_kernels.swa_attention.triton_common import (
    HIDDEN,
    LOG2E,
    add_product,
    at_head,
    load_row_values,
    load_rows,
    narrow,
    own_key_tiles,
    partial_tile,
    past_key_tiles,
    product,
    query_tiles,
    store_row_values,
    store_rows,
    visible,
)


@triton.jit
def _dq_tile(
    dq, q, d_out, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, row, start, low, high, window,
    scale, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_ptr, start, stride_k, low, high, KEYS, D, WIDTH, PARTIAL)
    v = load_rows(v_ptr, start, stride_v, low, high, KEYS, D, WIDTH, PARTIAL)
    s = product(q, tl.trans(k)) * (scale * LOG2E)
    if PARTIAL:
        queries = row + tl.arange(0, ROWS)[:, None]
        keys = start + tl.arange(0, KEYS)[None, :]
        s = tl.where(visible(queries, keys, low, window), s, HIDDEN)
    p = tl.exp2(s - lse2[:, None])
    ds = p * (product(d_out, tl.trans(v)) - delta[:, None])
    return add_product(narrow(ds, k_ptr), k, dq)


@triton.jit
def _dq_keys(
    dq, q, d_out, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, row, origin, first, full, stop,
    last, low, high, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    for index in range(0, full - first + last - stop):
        start = origin + partial_tile(index, first, full, stop) * KEYS
        dq = _dq_tile(
            dq, q, d_out, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, row, start, low, high,
            window, scale, ROWS, KEYS, D, WIDTH, True,
        )  # fmt: skip
    for tile in range(full, stop):
        dq = _dq_tile(
            dq, q, d_out, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, row,
            origin + tile * KEYS, low, high, window, scale, ROWS, KEYS, D, WIDTH, False,
        )  # fmt: skip
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, past_k_ptr, past_v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_past_k_b, stride_past_k_t, stride_past_k_h,
    stride_past_v_b, stride_past_v_t, stride_past_v_h, stride_out_b, stride_out_t, stride_out_h,
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
    q = load_rows(q_head, row, stride_q_t, 0, length, ROWS, D, WIDTH, True)
    d_out = load_rows(d_out_head, row, stride_d_out_t, 0, length, ROWS, D, WIDTH, True)
    out = load_rows(out_head, row, stride_out_t, 0, length, ROWS, D, WIDTH, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    statistics = batch * tl.num_programs(1) + head
    delta_head = at_head(delta_ptr, statistics, 0, length, 0)
    store_row_values(delta_head, delta, row, length, ROWS)
    lse_head = at_head(lse_ptr, statistics, 0, length, 0)
    lse2 = load_row_values(lse_head, row, length, ROWS) * LOG2E
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    if HAS_PAST:
        origin, full, last = past_key_tiles(row, past, window, ROWS, KEYS)
        past_k_end = at_head(past_k_ptr, batch, kv_head, stride_past_k_b, stride_past_k_h)
        past_v_end = at_head(past_v_ptr, batch, kv_head, stride_past_v_b, stride_past_v_h)
        past_k_end += tl.cast(past, tl.int64) * stride_past_k_t
        past_v_end += tl.cast(past, tl.int64) * stride_past_v_t
        dq = _dq_keys(
            dq, q, d_out, lse2, delta, past_k_end, past_v_end, stride_past_k_t, stride_past_v_t,
            row, origin, 0, full, last, last, -past, 0, window, scale, ROWS, KEYS, D, WIDTH,
        )  # fmt: skip
    first, full, stop, last = own_key_tiles(row, length, window, ROWS, KEYS)
    k_head = at_head(k_ptr, batch, kv_head, stride_k_b, stride_k_h)
    v_head = at_head(v_ptr, batch, kv_head, stride_v_b, stride_v_h)
    dq = _dq_keys(
        dq, q, d_out, lse2, delta, k_head, v_head, stride_k_t, stride_v_t, row,
        0, first, full, stop, last, 0, length, window, scale, ROWS, KEYS, D, WIDTH,
    )  # fmt: skip
    dq_head = at_head(dq_ptr, batch, head, stride_dq_b, stride_dq_h)
    store_rows(dq_head, dq * scale, row, stride_dq_t, length, ROWS, D, WIDTH)


@triton.jit
def _dkv_tile(
    dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr, stride_q, stride_d_out, row, key, length,
    window, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    q = load_rows(q_ptr, row, stride_q, 0, length, ROWS, D, WIDTH, PARTIAL)
    d_out = load_rows(d_out_ptr, row, stride_d_out, 0, length, ROWS, D, WIDTH, PARTIAL)
    lse2 = load_row_values(lse_ptr, row, length, ROWS) * LOG2E
    delta = load_row_values(delta_ptr, row, length, ROWS)
    s = product(k, tl.trans(q)) * (scale * LOG2E)
    if PARTIAL:
        queries = row + tl.arange(0, ROWS)[None, :]
        keys = key + tl.arange(0, KEYS)[:, None]
        seen = visible(queries, keys, key, window) & (queries < length)
        s = tl.where(seen, s, HIDDEN)
    p = tl.exp2(s - lse2[None, :])
    dv = add_product(narrow(p, q_ptr), d_out, dv)
    ds = p * (product(v, tl.trans(d_out)) - delta[None, :])
    dk = add_product(narrow(ds, q_ptr), q, dk)
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_d_out_b, stride_d_out_t, stride_d_out_h,
    stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    length, num_keys, offset, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of KEYS keys, key heads, sequences); key j sits at position j + offset."""
    start = tl.program_id(0) * KEYS
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    k_head = at_head(k_ptr, batch, kv_head, stride_k_b, stride_k_h)
    v_head = at_head(v_ptr, batch, kv_head, stride_v_b, stride_v_h)
    k = load_rows(k_head, start, stride_k_t, 0, num_keys, KEYS, D, WIDTH, True)
    v = load_rows(v_head, start, stride_v_t, 0, num_keys, KEYS, D, WIDTH, True)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    key = start + offset
    first, full, stop, last = query_tiles(key, length, window, ROWS, KEYS)
    for repeat in range(0, repeats):
        head = kv_head * repeats + repeat
        q_head = at_head(q_ptr, batch, head, stride_q_b, stride_q_h)
        d_out_head = at_head(d_out_ptr, batch, head, stride_d_out_b, stride_d_out_h)
        statistics = batch * tl.num_programs(1) * repeats + head
        lse_head = at_head(lse_ptr, statistics, 0, length, 0)
        delta_head = at_head(delta_ptr, statistics, 0, length, 0)
        for index in range(0, full - first + last - stop):
            row = partial_tile(index, first, full, stop) * ROWS
            dk, dv = _dkv_tile(
                dk, dv, k, v, q_head, d_out_head, lse_head, delta_head, stride_q_t,
                stride_d_out_t, row, key, length, window, scale, ROWS, KEYS, D, WIDTH, True,
            )  # fmt: skip
        for tile in range(full, stop):
            dk, dv = _dkv_tile(
                dk, dv, k, v, q_head, d_out_head, lse_head, delta_head, stride_q_t,
                stride_d_out_t, tile * ROWS, key, length, window, scale, ROWS, KEYS, D, WIDTH,
                False,
            )  # fmt: skip
    dk_head = at_head(dk_ptr, batch, kv_head, stride_dk_b, stride_dk_h)
    dv_head = at_head(dv_ptr, batch, kv_head, stride_dv_b, stride_dv_h)
    store_rows(dk_head, dk * scale, start, stride_dk_t, num_keys, KEYS, D, WIDTH)
    store_rows(dv_head, dv, start, stride_dv_t, num_keys, KEYS, D, WIDTH)
