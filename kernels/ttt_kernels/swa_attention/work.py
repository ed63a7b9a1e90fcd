"""What attention costs: query-key pairs, tiles visited and FLOPs, counted rather than measured.

A GEMM multiplies every query with every key it sees over the head dim, 2·d FLOPs a pair. Own keys
are the queries' chunk or sequence, cached keys lie before it and have no tangent.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ttt_kernels.swa_attention import triton_tiles
from ttt_kernels.swa_attention.triton_tiles import Tile


class Gemms(NamedTuple):
    """Products a pair of query and key, by where the key lies."""

    own: int
    past: int


GEMMS = {
    # What the pass takes if scores are formed once: the floor a measured time is held against.
    "forward": Gemms(2, 2),
    "backward": Gemms(5, 5),
    "inner_backward": Gemms(5, 3),
    "pair_forward": Gemms(6, 4),
    "pair_forward_saved": Gemms(5, 3),
    "pair_backward": Gemms(15, 10),
    "pair_backward_known": Gemms(12, 9),
    # What the kernels take: scores are formed again for the keys' gradients.
    "dq": Gemms(3, 3),
    "dkv": Gemms(4, 4),
    "pair_dq": Gemms(9, 6),
    "pair_dq_known": Gemms(8, 5),
    "pair_dkv": Gemms(12, 8),
    "pair_dkv_known": Gemms(10, 8),
}
"""Products a pass or a kernel forms.

`inner_backward` forms no gradients of cached keys; `saved` reuses the forward pass's output,
`known` the cotangents of the tangents.
"""


class Pairs(NamedTuple):
    """Query-key pairs of one head of one sequence, by where the key lies."""

    own: int
    past: int


class Work(NamedTuple):
    """Pairs a query sees, pairs in the tiles visited, and the FLOPs of either, over all heads."""

    pairs: Pairs
    tile_pairs: Pairs
    flops: int
    tile_flops: int


def visible_pairs(length: int, window: int | None, past: int = 0) -> Pairs:
    """Pairs inside the window: query i sees own keys i, i − 1, … and then cached ones."""
    reach = length + past if window is None else window
    full = max(0, length - reach)
    short = length - full
    own = full * reach + short * (short + 1) // 2
    # Query i sees min(past, reach − 1 − i) cached keys: all of them up to `whole`, then one less
    # a query.
    whole = min(length, max(0, reach - past))
    rest = min(length, reach) - whole
    most = reach - 1 - whole
    cached = whole * past + rest * (2 * most - rest + 1) // 2
    return Pairs(own, cached)


def _query_tiles(length: int, window: int, past: int, tile: Tile) -> Iterator[Pairs]:
    """Tiles of keys that each tile of queries visits."""
    for row in range(0, length, tile.rows):
        stop = -(-min(row + tile.rows, length) // tile.keys)
        cached = -(-max(0, min(past, window - 1 - row)) // tile.keys)
        yield Pairs(stop - max(0, row - window + 1) // tile.keys, cached)


def _key_tiles(length: int, window: int, num_keys: int, offset: int, tile: Tile) -> Iterator[int]:
    """Tiles of queries that each tile of keys visits; key j sits at j + offset."""
    for start in range(0, num_keys, tile.keys):
        end = min(start + tile.keys, num_keys) + offset
        first = max(0, start + offset) // tile.rows
        yield max(0, -(-min(length, end - 1 + window) // tile.rows) - first)


def tiles_by_queries(length: int, window: int | None, past: int, tile: Tile) -> Pairs:
    """Tiles that a kernel with one program a tile of queries visits, a head of a sequence."""
    reach = length + past if window is None else window
    tiles = list(_query_tiles(length, reach, past, tile))
    return Pairs(sum(t.own for t in tiles), sum(t.past for t in tiles))


def tiles_by_keys(
    length: int, window: int | None, past: int, own_tile: Tile, past_tile: Tile
) -> Pairs:
    """Tiles that a kernel with one program a tile of keys visits, a query head of a sequence."""
    reach = length + past if window is None else window
    return Pairs(
        sum(_key_tiles(length, reach, length, 0, own_tile)),
        sum(_key_tiles(length, reach, past, -past, past_tile)),
    )


_KEY_TILES = {
    "dkv": (triton_tiles.DKV, triton_tiles.DKV),
    "pair_dkv": (triton_tiles.PAIR_DKV_OWN, triton_tiles.PAIR_DKV_PAST),
}
_QUERY_TILES = {
    "forward": triton_tiles.FORWARD,
    "dq": triton_tiles.DQ,
    "backward": triton_tiles.DQ,
    "inner_backward": triton_tiles.DQ,
    "pair_forward": triton_tiles.PAIR_FORWARD,
    "pair_dq": triton_tiles.PAIR_DQ,
    "pair_backward": triton_tiles.PAIR_DQ,
}


def _tile_pairs(
    kernel: str, length: int, head_dim: int, window: int | None, past: int, element_size: int
) -> Pairs:
    name = kernel.removesuffix("_known").removesuffix("_saved")
    width = triton_tiles.padded_width(head_dim)
    if name in _KEY_TILES:
        by_keys = [triton_tiles.tile_of(t, width, element_size) for t in _KEY_TILES[name]]
        counts = tiles_by_keys(length, window, past, *by_keys)
    else:
        tile = triton_tiles.tile_of(_QUERY_TILES[name], width, element_size)
        by_keys = [tile, tile]
        counts = tiles_by_queries(length, window, past, tile)
    return Pairs(*(n * t.rows * t.keys for n, t in zip(counts, by_keys, strict=True)))


def attention_work(
    kernel: str,
    *,
    batch: int,
    num_heads: int,
    length: int,
    head_dim: int,
    window: int | None,
    past: int = 0,
    element_size: int = 2,
) -> Work:
    """The work of one pass or kernel, a key of `GEMMS`.

    batch: sequences; num_heads: query heads; length: queries (a chunk or a sequence); past: cached
    keys; element_size: bytes of an element of q, which chooses the tile. `flops` counts pairs
    inside the window only and is what speeds are reported by; `tile_flops` counts whole tiles, at
    the padded head dim, as the hardware multiplies them (a backward pass's: at dq's tiles).
    Raises ValueError if `kernel` is none of them.
    """
    if kernel not in GEMMS:
        raise ValueError(f"kernel must be one of {', '.join(GEMMS)}, and is {kernel!r}.")
    gemms = GEMMS[kernel]
    pairs = visible_pairs(length, window, past)
    tile_pairs = _tile_pairs(kernel, length, head_dim, window, past, element_size)
    width = triton_tiles.padded_width(head_dim)
    per_head = [
        2 * d * sum(g * n for g, n in zip(gemms, count, strict=True))
        for d, count in ((head_dim, pairs), (width, tile_pairs))
    ]
    flops, tile_flops = (batch * num_heads * x for x in per_head)
    return Work(pairs, tile_pairs, flops, tile_flops)
