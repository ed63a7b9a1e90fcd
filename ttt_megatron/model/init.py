"""Initialisation: every matrix and the embedding ~ N(0, std²), every norm gain 1."""

import torch
from torch import nn

from ttt_megatron.config.schema import ModelConfig


def parameter_std(name: str, config: ModelConfig) -> float:
    """Standard deviation a parameter is drawn with; 0 for norm gains, which start at 1."""
    if "norm" in name:
        return 0.0
    if name.startswith("embedding."):
        return config.init_std if config.embedding_init_std is None else config.embedding_init_std
    if ".prime_mlp." in name:
        return config.init_std if config.prime_init_std is None else config.prime_init_std
    return config.init_std


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw all parameters in place, on the CPU generator, in the order of their names.

    The draw of a parameter depends on the seed and its own name alone, so that models that
    share a layer share its initial value.
    """
    for name, parameter in model.named_parameters():
        std = parameter_std(name, config)
        if std == 0.0:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(_stable_hash(f"{seed}/{name}"))
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.copy_(drawn * std)


def _stable_hash(text: str) -> int:
    value = 1469598103934665603
    for byte in text.encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 63)
    return value
