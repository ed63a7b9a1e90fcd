"""The attention kernels at the tiles they ship with, for head dims 64 and 128, and some others."""

from typing import Any

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.swa_attention import triton_tiles as tiles
from ttt_kernels.swa_attention.triton_backward import dkv_kernel, dq_kernel
from ttt_kernels.swa_attention.triton_forward import forward_kernel
from ttt_kernels.swa_attention.triton_pair_dkv import pair_dkv_kernel
from ttt_kernels.swa_attention.triton_pair_dq import pair_dq_kernel
from ttt_kernels.swa_attention.triton_pair_forward import pair_forward_kernel

_STATISTICS = {f"{name}_ptr": "*fp32" for name in ("lse", "mu", "gamma", "delta")}
_BLOCK = "_block"
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_CHUNK = {"HAS_PAST": True}
_SEQUENCE = {"HAS_PAST": False}
_PARTS = (
    ("", {"WANT_K": True, "WANT_V": True}),
    ("/keys", {"WANT_K": True, "WANT_V": False}),
    ("/values", {"WANT_K": False, "WANT_V": True}),
)
# Kernels that walk over queries read those by descriptors, the others keys.
_OVER_QUERIES = (tiles.DKV, tiles.PAIR_DKV_OWN, tiles.PAIR_DKV_KNOWN, tiles.PAIR_DKV_PAST)
OUTSIDE_LOOPS = "once a program or a head: none in the loops over tiles"
_FULL_DQ = (
    "43 reloads to 180 wgmma in its four loops over tiles, no store; tiles of 128x16 or one stage"
    " have fewer, at half the keys a wgmma or with no load ahead, those of 64x32 and 64x64 do not"
)
SPILLS = {
    "dkv/d64": OUTSIDE_LOOPS,  # Triton 3.6 alone
    "pair_dkv_own/full/d64": OUTSIDE_LOOPS,
    "pair_dkv_own/known/keys/d128": OUTSIDE_LOOPS,
    "pair_dkv_own/full/values/d128": OUTSIDE_LOOPS,
    "pair_dkv_own/full/keys/d128": (
        "41 reloads to 108 wgmma in its two loops over tiles, no store; only own keys come here"
    ),
    "pair_dkv_past/d128": (
        "9 reloads to 80 wgmma in its two loops over tiles, no store; 32x64 reads the queries twice"
    ),
    "pair_dq/full/d128": _FULL_DQ,
    "pair_dq/full/d80": _FULL_DQ,
    "pair_dkv_own/full/keys/fp32/d64": (
        "2353 in its loops over tiles, where 4 warps have 4891: float32 is for exactness, not speed"
    ),
    "pair_dq/full/fp32/d64": "5 in its loops over tiles, whose products miss the tensor cores",
}
"""Why a case may spill registers, by its name. Counts are of Triton 3.9."""


def _case(
    name: str,
    kernel: Any,
    tile_name: str,
    head_dim: int,
    settings: dict[str, bool],
    element: str = "bf16",
) -> CompileCase:
    width = tiles.padded_width(head_dim)
    tile = tiles.tile_of(tile_name, width, _BYTES[element])
    constants = {"ROWS": tile.rows, "KEYS": tile.keys, "D": head_dim, "WIDTH": width}
    rows = tile.rows if tile_name in _OVER_QUERIES else tile.keys
    block = f"tensordesc<{element}[1,1,1,{rows},{width}]>"
    blocks = {a: block for a in kernel.arg_names if a.endswith(_BLOCK)}
    whole_name = f"{name}/{'' if element == 'bf16' else element + '/'}d{head_dim}"
    return describe(
        whole_name,
        kernel,
        {**constants, **settings},
        element=element,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        others={**_STATISTICS, **blocks, "scale": "fp32"},
        tensor_cores=element != "fp32",
        spills_because=SPILLS.get(whole_name, ""),
    )


def _pair_dkv(
    name: str, tile_name: str, head_dim: int, settings: dict[str, bool], element: str = "bf16"
) -> list[CompileCase]:
    tile = tiles.tile_of(tile_name, tiles.padded_width(head_dim), _BYTES[element])
    kernel = pair_dkv_kernel
    return [
        _case(f"{name}{part}", kernel, tile_name, head_dim, {**settings, **wanted}, element)
        for part, wanted in (_PARTS[:1] if tile.parts == 1 else _PARTS[1:])
    ]


def _of_head_dim(d: int) -> list[CompileCase]:
    known, full = {"KNOWN": True}, {"KNOWN": False}
    saved, alone = {"SAVED": True, **_CHUNK}, {"SAVED": False, **_CHUNK}
    return [
        _case("forward/chunk", forward_kernel, tiles.FORWARD, d, _CHUNK),
        _case("forward/sequence", forward_kernel, tiles.FORWARD, d, _SEQUENCE),
        _case("dq/chunk", dq_kernel, tiles.DQ, d, _CHUNK),
        _case("dq/sequence", dq_kernel, tiles.DQ, d, _SEQUENCE),
        _case("dkv", dkv_kernel, tiles.DKV, d, {}),
        _case("pair_forward/saved", pair_forward_kernel, tiles.PAIR_FORWARD, d, saved),
        _case("pair_forward/full", pair_forward_kernel, tiles.PAIR_FORWARD, d, alone),
        _case("pair_dq/known", pair_dq_kernel, tiles.PAIR_DQ, d, {**known, **_CHUNK}),
        _case("pair_dq/full", pair_dq_kernel, tiles.PAIR_DQ, d, {**full, **_CHUNK}),
        *_pair_dkv("pair_dkv_own/known", tiles.PAIR_DKV_KNOWN, d, {"TANGENTS": True, **known}),
        *_pair_dkv("pair_dkv_own/full", tiles.PAIR_DKV_OWN, d, {"TANGENTS": True, **full}),
        *_pair_dkv("pair_dkv_past", tiles.PAIR_DKV_PAST, d, {"TANGENTS": False, **known}),
    ]


def compile_cases() -> list[CompileCase]:
    """Forward and backward of values and of pairs, over a cache and over a whole sequence."""
    pair_dq = {"KNOWN": False, **_CHUNK}
    pair_dkv = {"KNOWN": False, "TANGENTS": True}
    others = [
        _case("forward/chunk", forward_kernel, tiles.FORWARD, 80, _CHUNK),
        _case("pair_dq/full", pair_dq_kernel, tiles.PAIR_DQ, 80, pair_dq),
        _case("forward/chunk", forward_kernel, tiles.FORWARD, 64, _CHUNK, "fp16"),
        _case("forward/chunk", forward_kernel, tiles.FORWARD, 64, _CHUNK, "fp32"),
        _case("dkv", dkv_kernel, tiles.DKV, 64, {}, "fp32"),
        _case("pair_dq/full", pair_dq_kernel, tiles.PAIR_DQ, 64, pair_dq, "fp32"),
        *_pair_dkv("pair_dkv_own/full", tiles.PAIR_DKV_OWN, 64, pair_dkv, "fp32"),
    ]
    return [*_of_head_dim(64), *_of_head_dim(128), *others]
