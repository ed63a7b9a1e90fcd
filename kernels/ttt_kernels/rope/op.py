"""Rotary position embedding: linear in x, so a pair is rotated like any other batch.

Below as plain PyTorch; on CUDA, but in float64, `triton_rope` does the same in one kernel.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels.arguments import check_axes, check_device, check_floats
from ttt_kernels.dtypes import accumulation_dtype
from ttt_kernels.mode import uses_plain_definitions
from ttt_kernels.rope.reference import rope_reference
from ttt_kernels.triton_launch import suits_triton


def rotations(start: int, length: int, head_dim: int, theta: float, like: Tensor) -> Tensor:
    """exp(i·p·θ^(−2m/d)) for positions p = start … start+length−1.

    Angles are formed in float64, so that they are exact at any position.
    Result: [length, head_dim/2], complex128 where `like` is float64, else complex64.
    Raises ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even to be rotated in pairs, and is {head_dim}.")
    device = like.device
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angle = torch.outer(positions, theta**-exponent)
    table = torch.polar(torch.ones_like(angle), angle)
    return table if like.dtype == torch.float64 else table.to(torch.complex64)


def _check(x: Tensor, rotation: Tensor) -> None:
    check_floats(x=x)
    check_axes("x", x, "[..., T, n, d]", 3)
    if not rotation.is_complex():
        raise TypeError(f"rotation must be complex, and is {rotation.dtype}.")
    check_device("x", x, "rotation", rotation)
    tokens, width = x.shape[-3], x.shape[-1]
    if width % 2 or tuple(rotation.shape) != (tokens, width // 2):
        raise ValueError(
            f"x {list(x.shape)} needs an even head dim and a rotation [{tokens}, {width // 2}], and"
            f" rotation's shape is {list(rotation.shape)}."
        )


def _rotate(x: Tensor, rotation: Tensor, back: bool = False) -> Tensor:
    if suits_triton(x):
        from ttt_kernels.rope import triton_rope

        return triton_rope.rotate(x, rotation, back)
    rotation = rotation.conj() if back else rotation
    wide = x.to(accumulation_dtype(x.dtype)).contiguous()
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * rotation.unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _rotate(x, rotation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _rotate(dy, rotation, back=True), None


def rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate interleaved pairs of components of every head by the token's angles.

    Shapes: x [..., T, n, d], rotation [T, d/2] complex (see `rotations`); result as x.
    Raises ValueError or TypeError if the arguments do not fit together.
    """
    _check(x, rotation)
    if uses_plain_definitions():
        return rope_reference(x, rotation)
    result: Tensor = _Rope.apply(x, rotation)
    return result
