"""What an operation costs at the least: the floor that a measured time is held against."""

from typing import NamedTuple


class Work(NamedTuple):
    """FLOPs of matrix products, and bytes between chip and memory.

    Whatever is read is read once and whatever is returned is written once. Elementwise work counts
    no FLOPs: bytes bound it.
    """

    flops: int
    bytes: int


def product(rows: int, columns: int, inner: int) -> int:
    """FLOPs of [rows, inner] times [inner, columns]."""
    return 2 * rows * columns * inner
