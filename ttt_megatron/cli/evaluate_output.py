"""What `evaluate` shows while it works, and where its results go."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.cli.evaluate_models import Evaluated
from ttt_megatron.cli.loaded_model import LoadedModel

if TYPE_CHECKING:
    from rich.table import Table

    from ttt_megatron.evaluation.report import Written
    from ttt_megatron.evaluation.task_report import TaskReport


@contextmanager
def progress_bar(
    description: str, total: int, unit: str = "documents"
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields what is told of units and tokens done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    start, read = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, rate="")

        def on_progress(count: int, tokens: int) -> None:
            nonlocal read
            read += tokens
            rate = f"{read / (time.perf_counter() - start):,.0f} tokens/s"
            progress.update(task, advance=count, rate=rate)

        yield on_progress


def way_label(name: str) -> str:
    """How a bar names a way of reading."""
    return f"inner steps {name}" if name in ("on", "off") else name


def publish_task(
    evaluated: Evaluated, report: "TaskReport", draw: Callable[[Path, str], None]
) -> None:
    """`publish` for a task's report; `draw` is given the picture's path and title."""
    publish(
        evaluated,
        report,
        tables=report.tables(),
        stem=report.task,
        metrics=report.finite_metrics(),
        draw=draw,
        legend=report.legend,
    )


def publish(
    evaluated: Evaluated,
    report: "Written",
    *,
    tables: "Iterable[Table]",
    stem: str,
    metrics: Mapping[str, float],
    draw: Callable[[Path, str], None],
    legend: str = "",
) -> None:
    """Prints the tables, writes JSON, Markdown and PNG, logs them to the model's run."""
    from rich.console import Console

    from ttt_megatron.evaluation.report import write_files

    model = evaluated.model
    for table in tables:
        # Numbers cut short would be of no use: a narrow terminal wraps the lines instead.
        needed = Console(width=1000).measure(table).maximum
        Console(width=max(Console().width, needed)).print(table)
    if legend:
        print(legend)
    print(f"kernels: {model.kernels}")
    files = write_files(report, evaluated.output, stem)
    plot = evaluated.output / f"{stem}.png"
    draw(plot, f"{model.config.name}, step {model.info.step}")
    files = [*files, plot]
    for path in files:
        print(path)
    _log(model, metrics, files)


def _log(model: LoadedModel, metrics: Mapping[str, float], files: list[Path]) -> None:
    from ttt_megatron.evaluation.tracking import log_to_run

    _show_warnings()
    done = log_to_run(model.run_folder, metrics, model.info.step, files)
    if done is not None:
        print(done)


def _show_warnings() -> None:
    ours = logging.getLogger("ttt_megatron")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler(sys.stderr))
