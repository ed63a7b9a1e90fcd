"""What `tools/compile_kernels.py` compiles of float8 linear maps: rounding of bfloat16."""

from dataclasses import replace

import torch

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.fp8_linear import triton_round as kernels
from ttt_kernels.fp8_linear.float8 import E4M3, E5M2

_SCALES = ("amax_ptr", "turned_amax_ptr", "pending_ptr", "inverse_ptr", "turned_inverse_ptr")
_OTHERS = {
    **dict.fromkeys(_SCALES, "*fp32"),
    "power_ptr": "*i32",
    "out_ptr": "*u8",
    "turned_ptr": "*u8",
}


def compile_cases() -> list[CompileCase]:
    """Both formats, with one scale and by rows, straight alone and both ways."""
    return [
        _case(f"{name}/{how}/{sides}", dtype, how, sides == "both")
        for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2))
        for how in ("tensor", "row", "delayed")
        for sides in ("straight", "both")
    ]


def _case(name: str, dtype: torch.dtype, how: str, turned: bool) -> CompileCase:
    tile = dict(kernels.TILE)
    num_warps = tile.pop("num_warps")
    constants = {
        "BY_ROW": how == "row",
        "GIVEN": how == "delayed",
        "STRAIGHT": True,
        "TURNED": turned,
        **kernels.FORMATS[dtype],
        **tile,
    }
    case = describe(
        f"round/{name}",
        kernels.round_kernel,
        constants,
        element="bf16",
        num_warps=num_warps,
        num_stages=3,
        others=_OTHERS,
        tensor_cores=False,
    )
    # A role's power and largest value are one entry of several.
    return replace(case, divisible=case.divisible - {"power_ptr", "pending_ptr"})
