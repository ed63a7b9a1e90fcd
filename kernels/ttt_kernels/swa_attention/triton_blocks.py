"""Tensors as attention's kernels take them: with a dense last axis, or by a tensor descriptor."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16
"""Bytes that a descriptor's first element and all its strides are multiples of."""


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it, with a last axis of stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy of it, which a descriptor can address."""
    unit = _ALIGNMENT // x.element_size()
    fits = (
        x.stride(-1) == 1
        and x.data_ptr() % _ALIGNMENT == 0
        and all(
            step > 0 and step % unit == 0
            for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
            if size > 1
        )
    )
    if fits:
        return x
    width = x.shape[-1]
    room = x.new_empty(*x.shape[:-1], -(-width // unit) * unit)
    return room[..., :width].copy_(x)


def block_of(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of x [b, T, n, d], or of a pair of them, read `rows` tokens of a head at a time.

    Kernels see [parts, b, n, T, d] and read blocks [1, 1, 1, rows, width]. An x that no descriptor
    can address, by its alignment or because an axis is repeated, is copied.
    """
    whole = _addressable(x if x.dim() == 5 else x.unsqueeze(0)).transpose(2, 3)
    # An axis of length 1 may have any stride in PyTorch; it is never stepped along.
    unit = _ALIGNMENT // x.element_size()
    strides = [
        step if size > 1 else unit for step, size in zip(whole.stride(), whole.shape, strict=True)
    ]
    strides[-1] = 1
    return TensorDescriptor(whole, list(whole.shape), strides, [1, 1, 1, rows, width])


def statistics_of(q: Tensor) -> Tensor:
    """Room for one float32 a query of q [b, T, n, d], as [b, n, T]."""
    b, t, n, _ = q.shape
    return torch.empty(b, n, t, dtype=torch.float32, device=q.device)


def strides_of(*tensors: Tensor) -> list[int]:
    """Strides of sequence, token and head, of every tensor [b, T, n, d] or pair of them."""
    return [stride for x in tensors for stride in x.stride()[-4:-1]]
