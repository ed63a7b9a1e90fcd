"""What launching a kernel on any tensor takes: which tensors, unit strides, the tensor's device."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def suits_triton(*tensors: Tensor) -> bool:
    """Whether operations on these tensors run as Triton kernels.

    They do if all lie on a CUDA device (anywhere, where Triton interprets its kernels) and none is
    float64, which has its plain implementation on every device.
    """
    if not tensors or not _has_triton():
        return False
    return all(
        (x.is_cuda or _interprets()) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for x in tensors
    )


def as_rows(x: Tensor, keep: int = 0) -> Tensor:
    """x as [*its first `keep` axes, rows, width] with a unit stride along the width.

    A view wherever there is one, else a copy. Rows may be any distance apart.
    """
    rows = x.unsqueeze(keep) if x.dim() == keep + 1 else x.flatten(keep, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument, a tensor.

    An empty grid runs nothing.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
