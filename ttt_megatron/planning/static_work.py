"""Products with static weights, in float8 where a run has them so: FLOPs, and bytes of rounding."""

from dataclasses import dataclass

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.units import Sizes, Work, element_bytes, in_float8, sizes

WEIGHT_BYTES = 10
"""Read and written a step for each static weight to have it in float8: float32 twice, for the
largest value and to round it, and the result for the output and for the input's gradient.
"""


@dataclass(frozen=True)
class StaticMaps:
    """Some static linear maps: matrix elements, and the elements a token has before and behind."""

    matrices: float
    inputs: float
    outputs: float

    def __add__(self, other: "StaticMaps") -> "StaticMaps":
        return StaticMaps(
            self.matrices + other.matrices,
            self.inputs + other.inputs,
            self.outputs + other.outputs,
        )

    def __mul__(self, factor: float) -> "StaticMaps":
        return StaticMaps(self.matrices * factor, self.inputs * factor, self.outputs * factor)

    def products(self, config: RunConfig, tokens: float, count: float) -> Work:
        """`count` products of `tokens` rows with every matrix."""
        flops = 2.0 * self.matrices * tokens * count
        return Work(float8=flops) if in_float8(config) else Work(matmul=flops)

    def rounded(
        self,
        config: RunConfig,
        tokens: float,
        *,
        inputs: float = 0,
        outputs: float = 0,
        for_weights: bool = True,
    ) -> Work:
        """What rounding inputs and cotangents of outputs so many times moves.

        Each is read for its largest value, read to be rounded, and written; `for_weights` once
        more, transposed, and with scales by row read once more for the columns' largest values.
        """
        if not in_float8(config):
            return Work()
        element = element_bytes(config)
        moved = 2 * element + 1
        if for_weights:
            moved += 1 + (element if config.fp8.scaling == "row" else 0)
        return Work(traffic=(self.inputs * inputs + self.outputs * outputs) * tokens * moved)


def attention_maps(config: RunConfig) -> StaticMaps:
    """qkv and proj of one block."""
    s = sizes(config.model)
    # Of in·out elements each, in is the width: qkv's outputs are the elements less proj's over it.
    outputs = (s.attention - s.width**2) / s.width
    return StaticMaps(s.attention, 2 * s.width, outputs + s.width)


def mlp_maps(config: RunConfig) -> StaticMaps:
    """fc1 and fc2 of one block."""
    s, ffn = sizes(config.model), config.model.ffn_hidden_size
    return StaticMaps(s.mlp, s.width + ffn, 2 * ffn + s.width)


def block_maps(config: RunConfig) -> StaticMaps:
    """All four of one block."""
    return attention_maps(config) + mlp_maps(config)


def sweep_maps(config: RunConfig) -> StaticMaps:
    """Those of a suffix with inner steps: its first attention belongs to the prefix."""
    layers = config.model.num_suffix_layers
    return attention_maps(config) * (layers - 1) + mlp_maps(config) * layers


def matrices_in_compute(config: RunConfig, s: Sizes) -> float:
    """Matrix elements of a suffix's static weights that are cast to the compute dtype."""
    static = 0.0 if in_float8(config) else sweep_maps(config).matrices
    return static + s.head
