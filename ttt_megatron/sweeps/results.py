"""What a sweep found: every point, and means over seeds; as JSON, read again by reports."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.points import Point
from ttt_megatron.sweeps.runner import Failure
from ttt_megatron.sweeps.spec import Axis, Sweep
from ttt_megatron.sweeps.state import PointState

RESULTS = "sweep.json"
_FORMAT = "ttt-megatron-sweep-1"

FINISHED, FAILED, BEGUN, WAITING = "finished", "failed", "begun", "not begun"


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """One run: what makes it differ, how far it is, and what was measured, in nats a token."""

    name: str
    group: str
    settings: dict[str, Any]
    seed: int | None
    named: bool
    folder: str
    status: str
    reason: str = ""
    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """A mean over seeds; the standard error is nan for a single one."""

    mean: float
    standard_error: float
    seeds: int


@dataclass(frozen=True, kw_only=True)
class SweepResults:
    """All points of a sweep. `loss` is the figure that is compared; axes as the file has them."""

    name: str
    base: str
    loss: str
    axes: tuple[Axis, ...]
    points: list[PointResult]

    @property
    def groups(self) -> dict[str, list[PointResult]]:
        """Points that differ in the seed alone, in order."""
        found: dict[str, list[PointResult]] = {}
        for point in self.points:
            found.setdefault(point.group, []).append(point)
        return found

    @property
    def measured(self) -> list[str]:
        """Names of all figures, the compared one first."""
        names = [self.loss, *(name for point in self.points for name in point.values)]
        return list(dict.fromkeys(names))

    def mean(self, group: str, value: str) -> SeedMean:
        """A figure's mean over a group's finished points whose figure is a number."""
        found = [p.values[value] for p in self.groups[group] if value in p.values]
        return seed_mean([x for x in found if math.isfinite(x)])

    def to_json(self) -> str:
        """Everything, with the means written out; what is no number is null."""
        value = {
            "format": _FORMAT,
            "name": self.name,
            "base": self.base,
            "loss": self.loss,
            "axes": [asdict(axis) for axis in self.axes],
            "points": [asdict(point) for point in self.points],
            "groups": {
                group: {name: asdict(self.mean(group, name)) for name in self.measured}
                for group in self.groups
            },
        }
        return json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n"


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Mean and standard error of the mean, each value being one seed's."""
    count = len(values)
    if not count:
        return SeedMean(mean=math.nan, standard_error=math.nan, seeds=0)
    mean, error = sum(values) / count, math.nan
    if count > 1:
        error = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1) / count)
    return SeedMean(mean=mean, standard_error=error, seeds=count)


def collect(
    sweep: Sweep,
    points: Sequence[Point],
    states: Mapping[str, PointState],
    failures: Mapping[str, Failure],
    output: Path,
) -> SweepResults:
    """The results as points' folders have them; `failures` are those of this call."""
    return SweepResults(
        name=sweep.name,
        base=str(sweep.base),
        loss=sweep.loss,
        axes=sweep.axes,
        points=[_result(p, states[p.name], failures.get(p.name), output) for p in points],
    )


def _result(point: Point, state: PointState, failure: Failure | None, output: Path) -> PointResult:
    config = point.config
    reason = ""
    if state.finished:
        status = FINISHED
    elif failure is not None:
        last = failure.last_lines[-1:]
        status, reason = FAILED, ": ".join([failure.reason, *last])
    else:
        status = BEGUN if state.step else WAITING
    tokens = config.training.global_batch_size * config.data.sequence_length
    return PointResult(
        name=point.name,
        group=point.group,
        settings=point.settings,
        seed=point.seed,
        named=point.named,
        folder=str(point.folder.relative_to(output)),
        status=status,
        reason=reason,
        step=state.step,
        steps=state.steps,
        tokens=state.step * tokens,
        seconds=state.seconds,
        values=state.values,
    )


def read_results(folder: Path) -> SweepResults:
    """Reads what `to_json` wrote into a sweep's folder; UserError if it is something else."""
    path = folder / RESULTS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"its format is {data['format']!r}")
        points = []
        for row in data["points"]:
            values = {k: math.nan if v is None else float(v) for k, v in row["values"].items()}
            points.append(PointResult(**{**row, "values": values}))
        return SweepResults(
            name=data["name"],
            base=data["base"],
            loss=data["loss"],
            axes=tuple(
                Axis(keys=tuple(a["keys"]), values=tuple(map(tuple, a["values"])))
                for a in data["axes"]
            ),
            points=points,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no result of `ttt-megatron sweep` ({error}): run the sweep again"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also where several processes write it at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
