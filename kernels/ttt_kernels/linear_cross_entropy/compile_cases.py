"""What `tools/compile_kernels.py` compiles of the output head: the row kernels, in bfloat16."""

from dataclasses import replace
from typing import Any

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.linear_cross_entropy import triton_rows as kernels

_ROWS = dict.fromkeys(("state_ptr", "lse_ptr", "mean_ptr", "a_ptr", "b_ptr"), "*fp32")


def compile_cases() -> list[CompileCase]:
    """First order and pair."""
    read = {"COLUMNS": kernels.READ_COLUMNS}
    gradient = {"COLUMNS": kernels.GRADIENT_COLUMNS}
    return [
        _case("read", kernels.read_kernel, {**read, "TANGENT": False, "POWERS": False}, 8),
        _case("read/powers", kernels.read_kernel, {**read, "TANGENT": False, "POWERS": True}, 8),
        _case("pair_read", kernels.read_kernel, {**read, "TANGENT": True, "POWERS": False}, 8),
        _case("gradient", kernels.gradient_kernel, {**gradient, "TANGENT": False}, 4),
        _case("pair_gradient", kernels.gradient_kernel, {**gradient, "TANGENT": True}, 4),
    ]


def _case(name: str, kernel: Any, constants: dict[str, Any], num_warps: int) -> CompileCase:
    case = describe(
        name,
        kernel,
        constants,
        element="bf16",
        num_warps=num_warps,
        num_stages=3,
        others={"target_ptr": "*i64", **_ROWS},
        tensor_cores=False,
    )
    return replace(case, divisible=case.divisible | {"columns"})
