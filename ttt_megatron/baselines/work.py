"""Parameters and FLOPs of the mixers, from the shapes alone."""

from dataclasses import dataclass

from ttt_megatron.baselines.chunks import CHUNK_SIZE
from ttt_megatron.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class MixerFlops:
    """FLOPs a token of a forward pass that reads whole chunks, two a multiplication.

    `linear` are the linear maps, `recurrence` the matrix products of the chunked form, `solve` the
    triangular systems of Gated DeltaNet. What works element by element is left out.
    """

    linear: int
    convolution: int
    recurrence: int
    solve: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.convolution + self.recurrence + self.solve


def mamba2_parameters(config: ModelConfig) -> int:
    """Parameters of a Mamba 2 mixer."""
    inner, convolved, heads = _mamba2_sizes(config)
    linear = config.hidden_size * (2 * inner + convolved + heads)
    return linear + convolved * (config.mamba2.conv_kernel + 1) + 3 * heads + inner


def mamba2_flops(config: ModelConfig) -> MixerFlops:
    """FLOPs a token of a Mamba 2 mixer's forward pass."""
    inner, convolved, heads = _mamba2_sizes(config)
    n = config.mamba2.state_size
    within = CHUNK_SIZE * (n + inner)
    return MixerFlops(
        linear=2 * config.hidden_size * (2 * inner + convolved + heads),
        convolution=2 * config.mamba2.conv_kernel * convolved,
        recurrence=2 * (within + 2 * n * inner),
    )


def gated_delta_parameters(config: ModelConfig) -> int:
    """Parameters of a Gated DeltaNet mixer."""
    keys, values = _gated_delta_sizes(config)
    heads = config.num_heads
    linear = config.hidden_size * (2 * keys + 3 * values + 2 * heads)
    convolution = (2 * keys + values) * config.gated_delta.conv_kernel
    return linear + convolution + 2 * heads + values // heads


def gated_delta_flops(config: ModelConfig) -> MixerFlops:
    """FLOPs a token of a Gated DeltaNet mixer's forward pass."""
    keys, values = _gated_delta_sizes(config)
    within = CHUNK_SIZE * (2 * keys + values)
    return MixerFlops(
        linear=2 * config.hidden_size * (2 * keys + 3 * values + 2 * config.num_heads),
        convolution=2 * config.gated_delta.conv_kernel * (2 * keys + values),
        recurrence=2 * (within + 3 * keys * values // config.num_heads),
        solve=CHUNK_SIZE * (keys + values),
    )


def _mamba2_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Channels of all heads, those of the convolution, heads."""
    settings = config.mamba2
    inner = settings.inner_size(config)
    return inner, inner + 2 * settings.state_size, inner // settings.head_dim


def _gated_delta_sizes(config: ModelConfig) -> tuple[int, int]:
    """Channels of all keys, and of all values."""
    keys = config.num_heads * (config.hidden_size // config.num_heads)
    return keys, config.gated_delta.expand_v * keys
