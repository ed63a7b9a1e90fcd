"""How far a sweep is: a bar on a terminal, plain lines elsewhere; ETA over all its steps."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ttt_megatron.sweeps.points import Point
from ttt_megatron.sweeps.state import PointState, current_step

_READ_SECONDS = 0.5


class SweepProgress:
    """Told of what starts and ends; the steps of what runs are read from the runs' logs."""

    def __init__(self, points: Sequence[Point], states: Mapping[str, PointState]) -> None:
        """`points`: those that are asked for; `states` as they are at the start."""
        self._steps = {p.name: p.config.training.steps for p in points}
        self._done = {p.name: min(states[p.name].step, self._steps[p.name]) for p in points}
        self._begun = sum(self._done.values())
        self._ended = sum(states[p.name].finished for p in points)
        self._running: dict[str, Point] = {}
        self._start = self._read = time.monotonic()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._all = self._bar.add_task(
                "all points", total=sum(self._steps.values()), completed=self._begun, figures=""
            )

    def __enter__(self) -> "SweepProgress":
        if self._bar is not None:
            self._bar.start()
        self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, point: Point) -> None:
        """A point's processes run."""
        self._running[point.name] = point
        if self._bar is not None:
            total, step = self._steps[point.name], self._done[point.name]
            self._tasks[point.name] = self._bar.add_task(
                f"  {point.name}", total=total, completed=step, figures=""
            )
        self._say(f"{point.name} runs")

    def moved(self) -> None:
        """Looks at how far the running points are, but not too often."""
        if time.monotonic() - self._read < _READ_SECONDS:
            return
        self._read = time.monotonic()
        for point in self._running.values():
            self._look_at(point)
        self._show()

    def ended(self, point: Point, words: str) -> None:
        """A point's processes are gone; `words` say how."""
        self._look_at(point)
        del self._running[point.name]
        self._ended += 1
        if self._bar is not None:
            self._bar.remove_task(self._tasks.pop(point.name))
        self._show()
        self._say(f"{point.name} {words}")

    def _look_at(self, point: Point) -> None:
        # A run that goes on cuts its log first: never go back behind the checkpoint.
        self._done[point.name] = max(self._done[point.name], current_step(point))
        if self._bar is not None:
            self._bar.update(self._tasks[point.name], completed=self._done[point.name])

    def _show(self) -> None:
        if self._bar is not None:
            figures = f"{self._ended} of {len(self._steps)} points  {self._rate():.2f} steps/s"
            done = sum(self._done.values())
            self._bar.update(self._all, completed=done, figures=figures)

    def _rate(self) -> float:
        done = sum(self._done.values()) - self._begun
        return done / max(time.monotonic() - self._start, 1e-9)

    def _say(self, words: str) -> None:
        line = f"[{self._ended}/{len(self._steps)}] {words}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
            return
        left, rate = sum(self._steps.values()) - sum(self._done.values()), self._rate()
        eta = f"  ETA {_duration(left / rate)}" if rate > 0 and left else ""
        print(f"{line}{eta}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
