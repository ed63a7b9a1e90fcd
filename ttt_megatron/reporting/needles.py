"""Needles found: heat maps of length and depth, and where the needles lay."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_megatron.evaluation.attention_reach import AttentionReach
from ttt_megatron.evaluation.formatting import mean_cell
from ttt_megatron.evaluation.needle import NeedleCell, ScoreByReach, score_by_reach
from ttt_megatron.evaluation.needle_text import KINDS
from ttt_megatron.evaluation.statistics import Mean
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.evaluations import Evaluation, common_ways, group_evaluations
from ttt_megatron.reporting.runs import Group
from ttt_megatron.reporting.same_measurement import refuse_other_measurements
from ttt_megatron.reporting.section import Panel, Section
from ttt_megatron.sweeps.results import seed_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_MAPS = 8
_REACHES = ("inside", "outside", "beyond all windows")
_OPTIONS = "--needles, --lengths, --depths, --samples, --score, --answers and --seed"


def needle_section(groups: Sequence[Group]) -> Section | None:
    """Of the groups that were evaluated, their first way of reading in pictures; None if none.

    Raises UserError if two evaluations are not of the same prompts, scored alike.
    """
    rows: list[list[str]] = []
    panels: list[Panel] = []
    metrics: dict[str, float] = {}
    labelled = [(group.label, group_evaluations(group, "needle")) for group in groups]
    everything = [one for _, found in labelled for one in found]
    refuse_other_measurements(everything, _measured, _OPTIONS)
    for group, found in labelled:
        for number, way in enumerate(common_ways([one.values["ways"] for one in found])):
            for task in found[0].values["ways"][way]["by_reach"]:
                label = f"{group}, {way}, {task}"
                rows.append([label, *_by_reach(found, way, task)])
                metrics |= {f"needle/{label}": _all(found, way, task)}
                if number == 0 and len(panels) < _MOST_MAPS:
                    panels.append(partial(_draw, found, way, task, f"{group}, {task}"))
    if not rows:
        return None
    header = ["", "inside the window", *(f"found {name}" for name in _REACHES)]
    return Section(
        title="Needles in haystacks",
        text="\n\n".join(dict.fromkeys(one.values["legend"] for one in everything)),
        grids=[Grid(title="needles found by where they lay", header=header, rows=rows)],
        panels=panels,
        metrics=metrics,
    )


def _measured(one: Evaluation) -> dict[str, Any]:
    """What prompts were read and how they were scored."""
    cells = [cell for way in one.values["ways"].values() for cell in way["cells"]]
    # The controls are always among the places.
    depths = {cell["place"] for cell in cells if not isinstance(cell["place"], str)}
    return {
        "needles": sorted({cell["task"] for cell in cells}),
        "lengths": sorted({cell["length"] for cell in cells}),
        "depths": [f"{depth:.0%}" for depth in sorted(depths)],
        **{name: one.values[name] for name in ("samples", "score", "answers", "seed")},
        "answer tokens": one.values["answer_tokens"],
    }


def _by_reach(found: Sequence[Evaluation], way: str, task: str) -> list[str]:
    each = [_reached(one.values["ways"][way], task) for one in found]
    means = ([x.inside for x in each], [x.outside for x in each], [x.beyond for x in each])
    return [
        f"{sum(one.share_inside for one in each) / len(each):.0%}",
        *(mean_cell(_mean(values), digits=2) for values in means),
    ]


def _reached(way: dict[str, Any], task: str) -> ScoreByReach:
    """Of one kind's cells, as JSON has them."""
    (kind,) = (number for number, known in KINDS.items() if known.name == task)
    cells = [
        NeedleCell(
            kind=kind,
            length=cell["length"],
            place=cell["place"],
            scores=tuple(cell["scores"]),
            distances=tuple(cell["distances"]),
        )
        for cell in way["cells"]
        if cell["task"] == task
    ]
    return score_by_reach(cells, AttentionReach(way["window"], way["stacked_windows"]))


def _mean(values: Sequence[Mean]) -> Mean:
    """Over seeds; of one seed its own, over samples."""
    known = [mean for mean in values if mean.documents]
    if len(known) == 1:
        return known[0]
    mean = seed_mean([one.mean for one in known])
    return Mean(mean.mean, mean.standard_error, mean.seeds, 0)


def _all(found: Sequence[Evaluation], way: str, task: str) -> float:
    """The share found over all depths and lengths, without the controls."""
    scores = [
        score
        for one in found
        for cell in one.values["ways"][way]["cells"]
        if cell["task"] == task and not isinstance(cell["place"], str)
        for score in cell["scores"]
    ]
    return float(np.mean(scores)) if scores else float("nan")


def _draw(found: Sequence[Evaluation], way: str, task: str, title: str, axis: "Axes") -> None:
    """A heat map; cells whose needles all lie inside the attention window are framed."""
    from matplotlib.patches import Rectangle

    cells = [c for c in found[0].values["ways"][way]["cells"] if c["task"] == task]
    lengths = list(dict.fromkeys(cell["length"] for cell in cells))
    places = list(dict.fromkeys(cell["place"] for cell in cells))
    scores = np.full((len(lengths), len(places)), np.nan)
    for cell in cells:
        y, x = lengths.index(cell["length"]), places.index(cell["place"])
        values = [_score(one, way, cell) for one in found]
        known = [value for value in values if value is not None]
        scores[y, x] = np.mean(known) if known else np.nan
        axis.text(x, y, f"{scores[y, x]:.2f}", ha="center", va="center", color=_ink(scores[y, x]))
        if cell["share_inside"] == 1:
            frame = Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, color="red")
            axis.add_patch(frame)
    axis.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    names = [place if isinstance(place, str) else f"{place:.0%}" for place in places]
    axis.set_xticks(range(len(places)), names)
    axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set(xlabel="depth; controls", ylabel="tokens", title=f"{title}: needles found")


def _ink(score: float) -> str:
    return "black" if score > 0.6 else "white"


def _score(one: Evaluation, way: str, like: dict[str, Any]) -> float | None:
    for cell in one.values["ways"][way]["cells"]:
        if all(cell[key] == like[key] for key in ("task", "length", "place")):
            score: float | None = cell["score"]["mean"]
            return score
    return None
