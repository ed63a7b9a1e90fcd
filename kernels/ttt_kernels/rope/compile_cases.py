"""What `tools/compile_kernels.py` compiles of RoPE."""

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.rope import triton_rope as kernels


def compile_cases() -> list[CompileCase]:
    """Both directions at heads of 64 and 128, in bfloat16."""
    return [_case(width, back) for width in (64, 128) for back in (False, True)]


def _case(width: int, back: bool) -> CompileCase:
    constants = kernels.tile(width)
    num_warps = constants.pop("num_warps")
    return describe(
        f"{'back' if back else 'forward'}/{width}",
        kernels.rotate_kernel,
        {**constants, "BACK": back},
        element="bf16",
        num_warps=num_warps,
        num_stages=3,
        others={"table_ptr": "*fp32"},
        tensor_cores=False,
    )
