"""Needles found: heat maps of length and depth, and where the needles lay."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_megatron.evaluation.formatting import mean_cell
from ttt_megatron.evaluation.statistics import Mean
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.evaluations import Evaluation, read_evaluation
from ttt_megatron.reporting.runs import Group
from ttt_megatron.reporting.section import Panel, Section
from ttt_megatron.sweeps.results import seed_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_MAPS = 8
_REACHES = ("inside", "outside", "beyond_all_windows")


def needle_section(groups: Sequence[Group]) -> Section | None:
    """Of the groups that were evaluated, their first way of reading in pictures; None if none."""
    rows: list[list[str]] = []
    panels: list[Panel] = []
    metrics: dict[str, float] = {}
    legends: dict[str, None] = {}
    for group in groups:
        found = [e for run in group.runs if (e := read_evaluation(run, "needle")) is not None]
        if not found:
            continue
        legends |= dict.fromkeys(each.values["legend"] for each in found)
        for number, way in enumerate(found[0].values["ways"]):
            for task in found[0].values["ways"][way]["by_reach"]:
                label = f"{group.label}, {way}, {task}"
                rows.append([label, *_by_reach(found, way, task)])
                metrics |= {f"needle/{label}": _all(found, way, task)}
                if number == 0 and len(panels) < _MOST_MAPS:
                    panels.append(partial(_draw, found, way, task, f"{group.label}, {task}"))
    if not rows:
        return None
    header = ["", "inside the window", *(f"found {name.replace('_', ' ')}" for name in _REACHES)]
    return Section(
        title="Needles in haystacks",
        text="\n\n".join(legends),
        grids=[Grid(title="needles found by where they lay", header=header, rows=rows)],
        panels=panels,
        metrics=metrics,
    )


def _by_reach(found: Sequence[Evaluation], way: str, task: str) -> list[str]:
    each = [one.values["ways"][way]["by_reach"][task] for one in found if way in one.values["ways"]]
    shares = [one["share_inside"] for one in each]
    return [
        f"{sum(shares) / len(shares):.0%}",
        *(mean_cell(_mean([one[name] for one in each]), digits=2) for name in _REACHES),
    ]


def _mean(values: Sequence[dict[str, Any] | None]) -> Mean:
    """Of seeds' means, as JSON has them; of one seed its own, over prompts."""
    known = [v for v in values if v is not None and v["mean"] is not None]
    if len(known) == 1:
        error = known[0]["standard_error"]
        known_error = float("nan") if error is None else error
        return Mean(known[0]["mean"], known_error, known[0]["documents"], known[0]["tokens"])
    mean = seed_mean([v["mean"] for v in known])
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
