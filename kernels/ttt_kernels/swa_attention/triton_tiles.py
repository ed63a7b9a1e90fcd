"""The tiles each attention kernel runs at, by head dim and width of an element."""

from typing import NamedTuple

FORWARD = "forward"
DQ = "dq"
DKV = "dkv"
PAIR_FORWARD = "pair_forward"
PAIR_DQ = "pair_dq"
PAIR_DKV_OWN = "pair_dkv_own"
PAIR_DKV_KNOWN = "pair_dkv_known"
PAIR_DKV_PAST = "pair_dkv_past"


class Tile(NamedTuple):
    """Queries and keys a tile, and how a program is laid out.

    `parts` 2 forms the results for keys and those for values in two launches: their sums do not
    fit into the registers together.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    parts: int = 1


_HALF = {
    (FORWARD, 64): Tile(128, 128, 8, 3),
    (FORWARD, 128): Tile(128, 64, 8, 3),
    (DQ, 64): Tile(128, 64, 8, 3),
    (DQ, 128): Tile(128, 64, 8, 2),
    (DKV, 64): Tile(64, 128, 8, 3),
    (DKV, 128): Tile(32, 128, 8, 2),
    (PAIR_FORWARD, 64): Tile(128, 64, 8, 3),
    (PAIR_FORWARD, 128): Tile(128, 32, 8, 2),
    (PAIR_DQ, 64): Tile(128, 64, 8, 2),
    (PAIR_DQ, 128): Tile(128, 32, 8, 2),
    (PAIR_DKV_OWN, 64): Tile(32, 128, 8, 2),
    (PAIR_DKV_OWN, 128): Tile(32, 128, 8, 2, parts=2),
    (PAIR_DKV_KNOWN, 64): Tile(32, 128, 8, 2),
    (PAIR_DKV_KNOWN, 128): Tile(32, 128, 8, 2, parts=2),
    (PAIR_DKV_PAST, 64): Tile(32, 128, 8, 2),
    (PAIR_DKV_PAST, 128): Tile(32, 128, 8, 2),
}

# Products of float32 run outside the tensor cores, on operands held in registers: for exactness,
# not for speed. Beyond 64 the compiler takes minutes and spills by the thousand.
_SINGLE = Tile(16, 16, 4, 1)
_SINGLE_PAIR_KEYS = Tile(16, 16, 8, 1, parts=2)
_LARGE = Tile(16, 16, 4, 1, parts=2)
LARGEST_WIDTH = 256
LARGEST_SINGLE_WIDTH = 64
"""Of float32."""


def padded_width(head_dim: int) -> int:
    """The width a kernel computes at: a power of two, 16 or more."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_of(kernel: str, width: int, element_size: int) -> Tile:
    """The tile of a kernel at a padded head dim; `element_size` in bytes."""
    if element_size > 2:
        return _SINGLE_PAIR_KEYS if kernel.startswith("pair_dkv") else _SINGLE
    if width > 128:
        return _LARGE
    return _HALF[kernel, max(width, 64)]
