"""Tables, figures and JSON of needles found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ttt_megatron.evaluation.attention_reach import AttentionReach
from ttt_megatron.evaluation.formatting import mean_cell, mean_values
from ttt_megatron.evaluation.needle import NeedleCell, NeedleSettings, score_by_reach
from ttt_megatron.evaluation.needle_prompt import Place
from ttt_megatron.evaluation.needle_text import KINDS
from ttt_megatron.evaluation.task_report import Grid, TaskReport


@dataclass(frozen=True, kw_only=True)
class NeedleResults:
    """Of one way of reading: its cells, and how far its attention sees."""

    cells: list[NeedleCell]
    reach: AttentionReach

    def of(self, kind: int) -> list[NeedleCell]:
        """Cells of one kind."""
        return [cell for cell in self.cells if cell.kind == kind]

    def find(self, kind: int, length: int, place: Place) -> NeedleCell:
        """One cell."""
        return next(cell for cell in self.of(kind) if (cell.length, cell.place) == (length, place))


def needle_report(
    results: Mapping[str, NeedleResults], settings: NeedleSettings, about: Mapping[str, object]
) -> TaskReport:
    """Of every way of reading, by name."""
    grids = [_scores(name, each, settings) for name, each in results.items()]
    grids.append(_by_reach(results, settings))
    metrics = {}
    for name, each in results.items():
        for kind in settings.kinds:
            reached = score_by_reach(each.of(kind), each.reach)
            prefix = f"{name}/{KINDS[kind].name}"
            metrics[f"{prefix}/inside"] = reached.inside.mean
            metrics[f"{prefix}/outside"] = reached.outside.mean
            for cell in each.of(kind):
                # MLflow's names take no percent sign.
                place = place_name(cell.place).removesuffix("%")
                metrics[f"{prefix}/{cell.length}/{place}"] = cell.mean.mean
    return TaskReport(
        task="needle",
        legend=_legend(settings),
        grids=grids,
        values={
            "score": settings.score,
            "samples": settings.samples,
            "answers": settings.answers if settings.score == "choice" else None,
            "answer_tokens": settings.answer_tokens if settings.score == "exact" else None,
            "seed": settings.seed,
            "ways": {name: _values(each, settings) for name, each in results.items()},
        },
        metrics=metrics,
        about=dict(about),
    )


def _legend(settings: NeedleSettings) -> str:
    how = (
        f"the value is in the {settings.answer_tokens} tokens that greedy decoding gives"
        if settings.score == "exact"
        else f"the value is the likeliest of {settings.answers} (chance {1 / settings.answers:.2g})"
    )
    return (
        f"Share of prompts for which {how}, ± standard error over {settings.samples} prompts. "
        "Percentages are the share of the haystack before the needle; `near`: the needle right "
        "before the question; `removed`: no needle (controls). An asterisk: all needles lie inside "
        "the attention window when the question has been read; a tilde: some do."
    )


def _scores(name: str, results: NeedleResults, settings: NeedleSettings) -> Grid:
    rows = []
    for kind in settings.kinds:
        for length in settings.lengths:
            cells = [results.find(kind, length, place) for place in settings.places]
            marked = [mean_cell(x.mean, digits=2) + _mark(x, results.reach) for x in cells]
            rows.append([f"{KINDS[kind].name}, {length:,}", *marked])
    header = ["task, tokens", *map(place_name, settings.places)]
    return Grid(title=f"{name}: needles found", header=header, rows=rows)


def _mark(cell: NeedleCell, reach: AttentionReach) -> str:
    share = cell.inside(reach)
    return "*" if share == 1 else "~" if share else ""


def _by_reach(results: Mapping[str, NeedleResults], settings: NeedleSettings) -> Grid:
    rows = []
    for name, each in results.items():
        for kind in settings.kinds:
            found = score_by_reach(each.of(kind), each.reach)
            means = (found.inside, found.outside, found.beyond)
            counted = [f"{mean_cell(x, digits=2)} ({x.tokens})" for x in means]
            share = f"{found.share_inside:.0%}"
            rows.append([f"{name}, {KINDS[kind].name}", share, *counted])
    header = [
        "read, task",
        "inside the window",
        "found inside",
        "found outside",
        "of these beyond all windows",
    ]
    title = "where the needle lies (prompts in brackets; errors over samples, alike at all depths)"
    return Grid(title=title, header=header, rows=rows)


def _values(results: NeedleResults, settings: NeedleSettings) -> dict[str, Any]:
    reached = {
        KINDS[kind].name: score_by_reach(results.of(kind), results.reach) for kind in settings.kinds
    }
    return {
        "window": results.reach.window,
        "stacked_windows": results.reach.stacked,
        "by_reach": {
            kind: {
                "share_inside": each.share_inside,
                "inside": mean_values(each.inside),
                "outside": mean_values(each.outside),
                "beyond_all_windows": mean_values(each.beyond),
            }
            for kind, each in reached.items()
        },
        "cells": [
            {
                "task": KINDS[cell.kind].name,
                "length": cell.length,
                "place": cell.place,
                "score": mean_values(cell.mean),
                "share_inside": cell.inside(results.reach),
                "scores": list(cell.scores),
                "distances": list(cell.distances),
            }
            for cell in results.cells
        ],
    }


def place_name(place: Place) -> str:
    """How tables and pictures call it."""
    return place if isinstance(place, str) else f"{place:.0%}"
