"""How parameters that only these mixers have are drawn; linear maps are drawn as everywhere.

The ranges are those of state-spaces/mamba and of megatron-core's mixers.
"""

import math

import torch
from torch import Tensor

_DECAY_RATES = (1.0, 16.0)
_TIME_STEPS = (1e-3, 1e-1)


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """The initial value, float32, of a whole parameter of this name; None if others draw it.

    It depends on the end of the name, the shape and the generator's state alone.
    """
    if name.endswith(".A_log"):
        return _uniform(shape, *_DECAY_RATES, generator).log()
    if name.endswith(".dt_bias"):
        low, high = (math.log(step) for step in _TIME_STEPS)
        step = _uniform(shape, low, high, generator).exp()
        # softplus of it is the time step.
        return step + torch.log(-torch.expm1(-step))
    if name.endswith(".D"):
        return torch.ones(shape)
    if name.endswith(".convolution.weight"):
        bound = shape[1] ** -0.5
        return _uniform(shape, -bound, bound, generator)
    if name.endswith(".convolution.bias"):
        return torch.zeros(shape)
    return None


def _uniform(shape: torch.Size, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float32)
