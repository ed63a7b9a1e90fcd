"""Where tests of Triton kernels run, and how exact results are."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

ON_CPU = pytest.param(
    "cpu",
    marks=[
        pytest.mark.interpreter,
        pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set"),
    ],
)
ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set"),
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ],
)
DEVICES = [ON_CPU, ON_CUDA]
DTYPES = [torch.float32, torch.bfloat16]


def share_of(dtype, device):
    """The error allowed of a result in this dtype, as a share of its size."""
    if dtype != torch.float32:
        return 1e-2
    # CUDA's exponentials and roots are a few units in the last place off.
    return 1e-6 if device.type == "cpu" else 4e-6


def assert_near(actual, expected, dtype):
    """Every tensor within the dtype's share of the largest entry of its float64 counterpart."""
    share = share_of(dtype, actual[0].device)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if not a.numel():
            continue
        error = (a.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)
        assert error <= share, float(error)


def wide(tensors):
    """Their float64 copies, as leaves."""
    return [x.detach().double().requires_grad_() for x in tensors]
