"""Which dtypes a precision stands for."""

import torch

from ttt_megatron.config.schema import Precision


def parameter_dtype_of(precision: Precision) -> torch.dtype:
    """Dtype of parameters, fast weights, gradients and moments."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute_dtype(precision: Precision) -> torch.dtype:
    """Dtype of activations and matrix products."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]
