"""RMSNorm: the definition."""

from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean(x²) + eps) · gain over the last axis, formed in float32 (float64 stays).

    Shapes: x [..., H], gain [H]; result as x.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * gain.to(wide.dtype)).to(x.dtype)
