"""Heads rotated by halves, and heads rotated by neighbours: the same up to the order of rows."""

from torch import Tensor


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose components m and m + d/2 are rotated together, as ours: [n·d, ...].

    Ours rotate components 2m and 2m + 1. Products of queries with keys do not change, as both are
    put in the same order.
    """
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)
