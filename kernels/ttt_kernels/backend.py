"""Which implementation of the operations runs on a device, and why."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

from ttt_kernels.mode import uses_plain_definitions


class Backend(NamedTuple):
    """`name` is "triton", "torch" or "reference"; `reason` says why, in one clause."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def backend(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Backend:
    """The implementation that runs on tensors on `device` of a dtype.

    Without a device, on CUDA if there is any, else on CPU. All dtypes but float64 run alike.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if uses_plain_definitions():
        return Backend("reference", "within plain_definitions()")
    if dtype == torch.float64:
        return Backend("torch", "float64 has no Triton kernels")
    if find_spec("triton") is None:
        return Backend("torch", "Triton is not installed")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return Backend("triton", "TRITON_INTERPRET is set: kernels are interpreted, for tests")
    if kind == "cuda" and torch.cuda.is_available():
        return Backend("triton", "the tensors are on CUDA")
    if kind == "cuda":
        return Backend("torch", "CUDA is not available")
    return Backend("torch", f"Triton kernels run on CUDA, not on {kind}")
