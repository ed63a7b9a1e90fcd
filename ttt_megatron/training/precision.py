"""Which dtypes a precision stands for."""

import torch

from ttt_megatron.config.schema import Precision, RunConfig


def parameter_dtype_of(precision: Precision) -> torch.dtype:
    """Dtype of parameters, fast weights, gradients and moments."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of activations and matrix products; with fp8, of those that are not in float8."""
    precision = config.training.precision
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    return dtypes[config.fp8.compute if precision == "fp8" else precision]
