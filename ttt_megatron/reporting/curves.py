"""Losses over positions, and over context lengths: one table and one plot each."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ttt_megatron.evaluation.formatting import mean_cell
from ttt_megatron.evaluation.statistics import BucketSums
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.curve_plot import Curve, Layout, draw_gaps, draw_losses
from ttt_megatron.reporting.evaluations import Evaluation, common_ways, group_evaluations
from ttt_megatron.reporting.runs import Group
from ttt_megatron.reporting.same_measurement import refuse_other_measurements
from ttt_megatron.reporting.section import Section
from ttt_megatron.reporting.seeds import LEGEND, SeedCurve
from ttt_megatron.sweeps.state import POSITION

_OPTIONS = "--length, --documents and --last"


def _position_sums(values: dict[str, Any]) -> dict[str, BucketSums]:
    counts = np.asarray(values["document_tokens"], dtype=np.int64)
    nll = values["document_nll"]
    return {name: BucketSums(np.asarray(rows, dtype=float), counts) for name, rows in nll.items()}


def _context_sums(values: dict[str, Any]) -> dict[str, BucketSums]:
    return {
        name: BucketSums(
            np.asarray(curve["document_nll"], dtype=float),
            np.asarray(curve["document_tokens"], dtype=np.int64),
        )
        for name, curve in values["curves"].items()
    }


BY_POSITION = Layout(
    task=POSITION,
    title="Loss by position",
    column="position",
    labels=lambda values: [f"{start}-{stop}" for start, stop in values["buckets"]],
    # The middle on a log axis; of the first range, which begins at 0, that of its last three
    # quarters.
    places=lambda values: [math.sqrt(max(a, b / 4) * b) for a, b in values["buckets"]],
    sums=_position_sums,
    with_all=True,
)
BY_CONTEXT = Layout(
    task="context",
    title="Loss by context length",
    column="context",
    labels=lambda values: [f"{context:,}" for context in values["contexts"]],
    places=lambda values: [float(context) for context in values["contexts"]],
    sums=_context_sums,
    with_all=False,
)


def curves_section(
    groups: Sequence[Group], layout: Layout, reference: str | None
) -> Section | None:
    """Of the groups that were evaluated; None if none was. Others are compared with the reference.

    `reference` is a group's label; the first that was evaluated takes its place where it was not.

    Raises UserError if two evaluations read different documents.
    """
    found = {group.label: group_evaluations(group, layout.task) for group in groups}
    found = {label: evaluations for label, evaluations in found.items() if evaluations}
    if not found:
        return None
    everything = [one for evaluations in found.values() for one in evaluations]
    refuse_other_measurements(everything, partial(_measured, layout), _OPTIONS)
    values = everything[0].values
    curves = [curve for label, each in found.items() for curve in _curves(label, each, layout)]
    chosen = next((c for c in curves if c.main and c.group == reference), curves[0])
    columns: list[int | None] = list(range(len(layout.labels(values))))
    header = ["", *layout.labels(values)]
    if layout.with_all:
        columns.append(None)
        header.append("all")
    losses = [[c.label, *(mean_cell(c.sums.mean(n)) for n in columns)] for c in curves]
    others = [c for c in curves if c is not chosen]
    gaps = [
        [c.label, *(mean_cell(c.sums.difference(chosen.sums, n), "+") for n in columns)]
        for c in others
    ]
    grids = [Grid(title=f"nats a token by {layout.column}", header=header, rows=losses)]
    panels = [partial(draw_losses, layout, values, curves)]
    if others:
        grids.append(Grid(title=f"difference to {chosen.label}", header=header, rows=gaps))
        panels.append(partial(draw_gaps, layout, values, curves, chosen))
    last = columns[-1]
    return Section(
        title=layout.title,
        text=f"{_what(values, layout)}, {LEGEND}",
        grids=grids,
        panels=panels,
        metrics={f"{layout.task}/{c.label}": c.sums.mean(last).mean for c in curves},
    )


def _what(values: dict[str, Any], layout: Layout) -> str:
    documents = len(values["documents"])
    if layout is BY_CONTEXT:
        return f"Nats a token over the last {values['last']} tokens of {documents} documents"
    return f"Nats a token on {documents} held-out documents"


def _measured(layout: Layout, one: Evaluation) -> dict[str, Any]:
    """Which tokens were measured."""
    return {
        "documents": one.values["documents"],
        f"{layout.column}s": layout.labels(one.values),
        "last": one.values.get("last"),
    }


def _curves(label: str, evaluations: Sequence[Evaluation], layout: Layout) -> list[Curve]:
    sums = {one.run.config.training.seed: layout.sums(one.values) for one in evaluations}
    ways = common_ways(list(sums.values()))
    return [
        Curve(
            group=label,
            way=way,
            main=number == 0,
            alone=len(ways) == 1,
            sums=SeedCurve(seeds={seed: each[way] for seed, each in sums.items()}),
        )
        for number, way in enumerate(ways)
    ]
