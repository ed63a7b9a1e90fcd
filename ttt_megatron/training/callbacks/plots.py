"""The loss curve as a picture at the end of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

LOSS_PLOT = "loss.png"
_CURVES = {
    "loss": "training",
    "first_chunk_loss": "first chunk",
    "last_chunk_loss": "last chunk",
    "validation_loss": "validation",
}


class LossPlot(Callback):
    """Draws `output/loss.png` from the metrics log; for the main rank."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def on_end(self, trainer: Trainer) -> None:
        """Draws the curve over all steps so far."""
        rows = read_metrics(self._output / METRICS_FILE)
        try:
            draw_losses(rows, self._output / LOSS_PLOT, trainer.config.name)
        except OSError as error:
            logger.warning("%s could not be drawn: %s", self._output / LOSS_PLOT, error)


def draw_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss over steps, one curve a kind of loss present in `rows`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label in _CURVES.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            marker = "o" if name.startswith("validation") else ""
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker=marker)
    axes.set(xlabel="step", ylabel="nats a token", title=title)
    if axes.lines:
        axes.legend()
    beside = path.with_suffix(".tmp.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)
