"""Cutting attention into tiles of queries and the keys they can see.

Inside, queries are [b, n_kv, r, T, d] (r query heads share a key head) and keys [b, n_kv, T, d].
Neighbouring tiles of equal shape form a group, which is worked on as one batch of matrices.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_GROUP_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TileGroup:
    """`count` tiles of `rows` queries; each sees `span` keys; both advance by `rows` a tile."""

    query_start: int
    rows: int
    key_start: int
    span: int
    shift: int
    count: int


def tile_rows(window: int | None) -> int:
    """Queries a tile: about the window, between 32 and 256."""
    if window is None or window >= 256:
        return 256
    return max(32, 1 << (window - 1).bit_length())


@lru_cache(maxsize=256)
def tile_groups(
    num_queries: int, num_keys: int, window: int | None, matrices: int, batched: bool
) -> tuple[TileGroup, ...]:
    """The tiles of queries at the end of `num_keys` keys. `matrices` is b·n."""
    rows_limit = tile_rows(window)
    offset = num_keys - num_queries
    groups: list[TileGroup] = []
    for start in range(0, num_queries, rows_limit):
        rows = min(rows_limit, num_queries - start)
        first = 0 if window is None else max(0, start + offset - window + 1)
        tile = TileGroup(
            start, rows, first, start + offset + rows - first, start + offset - first, 1
        )
        last = groups[-1] if groups else None
        if (
            batched
            and last is not None
            and (last.rows, last.span, last.shift) == (tile.rows, tile.span, tile.shift)
            and last.key_start + last.count * rows == tile.key_start
            and (last.count + 1) * matrices * rows * tile.span <= MAX_GROUP_ELEMENTS
        ):
            groups[-1] = TileGroup(
                last.query_start, rows, last.key_start, last.span, last.shift, last.count + 1
            )
        else:
            groups.append(tile)
    return tuple(groups)


@lru_cache(maxsize=64)
def additive_mask(
    rows: int,
    span: int,
    shift: int,
    window: int | None,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """0 where query i may see key j (0 ≤ i + shift − j < window), −inf elsewhere.

    Result: [repeats·rows, span].
    """
    distance = (
        torch.arange(rows, device=device).unsqueeze(1) + shift - torch.arange(span, device=device)
    )
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    mask = torch.zeros(rows, span, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))
    return mask.repeat(repeats, 1)


def split_query_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """[b, T, n, d] → [b, n_kv, r, T, d], contiguous."""
    return x.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).contiguous()


def merge_query_heads(x: Tensor) -> Tensor:
    """[b, n_kv, r, T, d] → [b, T, n, d], contiguous: what follows keeps it without a copy."""
    return x.permute(0, 3, 1, 2, 4).contiguous().flatten(2, 3)


def take_queries(x: Tensor, group: TileGroup) -> Tensor:
    """The group's rows of [b, n_kv, r, T, …] as [b·n_kv·count, r·rows, …]."""
    stop = group.query_start + group.count * group.rows
    tiles = x[:, :, :, group.query_start : stop].unflatten(3, (group.count, group.rows))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def put_queries(out: Tensor, group: TileGroup, value: Tensor) -> None:
    """Write what `take_queries` would read."""
    b, heads, repeats = out.shape[:3]
    stop = group.query_start + group.count * group.rows
    target = out[:, :, :, group.query_start : stop].unflatten(3, (group.count, group.rows))
    shape = (b, heads, group.count, repeats, group.rows, *out.shape[4:])
    target.transpose(2, 3).copy_(value.view(shape))


def take_keys(x: Tensor, group: TileGroup) -> Tensor:
    """The group's keys of [b, n_kv, T, d] as [b·n_kv·count, span, d]."""
    stop = group.key_start + (group.count - 1) * group.rows + group.span
    windows = x[:, :, group.key_start : stop].unfold(2, group.span, group.rows)
    return windows.mT.flatten(0, 2)


def add_keys(out: Tensor, group: TileGroup, value: Tensor, skip: int = 0) -> None:
    """Add [b·n_kv·count, span − skip, d] to the keys after the first `skip` of each tile."""
    b, heads, _, width = out.shape
    tiles = value.view(b, heads, group.count, group.span - skip, width)
    if group.count == 1:
        start = group.key_start + skip
        out[:, :, start : start + group.span - skip] += tiles[:, :, 0]
        return
    for piece in range(0, group.span, group.rows):
        length = min(group.rows, group.span - piece)
        start = group.key_start + piece
        stop = start + (group.count - 1) * group.rows + length
        target = out[:, :, start:stop].unfold(2, length, group.rows)
        target += tiles[:, :, :, piece : piece + length].mT
