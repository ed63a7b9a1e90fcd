"""Lengths, window and head counts of one call, as attention's kernels take them."""

from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ttt_kernels.swa_attention import triton_tiles
from ttt_kernels.swa_attention.triton_blocks import block_of
from ttt_kernels.swa_attention.triton_tiles import Tile


class Geometry(NamedTuple):
    """`width` is the padded head dim; `past` counts cached keys; the window is finite."""

    b: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    past: int
    window: int
    element_size: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def repeats(self) -> int:
        return self.heads // self.kv_heads

    def tile(self, kernel: str) -> Tile:
        return triton_tiles.tile_of(kernel, self.width, self.element_size)

    def settings(self, tile: Tile) -> dict[str, Any]:
        return {
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "D": self.head_dim,
            "WIDTH": self.width,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def query_grid(self, tile: Tile) -> tuple[int, int, int]:
        return -(-self.length // tile.rows), self.heads, self.b

    def key_grid(self, tile: Tile, num_keys: int) -> tuple[int, int, int]:
        return -(-num_keys // tile.keys), self.kv_heads, self.b

    def query_blocks(self, tile: Tile, q: Tensor, d_out: Tensor) -> list[TensorDescriptor]:
        """Descriptors of the queries and of their outputs' cotangents."""
        return [block_of(x, tile.rows, self.width) for x in (q, d_out)]

    def key_blocks(
        self, tile: Tile, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None
    ) -> list[TensorDescriptor]:
        """Descriptors of own and cached keys and values; own ones for a cache that is empty."""
        own = [block_of(x, tile.keys, self.width) for x in (k, v)]
        if past_k is None or past_v is None or not self.past:
            return own * 2
        return own + [block_of(x, tile.keys, self.width) for x in (past_k, past_v)]


def geometry_of(q: Tensor, k: Tensor, past_k: Tensor | None, window: int | None) -> Geometry:
    """The geometry of q [b, T, n, d] or a pair, k and cached keys; a window beyond them is cut."""
    b, length, heads, head_dim = q.shape[-4:]
    past = 0 if past_k is None else past_k.shape[1]
    return Geometry(
        b,
        length,
        heads,
        k.shape[-2],
        head_dim,
        triton_tiles.padded_width(head_dim),
        past,
        past + length if window is None else min(window, past + length),
        q.element_size(),
    )
