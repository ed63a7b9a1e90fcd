"""How far a point is, from its folder alone, and whether it can go on from there."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ttt_megatron.data.index import read_index
from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.report import read_report
from ttt_megatron.sweeps.points import Point, refuse_points
from ttt_megatron.sweeps.spec import Sweep
from ttt_megatron.training.checkpoint_folder import read_config, read_info, resolve_checkpoint
from ttt_megatron.training.metrics_file import METRICS_FILE, last_row, read_metrics
from ttt_megatron.training.preflight import find_resumable, resolve_run
from ttt_megatron.training.resume import refuse_changes, refuse_other_data

EVALUATIONS = "evaluation"
POSITION = "position"


@dataclass(frozen=True, kw_only=True)
class PointState:
    """A point's progress.

    step: of its newest complete checkpoint, 0 for none; values: what was measured of the finished
    run, by name, in nats a token (nan for a loss that was no number); seconds: the steps' wall
    time; missing: what is still to be measured.
    """

    step: int
    steps: int
    values: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    missing: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether the last step's checkpoint is there and complete."""
        return self.step >= self.steps

    @property
    def finished(self) -> bool:
        """Whether it is trained and everything is measured."""
        return self.trained and not self.missing


def read_state(point: Point, sweep: Sweep, *, quick: bool = False) -> PointState:
    """What the point's folder holds. Checkpoints count if they are complete; no other mark does.

    `quick` looks at the sizes of a checkpoint's files alone.
    """
    steps = point.config.training.steps
    try:
        checkpoint = find_resumable(point.folder, quick=quick)
        step = 0 if checkpoint is None else read_info(checkpoint).step
    except UserError:
        # All damaged: training will say so, and the point fails by it.
        step = 0
    if not step:
        return PointState(step=0, steps=steps)
    rows = read_metrics(point.folder / METRICS_FILE)
    seconds = sum(row.get("seconds") or 0.0 for row in rows if row["step"] <= step)
    if step < steps:
        return PointState(step=step, steps=steps, seconds=seconds)
    values, missing = {}, []
    measured = [row[sweep.loss] for row in rows if row["step"] == steps and sweep.loss in row]
    if measured:
        values[sweep.loss] = math.nan if measured[-1] is None else float(measured[-1])
    else:
        missing.append(sweep.loss)
    if sweep.evaluate is not None:
        undone = [t for t in _tasks(sweep.evaluate) if not _evaluated(point, sweep, t)]
        if POSITION in sweep.asked and POSITION not in undone:
            values |= _loss_by_position(point)
        missing += undone
    return PointState(
        step=step, steps=steps, values=values, seconds=seconds, missing=tuple(missing)
    )


def _tasks(options: Mapping[str, Any]) -> list[str]:
    chosen = options.get("task", POSITION)
    return chosen if isinstance(chosen, list) else [chosen]


def evaluation_file(folder: Path, task: str) -> Path:
    """Where `ttt-megatron evaluate` leaves a task's results in a run's folder."""
    stem = "by_position" if task == POSITION else task
    return folder / EVALUATIONS / f"{stem}.json"


def _evaluated(point: Point, sweep: Sweep, task: str) -> bool:
    """Whether the last step's model was evaluated as the sweep asks, on the data that is there."""
    if task not in sweep.asked:
        return False
    asked = sweep.asked[task]
    try:
        about = json.loads(evaluation_file(point.folder, task).read_text(encoding="utf-8"))["about"]
        data = read_index(Path(asked["data"] or point.config.data.path))
        return bool(
            about["step"] == point.config.training.steps
            and all(about["asked"].get(name) == value for name, value in asked.items())
            and about["data_fingerprint"] == data.fingerprint
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return False


def _loss_by_position(point: Point) -> dict[str, float]:
    """Nats a token over all positions of each way of reading."""
    report = read_report(evaluation_file(point.folder, POSITION))
    return {f"evaluated, {name}": report.mean(name).mean for name in report.curves}


def current_step(point: Point) -> int:
    """The last step in the metrics log of a point that runs; cheap."""
    row = last_row(point.folder / METRICS_FILE)
    return 0 if row is None else int(row["step"])


def resolve_points(points: Sequence[Point], sweep: Sweep) -> list[Point]:
    """The points, resolved against their data; each can start, or go on from its checkpoint.

    Raises UserError naming all that cannot, or whose checkpoint has other settings or other data,
    be they finished or not: a table must not hold two kinds of measurements.
    """
    fixed = ("training.eval_sequences",) if sweep.loss.startswith("validation") else ()
    resolved: list[Point] = []
    problems: dict[str, str] = {}
    starts: set[str] = set()
    for point in points:
        try:
            config = resolve_run(point.config)
            checkpoint = find_resumable(point.folder, quick=True)
            start = config.training.init_from
            if checkpoint is not None:
                refuse_changes(read_config(checkpoint), config, str(checkpoint), fixed=fixed)
                refuse_other_data(read_info(checkpoint), config.data.path)
            elif start is not None and start not in starts:
                resolve_checkpoint(Path(start))
                starts.add(start)
            resolved.append(replace(point, config=config))
        except UserError as error:
            problems[point.name] = str(error)
    refuse_points(sweep.source, problems, len(points))
    return resolved
