"""TTT-KVB in numbers, from the shapes alone: parameters, state, FLOPs; and how it is drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_megatron.config.mixers import TTTKVBConfig
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.parameters import attention_parameters


@dataclass(frozen=True, kw_only=True)
class TTTKVBFlops:
    """FLOPs a token of a layer's forward pass over whole chunks, two a multiplication.

    `linear` are the static maps; `fast` products with fast matrices and their gradients; `within`
    those between a chunk's tokens, of which half are needed, as in causal attention. What works
    element by element is left out, inner steps too. A training step takes three times as many.
    """

    linear: int
    fast: int
    within: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.fast + self.within


def ttt_kvb_parameters(config: ModelConfig) -> int:
    """Parameters of a `TTTKVB` layer, its norms' gains included."""
    settings = config.ttt_kvb
    width, heads, head_dim = _sizes(config)
    linear = (4 if settings.has_queries else 3) * width * width
    normed = (2 if settings.has_queries else 1) * config.qk_norm + 1
    binding = 2 * width if settings.loss == "squared" else 0
    rate = 0 if settings.rate_form == "constant" else heads * (width + 1)
    return linear + normed * head_dim + binding + rate + fast_parameters(config)


def swa_ttt_kvb_parameters(config: ModelConfig) -> int:
    """Parameters of a `SWATTTKVB` mixer: attention, the norm between, the layer."""
    attention = sum(attention_parameters(config))
    return attention + config.hidden_size + ttt_kvb_parameters(config)


def fast_parameters(config: ModelConfig) -> int:
    """Fast weights of a layer: n · P, what its state holds of each kind for every sequence."""
    settings = config.ttt_kvb
    _, heads, head_dim = _sizes(config)
    hidden = settings.fast_width(config)
    biases = head_dim + settings.gates * hidden if settings.has_biases else 0
    return heads * ((settings.gates + 1) * hidden * head_dim + biases)


def ttt_kvb_flops(config: ModelConfig) -> TTTKVBFlops:
    """FLOPs a token of a `TTTKVB` layer's forward pass."""
    settings = config.ttt_kvb
    width, heads, head_dim = _sizes(config)
    hidden = settings.fast_width(config)
    rows = settings.gates * hidden
    matrices = heads * (rows + hidden) * head_dim
    back = heads * hidden * head_dim
    reads = matrices if settings.has_queries else 0
    linear = (4 if settings.has_queries else 3) * width * width
    linear += 0 if settings.rate_form == "constant" else width * heads
    within = 0
    if settings.output_rule == "updated":
        # Likeness of inputs, sum of adjoints, of both layers; with a clip as much again, for norms.
        a_pair = head_dim + rows + hidden + head_dim
        visible = (settings.chunk_size + 1) / 2
        within = round(heads * a_pair * visible * (2 if settings.clip else 1))
    return TTTKVBFlops(linear=2 * linear, fast=2 * (2 * matrices + back + reads), within=2 * within)


def initial_value(
    name: str,
    shape: torch.Size,
    generator: torch.Generator,
    settings: TTTKVBConfig,
) -> Tensor | None:
    """The initial value, float32, of a whole parameter of this name; None if others draw it.

    Biases are 0, so that a learned rate begins at about half of (sigmoid) or at (softplus) what is
    set; the binding's gain is 1. A SwiGLU's matrices are drawn with a deviation of in^−½ (LaCT),
    a GELU MLP's as every other matrix (TTT-MLP).
    """
    end = name.rsplit(".", 1)[-1]
    if end in ("fast_bias1", "fast_bias2", "binding_bias", "rate_bias"):
        return torch.zeros(shape)
    if end == "binding_gain":
        return torch.ones(shape)
    if end in ("fast_fc1", "fast_fc2") and settings.fast_mlp == "swiglu":
        return torch.randn(shape, generator=generator, dtype=torch.float32) * shape[-1] ** -0.5
    return None


def _sizes(config: ModelConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.ttt_kvb.heads(config), config.ttt_kvb.head_dim(config)
