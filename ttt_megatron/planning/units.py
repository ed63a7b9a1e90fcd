"""FLOPs, bytes, and the sizes of a model's layers that they are counted from."""

from dataclasses import dataclass
from functools import lru_cache

from ttt_megatron.config.schema import ModelConfig, RunConfig

_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}


def in_float8(config: RunConfig) -> bool:
    """Whether static linear maps multiply in float8."""
    return config.training.precision == "fp8"


def compute_precision(config: RunConfig) -> str:
    """The precision of activations and of products that are not in float8."""
    return config.fp8.compute if in_float8(config) else config.training.precision


def element_bytes(config: RunConfig) -> int:
    """Bytes of an element in the compute dtype."""
    return _BYTES[compute_precision(config)]


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, FLOPs of attention, bytes moved by everything else.

    `float8` are the FLOPs of products in float8, which `matmul` does not hold.
    """

    matmul: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    float8: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.float8 + other.float8,
        )

    def __mul__(self, factor: float) -> "Work":
        return Work(
            self.matmul * factor,
            self.attention * factor,
            self.traffic * factor,
            self.float8 * factor,
        )

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.matmul + self.attention + self.float8


@lru_cache(maxsize=256)
def mean_keys(length: int, window: int | None, tile: int = 1) -> float:
    """Keys a query visits, averaged over a sequence read in tiles of `tile` queries.

    A tile visits every key that any of its queries sees; tile 1 counts visible keys alone.
    """
    reach = window or length
    visited = 0
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        visited += (stop - start) * (stop - max(0, start - reach + 1))
    return visited / length


@dataclass(frozen=True)
class Sizes:
    """Elements a token multiplies with, in each kind of layer of a model."""

    attention: int
    mlp: int
    prime: int
    head: int
    width: int
    saved: int
    saved_prime: int
    fast: int
    gains: int


def sizes(model: ModelConfig) -> Sizes:
    """Matrix elements by kind of layer; `saved` are elements a block's products leave a token.

    `gains` are those of one block's norms, the prime MLP's apart.
    """
    width, ffn = model.hidden_size, model.ffn_hidden_size
    prime_ffn = model.prime_ffn_hidden_size or ffn
    kv_width = (model.num_kv_heads or model.num_heads) * (width // model.num_heads)
    prime = 3 * width * prime_ffn
    post, heads = 2 * model.post_norm, 2 * model.qk_norm
    return Sizes(
        attention=2 * width * width + 2 * width * kv_width,
        mlp=3 * width * ffn,
        prime=prime,
        head=(model.vocab_size or 0) * width,
        width=width,
        saved=(8 + post + heads) * width + 3 * ffn,
        saved_prime=4 * width + 3 * prime_ffn,
        fast=prime * model.num_suffix_layers,
        gains=(2 + post) * width + heads * (width // model.num_heads),
    )
