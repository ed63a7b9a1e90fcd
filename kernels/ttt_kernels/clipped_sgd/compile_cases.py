"""What `tools/compile_kernels.py` compiles of clipped gradient descent, in float32."""

from dataclasses import replace
from typing import Any

from ttt_kernels.clipped_sgd import triton_clipped_sgd as kernels
from ttt_kernels.compile_case import CompileCase, describe

_ALIKE = dict.fromkeys(("stride_a_column", "stride_b_column", "stride_out_column"), 1)
_TRANSPOSED = {"stride_a_column": 1, "stride_b_row": 1, "stride_out_column": 1}


def compile_cases() -> list[CompileCase]:
    """Sums and steps over tensors that lie alike and over transposed gradients."""
    cases = [_case("sums", kernels.sums_kernel, {"COLUMNS": 1024})]
    for how, tile, strides in (
        ("alike", kernels.IN_A_ROW, _ALIKE),
        ("transposed", kernels.IN_TILES, _TRANSPOSED),
    ):
        same = {**tile, "SAME": False, "STEPS": kernels.STEPS}
        cases.append(_case(f"products/{how}", kernels.products_kernel, {**same, **strides}))
        for scaled, name in ((False, "step"), (True, "difference")):
            combined = {**tile, "SCALED": scaled, "SIGN": -1, **strides}
            cases.append(_case(f"{name}/{how}", kernels.combine_kernel, combined))
    return cases


def _case(name: str, kernel: Any, constants: dict[str, Any]) -> CompileCase:
    constants = dict(constants)
    num_warps = constants.pop("num_warps", 4)
    known = set(kernel.arg_names)
    case = describe(
        name,
        kernel,
        {key: value for key, value in constants.items() if key in known},
        element="fp32",
        num_warps=num_warps,
        num_stages=3,
        tensor_cores=False,
    )
    return replace(case, divisible=case.divisible | ({"rows", "columns"} & known))
