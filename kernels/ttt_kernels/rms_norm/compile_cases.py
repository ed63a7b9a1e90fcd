"""What `tools/compile_kernels.py` compiles of RMSNorm: residual rows and heads."""

from ttt_kernels.compile_case import CompileCase, describe
from ttt_kernels.rms_norm import triton_rms_norm as kernels

_FLOAT32 = dict.fromkeys(("gain_ptr", "scale_ptr", "along_ptr", "partial_ptr"), "*fp32")


def compile_cases() -> list[CompileCase]:
    """Every pass at a head's width and at models' widths, in bfloat16."""
    return [
        _case(name, width) for width in (64, 128, 768, 2560) for name in ("forward", "backward")
    ] + [_case(name, width) for width in (64, 2560) for name in ("pair_forward", "pair_backward")]


def _case(name: str, width: int) -> CompileCase:
    constants = kernels.tile(width)
    num_warps = constants.pop("num_warps")
    if "backward" in name:
        constants["GAIN"] = True
    return describe(
        f"{name}/{width}",
        getattr(kernels, f"{name}_kernel"),
        constants,
        element="bf16",
        num_warps=num_warps,
        num_stages=3,
        others={**_FLOAT32, "eps": "fp32", "rows": "i32"},
        tensor_cores=False,
    )
