"""Tables, figures and JSON of the checks for leakage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ttt_megatron.evaluation.formatting import mean_cell, mean_values
from ttt_megatron.evaluation.leakage import LIMIT, Causality, ContentUse, Isolation
from ttt_megatron.evaluation.task_report import Grid, TaskReport


@dataclass(frozen=True, kw_only=True)
class LeakageResults:
    """The checks of one way of reading."""

    causality: list[Causality]
    isolation: Isolation
    content: list[ContentUse]

    @property
    def holds(self) -> bool:
        """Whether no loss depends on later tokens."""
        return all(check.holds for check in self.causality)


def leakage_report(
    results: Mapping[str, LeakageResults],
    last: int,
    documents: Sequence[str],
    about: Mapping[str, object],
) -> TaskReport:
    """Of every way of reading, by name; `documents` are names."""
    grids = [_causality(results), _isolation(results), _content(results)]
    metrics: dict[str, float] = {}
    for name, each in results.items():
        metrics[f"{name}/largest_change_before"] = max(c.before for c in each.causality)
        metrics[f"{name}/largest_change_beside"] = each.isolation.beside
        metrics[f"{name}/behind_another"] = each.isolation.behind.mean
        for use in each.content:
            metrics[f"{name}/shuffled_behind_{use.kept}"] = use.shuffled.mean
            metrics[f"{name}/foreign_behind_{use.kept}"] = use.foreign.mean
    return TaskReport(
        task="leakage",
        legend=(
            f"Changes of losses in nats over {len(documents)} documents, ± standard error over "
            f"documents. A changed token leaks if a loss before it changes by more than {LIMIT:g}."
        ),
        grids=grids,
        values={
            "last": last,
            "ways": {name: _values(each) for name, each in results.items()},
            "documents": list(documents),
        },
        metrics=metrics,
        about=dict(about),
    )


def _causality(results: Mapping[str, LeakageResults]) -> Grid:
    rows = [
        [
            f"{name}, token {check.position:,}",
            f"{check.before:.1e}" if check.before else "0",
            mean_cell(check.after, digits=4),
            "no leak" if check.holds else "LEAKS",
        ]
        for name, each in results.items()
        for check in each.causality
    ]
    header = ["changed", "largest change before", "mean change after", "verdict"]
    return Grid(title="one token changed", header=header, rows=rows)


def _isolation(results: Mapping[str, LeakageResults]) -> Grid:
    rows = [
        [
            name,
            f"{each.isolation.beside:.1e}" if each.isolation.beside else "0",
            mean_cell(each.isolation.behind, "+"),
        ]
        for name, each in results.items()
    ]
    tokens = next(iter(results.values())).isolation.tokens
    return Grid(
        title=f"another document beside or before, first {tokens:,} tokens",
        header=["read", "largest change beside others in a batch", "behind another - alone"],
        rows=rows,
    )


def _content(results: Mapping[str, LeakageResults]) -> Grid:
    rows = [
        [
            f"{name}, all but the nearest {use.kept:,}" if use.kept else f"{name}, all",
            mean_cell(use.right),
            mean_cell(use.shuffled, "+"),
            mean_cell(use.foreign, "+"),
        ]
        for name, each in results.items()
        for use in each.content
    ]
    header = ["context changed", "right context", "shuffled - right", "another document's - right"]
    return Grid(title="loss of the last tokens, their context changed", header=header, rows=rows)


def _values(results: LeakageResults) -> dict[str, object]:
    return {
        "holds": results.holds,
        "causality": [
            {
                "position": check.position,
                "largest_change_before": check.before,
                "mean_change_after": mean_values(check.after),
            }
            for check in results.causality
        ],
        "isolation": {
            "tokens": results.isolation.tokens,
            "largest_change_beside": results.isolation.beside,
            "behind_another": mean_values(results.isolation.behind),
        },
        "content": [
            {
                "kept": use.kept,
                "changed": use.changed,
                "right": mean_values(use.right),
                "shuffled": mean_values(use.shuffled),
                "foreign": mean_values(use.foreign),
            }
            for use in results.content
        ],
    }
