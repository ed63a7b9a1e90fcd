"""Needles found as heat maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_megatron.evaluation.needle import NeedleSettings
from ttt_megatron.evaluation.needle_prompt import NEAR, REMOVED, Place
from ttt_megatron.evaluation.needle_report import NeedleResults, place_name
from ttt_megatron.evaluation.needle_text import KINDS
from ttt_megatron.evaluation.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_needles(
    results: Mapping[str, NeedleResults], settings: NeedleSettings, path: Path, title: str
) -> None:
    """Writes a PNG: a heat map of depth × length for each way of reading and each task.

    Cells whose needles all lie inside the attention window are framed.
    """
    rows, columns = len(results), len(settings.kinds)
    width = 1.5 + columns * (1.2 + 0.75 * len(settings.places))
    height = 1.2 + rows * (1.0 + 0.45 * len(settings.lengths))
    figure, axes = new_figure(rows, columns, width=width, height=height)
    image: Any = None
    for row, (name, each) in enumerate(results.items()):
        for column, kind in enumerate(settings.kinds):
            axis = axes[row][column]
            image = _draw_map(axis, each, kind, settings)
            axis.set_title(f"{name}, {KINDS[kind].name}")
    figure.colorbar(image, ax=axes, label="found", shrink=0.8)
    figure.suptitle(title)
    save_figure(figure, path)


def _draw_map(axis: "Axes", results: NeedleResults, kind: int, settings: NeedleSettings) -> Any:
    from matplotlib.patches import Rectangle

    places: Sequence[Place] = settings.places
    cells = [[results.find(kind, length, place) for place in places] for length in settings.lengths]
    found = np.array([[cell.mean.mean for cell in row] for row in cells])
    image = axis.imshow(found, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            colour = "black" if found[y, x] > 0.6 else "white"
            axis.text(x, y, f"{found[y, x]:.2f}", ha="center", va="center", color=colour)
            if cell.place != REMOVED and cell.inside(results.reach) == 1:
                frame = Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, color="red")
                axis.add_patch(frame)
    axis.axvline(places.index(NEAR) - 0.5, color="white", linewidth=3)
    axis.set_xticks(range(len(places)), [place_name(place) for place in places])
    axis.set_yticks(range(len(settings.lengths)), [f"{n:,}" for n in settings.lengths])
    axis.set(xlabel="depth; controls", ylabel="tokens")
    return image
