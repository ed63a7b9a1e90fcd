"""A sweep from its file to its tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_megatron.sweeps.job import make_job
from ttt_megatron.sweeps.points import Point
from ttt_megatron.sweeps.progress import SweepProgress
from ttt_megatron.sweeps.results import SweepResults, collect
from ttt_megatron.sweeps.runner import Failure, run_jobs
from ttt_megatron.sweeps.spec import Sweep
from ttt_megatron.sweeps.state import PointState, read_state
from ttt_megatron.sweeps.tables import write_results
from ttt_megatron.sweeps.tracking import log_results, mark_failed, track_points


@dataclass(frozen=True, kw_only=True)
class SweepEnd:
    """How a call ended: all points' results, what failed in it, the signal that ended it if any.

    `tracked` says where MLflow has them.
    """

    results: SweepResults
    files: list[Path]
    failures: dict[str, Failure]
    stop_signal: int | None
    tracked: str | None


def read_states(
    points: Sequence[Point], sweep: Sweep, others: Sequence[Point] = ()
) -> dict[str, PointState]:
    """Every point's state, by name; that of `others` by a quick look."""
    states = {point.name: read_state(point, sweep, quick=True) for point in others}
    return states | {point.name: read_state(point, sweep) for point in points}


def run_sweep(
    sweep: Sweep, points: Sequence[Point], chosen: Sequence[Point], output: Path, jobs: int
) -> SweepEnd:
    """Runs what is not finished of the `chosen` points, `jobs` at a time, and writes tables of all.

    `points` are resolved (`resolve_points`). Raises UserError as `run_jobs` does.
    """
    output.mkdir(parents=True, exist_ok=True)
    points = track_points(points, sweep, output)
    names = {point.name for point in chosen}
    own = [point for point in points if point.name in names]
    others = [point for point in points if point.name not in names]
    states = read_states(own, sweep, others)
    todo = [make_job(p, states[p.name], sweep, output) for p in own if not states[p.name].finished]
    # The table is there from the start, so that a sweep under way can be looked at.
    write_results(collect(sweep, points, states, {}, output), output)
    with SweepProgress(own, states) as progress:
        ended = run_jobs(todo, jobs, progress)
    states = read_states(own, sweep, others)
    mark_failed(point for point in own if point.name in ended.failures)
    results = collect(sweep, points, states, ended.failures, output)
    files = write_results(results, output)
    finished = all(state.finished for state in states.values())
    tracked = log_results(output, _best(results), files, finished=finished)
    return SweepEnd(
        results=results,
        files=files,
        failures=ended.failures,
        stop_signal=ended.stop_signal,
        tracked=tracked,
    )


def _best(results: SweepResults) -> dict[str, float]:
    means = [results.mean(group, results.loss) for group in results.groups]
    known = [mean.mean for mean in means if mean.seeds]
    return {f"lowest_{results.loss}": min(known)} if known else {}
