"""Backward pass of a pair, keys and values: cotangents of k, v and of their tangents.

The formulas stand in `triton_pair_dq`; here tiles are transposed, keys by queries, so that a
program sums over queries in registers.
"""
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
    partial_tile,
    product,
    query_tiles,
    seen_by,
    store_rows,
)


@triton.jit
def _tile(
    dk, ddot_k, dv, ddot_v, k, dot_k, v, dot_v, q_block, d_out_block, batch, head,
    lse_ptr, mu_ptr, gamma_ptr, delta_ptr, row, key, length, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PARTIAL: tl.constexpr,
    TANGENTS: tl.constexpr, KNOWN: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
):  # fmt: skip
    q = load_block(q_block, 0, batch, head, row, ROWS, WIDTH)
    dot_q = load_block(q_block, 1, batch, head, row, ROWS, WIDTH)
    d_out = load_block(d_out_block, 0, batch, head, row, ROWS, WIDTH)
    e = load_block(d_out_block, 1, batch, head, row, ROWS, WIDTH)
    s = product(k, tl.trans(q))
    if PARTIAL:
        s = tl.where(seen_by(row, key, length, window, ROWS, KEYS), s, HIDDEN)
    lse2 = load_row_values(lse_ptr, row, length, ROWS) * LOG2E
    p = tl.exp2(s * (scale * LOG2E) - lse2[None, :])
    # Two products wait for the last sum over p, not three: registers are what limits the tile.
    dds = p
    if WANT_K:
        g = product(v, tl.trans(e)) - load_row_values(gamma_ptr, row, length, ROWS)[None, :]
        dds = p * g
        dk = add_product(narrow(dds, q.dtype), dot_q, dk)
        if TANGENTS and not KNOWN:
            ddot_k = add_product(narrow(dds, q.dtype), q, ddot_k)
    dot_s = product(k, tl.trans(dot_q))
    if TANGENTS:
        dot_s = add_product(dot_k, tl.trans(q), dot_s)
    centred = dot_s * scale - load_row_values(mu_ptr, row, length, ROWS)[None, :]
    if WANT_V:
        dv = add_product(narrow(p, q.dtype), d_out, dv)
        dv = add_product(narrow(p * centred, q.dtype), e, dv)
        if TANGENTS and not KNOWN:
            ddot_v = add_product(narrow(p, q.dtype), e, ddot_v)
    if WANT_K:
        moved = dds * centred
        ds = product(v, tl.trans(d_out))
        if TANGENTS:
            ds = add_product(dot_v, tl.trans(e), ds)
        delta = load_row_values(delta_ptr, row, length, ROWS)
        ds = p * (ds - delta[None, :]) + moved
        dk = add_product(narrow(ds, q.dtype), q, dk)
    return dk, ddot_k, dv, ddot_v


@triton.jit
def pair_dkv_kernel(
    k_ptr, dot_k_ptr, v_ptr, dot_v_ptr, q_block, d_out_block,
    lse_ptr, mu_ptr, gamma_ptr, delta_ptr, dk_ptr, ddot_k_ptr, dv_ptr, ddot_v_ptr,
    stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_dk_b, stride_dk_t, stride_dk_h, stride_dv_b, stride_dv_t, stride_dv_h,
    length, num_keys, offset, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TANGENTS: tl.constexpr, KNOWN: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of KEYS keys, key heads, sequences); key j sits at position j + offset.

    TANGENTS: the keys have tangents (own keys do, cached ones do not); KNOWN: their cotangents
    are not formed; WANT_K, WANT_V: which results are.
    """
    start = tl.program_id(0) * KEYS
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    k_head = at_head(k_ptr, batch, kv_head, stride_k_b, stride_k_h)
    v_head = at_head(v_ptr, batch, kv_head, stride_v_b, stride_v_h)
    k = load_rows(k_head, start, stride_k_t, num_keys, KEYS, D, WIDTH)
    v = load_rows(v_head, start, stride_v_t, num_keys, KEYS, D, WIDTH)
    dot_k, dot_v = k, v
    if TANGENTS:
        dot_k_head = at_head(dot_k_ptr, batch, kv_head, stride_k_b, stride_k_h)
        dot_v_head = at_head(dot_v_ptr, batch, kv_head, stride_v_b, stride_v_h)
        dot_k = load_rows(dot_k_head, start, stride_k_t, num_keys, KEYS, D, WIDTH)
        dot_v = load_rows(dot_v_head, start, stride_v_t, num_keys, KEYS, D, WIDTH)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    ddot_k = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    ddot_v = tl.zeros([KEYS, WIDTH], tl.float32)
    key, end = start + offset, tl.minimum(start + KEYS, num_keys) + offset
    first, full, stop, last = query_tiles(key, end, length, window, ROWS)
    for repeat in range(0, repeats):
        head = kv_head * repeats + repeat
        statistics = batch * tl.num_programs(1) * repeats + head
        lse_head = at_head(lse_ptr, statistics, 0, length, 0)
        mu_head = at_head(mu_ptr, statistics, 0, length, 0)
        gamma_head = at_head(gamma_ptr, statistics, 0, length, 0)
        delta_head = at_head(delta_ptr, statistics, 0, length, 0)
        for index in range(0, full - first + last - stop):
            row = partial_tile(index, first, full, stop) * ROWS
            dk, ddot_k, dv, ddot_v = _tile(
                dk, ddot_k, dv, ddot_v, k, dot_k, v, dot_v, q_block, d_out_block, batch, head,
                lse_head, mu_head, gamma_head, delta_head, row, key, length, window, scale,
                ROWS, KEYS, WIDTH, True, TANGENTS, KNOWN, WANT_K, WANT_V,
            )  # fmt: skip
        for tile in range(full, stop):
            dk, ddot_k, dv, ddot_v = _tile(
                dk, ddot_k, dv, ddot_v, k, dot_k, v, dot_v, q_block, d_out_block, batch, head,
                lse_head, mu_head, gamma_head, delta_head, tile * ROWS, key, length, window,
                scale, ROWS, KEYS, WIDTH, False, TANGENTS, KNOWN, WANT_K, WANT_V,
            )  # fmt: skip
    if WANT_K:
        dk_head = at_head(dk_ptr, batch, kv_head, stride_dk_b, stride_dk_h)
        store_rows(dk_head, dk * scale, start, stride_dk_t, num_keys, KEYS, D, WIDTH)
        if TANGENTS and not KNOWN:
            ddot_k_head = at_head(ddot_k_ptr, batch, kv_head, stride_dk_b, stride_dk_h)
            store_rows(ddot_k_head, ddot_k * scale, start, stride_dk_t, num_keys, KEYS, D, WIDTH)
    if WANT_V:
        dv_head = at_head(dv_ptr, batch, kv_head, stride_dv_b, stride_dv_h)
        store_rows(dv_head, dv, start, stride_dv_t, num_keys, KEYS, D, WIDTH)
        if TANGENTS and not KNOWN:
            ddot_v_head = at_head(ddot_v_ptr, batch, kv_head, stride_dv_b, stride_dv_h)
            store_rows(ddot_v_head, ddot_v, start, stride_dv_t, num_keys, KEYS, D, WIDTH)
