"""Losses of decoded text as a picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ttt_megatron.evaluation.decoding import Judgement
from ttt_megatron.evaluation.pictures import new_figure, save_figure


def draw_decoding(
    judgements: Mapping[str, Judgement], path: Path, title: str, by_byte: bool
) -> None:
    """Writes a PNG: the judge's loss of each text, ± 1 standard error, and every document's."""
    figure, ((axes,),) = new_figure(1, 1, width=7, height=4.5)
    for x, each in enumerate(judgements.values()):
        counts = each.text_bytes if by_byte else each.tokens
        known = counts > 0
        single = each.nll[known] / counts[known]
        spread = np.linspace(-0.12, 0.12, len(single))
        axes.scatter(x + spread, single, s=8, alpha=0.4, color=f"C{x}", linewidths=0)
        mean = each.mean(by_byte)
        error = np.nan_to_num(mean.standard_error)
        axes.errorbar(x, mean.mean, error, fmt="_", color="black", capsize=6, markersize=18)
        axes.annotate(f"{mean.mean:.2f}", (x + 0.17, mean.mean), va="center")
    axes.set_xticks(range(len(judgements)), list(judgements))
    axes.set_xlim(-0.6, len(judgements) - 0.4)
    unit = "byte" if by_byte else "token"
    axes.set(ylabel=f"nats a {unit} under the judge", title=f"{title}: decoded text")
    save_figure(figure, path)
