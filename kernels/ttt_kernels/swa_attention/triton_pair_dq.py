"""Backward pass of a pair, queries: cotangents of q and dot_q, and the row terms γ and δ.

With P the probabilities, Ṡ the scores' tangent, μ = rowsum(P∘Ṡ), G = E Vᵀ:

    γ = E·O,  δ = Ō·O + E·Ȯ                          (rows; no pass over the keys)
    dds = P∘(G − γ)                                  (cotangent of Ṡ)
    ds  = P∘(Ō Vᵀ + E V̇ᵀ + (G − γ)∘(Ṡ − μ) − δ)      (cotangent of S)
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
    dq, ddot_q, q, dot_q, d_out, e, lse2, mu, gamma, delta, k_block, v_block, batch, head, row,
    start, low, window, scale, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr, TANGENTS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    k = load_block(k_block, 0, batch, head, start - low, KEYS, WIDTH)
    v = load_block(v_block, 0, batch, head, start - low, KEYS, WIDTH)
    s = product(q, tl.trans(k))
    if PARTIAL:
        s = tl.where(visible(row, start, low, window, ROWS, KEYS), s, HIDDEN)
    p = tl.exp2(s * (scale * LOG2E) - lse2[:, None])
    dot_s = product(dot_q, tl.trans(k))
    if TANGENTS:
        dot_k = load_block(k_block, 1, batch, head, start - low, KEYS, WIDTH)
        dot_s = add_product(q, tl.trans(dot_k), dot_s)
    g = product(e, tl.trans(v)) - gamma[:, None]
    ds = product(d_out, tl.trans(v))
    if TANGENTS:
        dot_v = load_block(v_block, 1, batch, head, start - low, KEYS, WIDTH)
        ds = add_product(e, tl.trans(dot_v), ds)
    ds = p * (ds - delta[:, None] + g * (dot_s * scale - mu[:, None]))
    dq = add_product(narrow(ds, k.dtype), k, dq)
    if TANGENTS or not KNOWN:
        dds = narrow(p * g, k.dtype)
        if TANGENTS:
            dq = add_product(dds, dot_k, dq)
        if not KNOWN:
            ddot_q = add_product(dds, k, ddot_q)
    return dq, ddot_q


@triton.jit
def _keys(
    dq, ddot_q, q, dot_q, d_out, e, lse2, mu, gamma, delta, k_block, v_block, batch, head, row,
    origin, first, full, stop, last, low, window, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    TANGENTS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    for index in range(0, full - first + last - stop):
        start = origin + partial_tile(index, first, full, stop) * KEYS
        dq, ddot_q = _tile(
            dq, ddot_q, q, dot_q, d_out, e, lse2, mu, gamma, delta, k_block, v_block, batch, head,
            row, start, low, window, scale, ROWS, KEYS, WIDTH, True, TANGENTS, KNOWN,
        )  # fmt: skip
    for tile in range(full, stop):
        dq, ddot_q = _tile(
            dq, ddot_q, q, dot_q, d_out, e, lse2, mu, gamma, delta, k_block, v_block, batch, head,
            row, origin + tile * KEYS, low, window, scale, ROWS, KEYS, WIDTH, False, TANGENTS,
            KNOWN,
        )  # fmt: skip
    return dq, ddot_q


@triton.jit
def pair_dq_kernel(
    q_ptr, dot_q_ptr, k_block, v_block, past_k_block, past_v_block,
    out_ptr, dot_out_ptr, d_out_ptr, e_ptr, lse_ptr, mu_ptr, gamma_ptr, delta_ptr,
    dq_ptr, ddot_q_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_out_b, stride_out_t, stride_out_h,
    stride_d_out_b, stride_d_out_t, stride_d_out_h, stride_dq_b, stride_dq_t, stride_dq_h,
    length, past, window, scale, repeats,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    HAS_PAST: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ROWS queries, query heads, sequences).

    If KNOWN, the cotangent of dot_q is not formed.
    """
    row = tl.program_id(0) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // repeats
    out = load_rows(
        at_head(out_ptr, batch, head, stride_out_b, stride_out_h),
        row, stride_out_t, length, ROWS, D, WIDTH,
    ).to(tl.float32)  # fmt: skip
    dot_out = load_rows(
        at_head(dot_out_ptr, batch, head, stride_out_b, stride_out_h),
        row, stride_out_t, length, ROWS, D, WIDTH,
    ).to(tl.float32)  # fmt: skip
    d_out = load_rows(
        at_head(d_out_ptr, batch, head, stride_d_out_b, stride_d_out_h),
        row, stride_d_out_t, length, ROWS, D, WIDTH,
    )  # fmt: skip
    e = load_rows(
        at_head(e_ptr, batch, head, stride_d_out_b, stride_d_out_h),
        row, stride_d_out_t, length, ROWS, D, WIDTH,
    )  # fmt: skip
    statistics = batch * tl.num_programs(1) + head
    lse2 = load_row_values(at_head(lse_ptr, statistics, 0, length, 0), row, length, ROWS) * LOG2E
    mu = load_row_values(at_head(mu_ptr, statistics, 0, length, 0), row, length, ROWS)
    wide_e = e.to(tl.float32)
    gamma = tl.sum(wide_e * out, 1)
    delta = tl.sum(d_out.to(tl.float32) * out + wide_e * dot_out, 1)
    store_row_values(at_head(gamma_ptr, statistics, 0, length, 0), gamma, row, length, ROWS)
    store_row_values(at_head(delta_ptr, statistics, 0, length, 0), delta, row, length, ROWS)
    q_head = at_head(q_ptr, batch, head, stride_q_b, stride_q_h)
    dot_q_head = at_head(dot_q_ptr, batch, head, stride_q_b, stride_q_h)
    q = load_rows(q_head, row, stride_q_t, length, ROWS, D, WIDTH)
    dot_q = load_rows(dot_q_head, row, stride_q_t, length, ROWS, D, WIDTH)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    ddot_q = tl.zeros([ROWS, WIDTH], tl.float32)
    if HAS_PAST:
        origin, full, last = past_key_tiles(row, past, window, ROWS, KEYS)
        dq, ddot_q = _keys(
            dq, ddot_q, q, dot_q, d_out, e, lse2, mu, gamma, delta, past_k_block, past_v_block,
            batch, kv_head, row, origin, 0, full, last, last, -past, window, scale,
            ROWS, KEYS, WIDTH, False, KNOWN,
        )  # fmt: skip
    first, full, stop, last = own_key_tiles(row, length, window, ROWS, KEYS)
    dq, ddot_q = _keys(
        dq, ddot_q, q, dot_q, d_out, e, lse2, mu, gamma, delta, k_block, v_block, batch, kv_head,
        row, 0, first, full, stop, last, 0, window, scale, ROWS, KEYS, WIDTH, True, KNOWN,
    )  # fmt: skip
    dq_head = at_head(dq_ptr, batch, head, stride_dq_b, stride_dq_h)
    store_rows(dq_head, dq * scale, row, stride_dq_t, length, ROWS, D, WIDTH)
    if not KNOWN:
        ddot_q_head = at_head(ddot_q_ptr, batch, head, stride_dq_b, stride_dq_h)
        store_rows(ddot_q_head, ddot_q * scale, row, stride_dq_t, length, ROWS, D, WIDTH)
