"""What a changed context does to losses, as a picture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ttt_megatron.evaluation.leakage_report import LeakageResults
from ttt_megatron.evaluation.pictures import new_figure, save_figure


def draw_leakage(results: Mapping[str, LeakageResults], path: Path, title: str) -> None:
    """Writes a PNG: on the left losses with the context changed, minus those with the right one; on
    the right losses behind another document, minus those alone; ± 1 standard error.
    """
    figure, ((left, right),) = new_figure(1, 2, width=11, height=4.5)
    uses = [
        (f"{name}\nall but {use.kept:,}" if use.kept else f"{name}\nall", use)
        for name, each in results.items()
        for use in each.content
    ]
    places = np.arange(len(uses))
    kinds = (("chunks shuffled", -0.2, "shuffled"), ("another document's", 0.2, "foreign"))
    for label, shift, kind in kinds:
        means = [getattr(use, kind) for _, use in uses]
        error = np.nan_to_num([mean.standard_error for mean in means])
        height = [mean.mean for mean in means]
        left.bar(places + shift, height, 0.36, yerr=error, capsize=3, label=label)
    left.set_xticks(places, [label for label, _ in uses])
    left.set(xlabel="context changed", ylabel="nats a token above the right context's")
    left.legend()
    behind = [each.isolation.behind for each in results.values()]
    error = np.nan_to_num([mean.standard_error for mean in behind])
    right.bar(list(results), [mean.mean for mean in behind], 0.5, yerr=error, capsize=3)
    right.set(xlabel="behind another document", ylabel="nats a token above the document alone's")
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.8)
    holds = all(each.holds for each in results.values())
    verdict = "no loss depends on later tokens" if holds else "LOSSES DEPEND ON LATER TOKENS"
    figure.suptitle(f"{title}: {verdict}")
    save_figure(figure, path)
