"""Counts of pairs, tiles and FLOPs against brute force."""

import itertools

import pytest
import torch

from ttt_kernels.swa_attention.triton_tiles import Tile
from ttt_kernels.swa_attention.work import (
    GEMMS,
    attention_work,
    tiles_by_keys,
    tiles_by_queries,
    visible_pairs,
)

# length, window, past
SHAPES = [
    *itertools.product((1, 5, 37), (1, 3, 8, 36, 64, None), (0, 1, 7, 40)),
    (130, 33, 32),
    (64, 256, 255),
]


def seen(length, window, past):
    """Which query sees which key: own keys [T, T], cached ones [T, P]."""
    distance = torch.arange(length)[:, None] - torch.arange(-past, length)[None, :]
    mask = (distance >= 0) & (distance < (length + past if window is None else window))
    return mask[:, past:], mask[:, :past]


def tiles_holding_any(mask, rows, keys, origin=0):
    """Tiles of a mask that hold a visible pair; tiles of keys begin at `origin` + t·keys."""
    found = set()
    for query, key in mask.nonzero().tolist():
        found.add((query // rows, (key - origin) // keys))
    return len(found)


@pytest.mark.parametrize(("length", "window", "past"), SHAPES)
def test_pairs_and_tiles_are_those_of_the_mask(length, window, past):
    own, cached = seen(length, window, past)
    assert visible_pairs(length, window, past) == (int(own.sum()), int(cached.sum()))
    tile, other = Tile(16, 8, 4, 1), Tile(4, 32, 4, 1)
    # Cached keys' tiles end with the cache where queries are walked, else they begin with it.
    counted = tiles_by_queries(length, window, past, tile)
    from_end = -(-past // 8) * 8 - past
    assert counted == (
        tiles_holding_any(own, 16, 8),
        tiles_holding_any(cached, 16, 8, -from_end),
    )
    assert tiles_by_keys(length, window, past, tile, other) == (
        tiles_holding_any(own, 16, 8),
        tiles_holding_any(cached, 4, 32),
    )


def test_flops_are_two_a_product_pair_and_column():
    work = attention_work(
        "inner_backward", batch=2, num_heads=3, length=10, head_dim=20, window=4, past=6
    )
    own, cached = (int(m.sum()) for m in seen(10, 4, 6))
    assert work.pairs == (own, cached)
    assert work.flops == 2 * 3 * 2 * 20 * (5 * own + 3 * cached)
    assert work.tile_flops == 2 * 3 * 2 * 32 * (5 * work.tile_pairs.own + 3 * work.tile_pairs.past)


def test_tiles_cost_little_more_than_pairs_at_a_real_shape():
    for kernel in GEMMS:
        work = attention_work(
            kernel, batch=1, num_heads=1, length=1024, head_dim=128, window=8192, past=8191
        )
        assert work.flops < work.tile_flops < 1.05 * work.flops
    split, one_pass = (
        sum(attention_work(k, batch=1, num_heads=1, length=64, head_dim=64, window=32).flops
            for k in kernels)
        for kernels in (("pair_dq", "pair_dkv"), ("pair_backward",))
    )  # fmt: skip
    assert split * 15 == one_pass * 21


def test_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernel must be one of forward, .*, and is 'sideways'"):
        attention_work("sideways", batch=1, num_heads=1, length=1, head_dim=2, window=1)
