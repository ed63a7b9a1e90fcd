"""What `tools/compile_kernels.py` compiles of SwiGLU."""

from dataclasses import replace

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.swiglu import triton_swiglu as kernels


def compile_cases() -> list[CompileCase]:
    """Every pass, in bfloat16."""
    return [_case(name) for name in ("forward", "backward", "pair_forward", "pair_backward")]


def _case(name: str) -> CompileCase:
    case = describe(
        name,
        getattr(kernels, f"{name}_kernel"),
        {"COLUMNS": kernels.COLUMNS},
        element="bf16",
        num_warps=4,
        num_stages=3,
        tensor_cores=False,
    )
    return replace(case, divisible=case.divisible | {"width"})
