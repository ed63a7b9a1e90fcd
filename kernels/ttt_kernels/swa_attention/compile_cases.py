"""The attention kernels at the tiles they ship with, for bf16 and head dims 64 and 128."""

from typing import Any

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.swa_attention import triton_tiles
from ttt_kernels.swa_attention.triton_backward import dkv_kernel, dq_kernel
from ttt_kernels.swa_attention.triton_forward import forward_kernel
from ttt_kernels.swa_attention.triton_pair_dkv import pair_dkv_kernel
from ttt_kernels.swa_attention.triton_pair_dq import pair_dq_kernel
from ttt_kernels.swa_attention.triton_pair_forward import pair_forward_kernel

_STATISTICS = {f"{name}_ptr": "*fp32" for name in ("lse", "mu", "gamma", "delta")}
_CHUNK = {"HAS_PAST": True}
_SEQUENCE = {"HAS_PAST": False}
_PAST = {"TANGENTS": False, "KNOWN": True}
_BOTH = {"WANT_K": True, "WANT_V": True}
_PARTS = (
    ("", _BOTH),
    ("/keys", {"WANT_K": True, "WANT_V": False}),
    ("/values", {"WANT_K": False, "WANT_V": True}),
)


def _case(name: str, kernel: Any, tile_name: str, head_dim: int, **settings: bool) -> CompileCase:
    tile = triton_tiles.tile_of(tile_name, head_dim, 2)
    constants = {"ROWS": tile.rows, "KEYS": tile.keys, "D": head_dim, "WIDTH": head_dim}
    return describe(
        f"{name}/d{head_dim}",
        kernel,
        {**constants, **settings},
        element="bf16",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        others={**_STATISTICS, "scale": "fp32"},
    )


def _pair_dkv(head_dim: int) -> list[CompileCase]:
    tile = triton_tiles.tile_of(triton_tiles.PAIR_DKV_OWN, head_dim, 2)
    cases = []
    for part, wanted in _PARTS[:1] if tile.parts == 1 else _PARTS[1:]:
        for variant, known in (("known", True), ("full", False)):
            settings = {"TANGENTS": True, "KNOWN": known, **wanted}
            name = f"pair_dkv_own{part}/{variant}"
            kernel = pair_dkv_kernel
            cases.append(_case(name, kernel, triton_tiles.PAIR_DKV_OWN, head_dim, **settings))
    past = {**_PAST, **_BOTH}
    name = "pair_dkv_past"
    return [*cases, _case(name, pair_dkv_kernel, triton_tiles.PAIR_DKV_PAST, head_dim, **past)]


def compile_cases() -> list[CompileCase]:
    """Forward and backward of values and of pairs, over a cache and over a whole sequence."""
    tiles = triton_tiles
    cases = []
    for d in (64, 128):
        for mode, past in (("chunk", _CHUNK), ("sequence", _SEQUENCE)):
            cases += [
                _case(f"forward/{mode}", forward_kernel, tiles.FORWARD, d, **past),
                _case(f"dq/{mode}", dq_kernel, tiles.DQ, d, **past),
            ]
        cases.append(_case("dkv", dkv_kernel, tiles.DKV, d))
        for variant, known in (("known", True), ("full", False)):
            saved = {**_CHUNK, "SAVED": known}
            cases.append(
                _case(
                    f"pair_forward/{variant}", pair_forward_kernel, tiles.PAIR_FORWARD, d, **saved
                )
            )
            settings = {**_CHUNK, "KNOWN": known}
            cases.append(_case(f"pair_dq/{variant}", pair_dq_kernel, tiles.PAIR_DQ, d, **settings))
        cases += _pair_dkv(d)
    return cases
