"""Figures without a display, and files of them that are never half written."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


def new_figure(
    rows: int, columns: int, *, width: float, height: float
) -> "tuple[Figure, np.ndarray]":
    """A figure of inches `width` by `height` and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False
    )


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG beside `path`, renames it, and closes the figure."""
    from matplotlib import pyplot

    beside = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)
