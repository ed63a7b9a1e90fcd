"""Mixers with drawn parameters on tiny shapes, and what compares tensors."""

import torch

from ttt_megatron.baselines.gated_delta import GatedDeltaNet
from ttt_megatron.baselines.initial_values import initial_value
from ttt_megatron.baselines.mamba2 import Mamba2
from ttt_megatron.config.mixers import GatedDeltaConfig, Mamba2Config
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.init import draw
from ttt_megatron.model.slots import Slots

KINDS = ["mamba2", "gated_delta"]
CONFIG = ModelConfig(
    hidden_size=12,
    num_heads=3,
    init_std=0.4,
    mamba2=Mamba2Config(head_dim=6, state_size=5, conv_kernel=4),
    gated_delta=GatedDeltaConfig(expand_v=2, conv_kernel=4),
)


def mixer_of(kind, config=CONFIG, dtype=torch.float64, seed=0):
    """A mixer as `kind` names it; its parameters are drawn as a model's are, norms around 1."""
    mixer = {"mamba2": Mamba2, "gated_delta": GatedDeltaNet}[kind](config, Slots())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            value = initial_value(f"mixer.{name}", parameter.shape, generator)
            if value is None:
                value = draw(f"layers.0.mixer.{name}", parameter.shape, config, seed)
            # Nothing that is 0 or 1 everywhere: a factor or a term left out would not show.
            if name.endswith((".bias", "norm.weight", "D")):
                value = value + 0.3 * torch.randn(value.shape, generator=generator)
            parameter.copy_(value)
    return mixer.to(dtype)


def draw_hidden(batch, length, width=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)


def read_in_pieces(mixer, x, sizes, past=None):
    """The outputs of pieces read one after the other, together, and the last state."""
    outs = []
    for piece in x.split(sizes, dim=1):
        out, past = mixer(piece, None, past)
        outs.append(out)
    return torch.cat(outs, dim=1), past


def worst(found, expected):
    """The largest difference over tensors, each relative to the largest entry expected."""
    pairs = [(a.detach(), e.detach()) for a, e in zip(found, expected, strict=True)]
    assert all(a.shape == e.shape for a, e in pairs)
    return max(float((a - e).abs().max() / e.abs().max().clamp_min(1e-3)) for a, e in pairs)
