"""Initialisation: every matrix and the embedding ~ N(0, std²), every norm gain 1."""

import torch

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.transformer import LanguageModel


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
def initialize(model: LanguageModel, config: ModelConfig, seed: int) -> None:
    """Draw all parameters in place, on the CPU generator.

    The draw of a parameter depends on the seed, its own name and its whole shape alone, so that
    models that share a layer share its initial value, and parts are parts of the same whole.
    """
    for name, parameter in model.named_parameters():
        shape = model.slots.whole_shape(name, parameter.shape)
        own = model.slots.initial_value(name, shape, _generator(name, seed))
        whole = draw(name, shape, config, seed) if own is None else own
        parameter.copy_(model.slots.take_part(name, whole))


def draw(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """The initial value of a whole parameter of a `LanguageModel`, float32."""
    std = parameter_std(name, config)
    if std == 0.0:
        return torch.ones(shape)
    return torch.randn(shape, generator=_generator(name, seed), dtype=torch.float32) * std


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_stable_hash(f"{seed}/{name}"))


def _stable_hash(text: str) -> int:
    value = 1469598103934665603
    for byte in text.encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 63)
    return value
