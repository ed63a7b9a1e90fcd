"""Checks that the operations share: one sentence that names what does not fit."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floats(**tensors: Tensor | None) -> None:
    """Raise TypeError unless all are tensors of a floating dtype, ValueError unless on one device.

    None is left out.
    """
    first: tuple[str, Tensor] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, and is a {type(x).__name__}.")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, and is {x.dtype}."
            )
        first = first or (name, x)
        check_device(*first, name, x)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if x.device != other.device:
        raise ValueError(
            f"All must be on one device: {name} is on {x.device}, {other_name} on {other.device}."
        )


def check_shape(name: str, x: Tensor | None, expected: Sequence[int]) -> None:
    """Raise ValueError unless x, if there is one, has this shape."""
    if x is not None and tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must be {list(expected)}, and its shape is {list(x.shape)}.")


def check_axes(name: str, x: Tensor, layout: str, least: int) -> None:
    """Raise ValueError unless x has at least this many axes; `layout` shows them."""
    if x.dim() < least:
        raise ValueError(f"{name} must be {layout}, and its shape is {list(x.shape)}.")


def check_pair(name: str, pair: Tensor, layout: str, least: int) -> None:
    """As `check_axes`, and the first axis must have length 2: the value, then its tangent."""
    check_axes(name, pair, layout, least)
    if pair.shape[0] != 2:
        raise ValueError(
            f"{name}'s first axis holds the value and the tangent: its length is 2, not"
            f" {pair.shape[0]}."
        )
