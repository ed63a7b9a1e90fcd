"""Rotary position embedding on interleaved components: the definition."""

import torch
from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype


def rope_reference(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply components (2m, 2m+1), as a complex number, by rotation[t, m].

    Shapes: x [..., T, n, d], rotation [T, d/2] complex; result as x.
    """
    even, odd = x.to(accumulation_dtype(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.real.unsqueeze(-2), rotation.imag.unsqueeze(-2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
