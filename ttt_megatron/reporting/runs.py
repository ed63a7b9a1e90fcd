"""What a report is about: runs, those that differ in the seed together; sweeps; benchmarks."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.bench.results import Report as BenchReport
from ttt_megatron.bench.results import read_report as read_bench
from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.results import FINISHED, RESULTS, SweepResults, read_results
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, read_config, read_info
from ttt_megatron.training.preflight import find_resumable

BENCH = "bench.json"
_SEED = "training.seed"
_START = "training.init_from"
# A run's place and name are its own, whatever the seed; and so is the order it reads in.
_OWN = ("name", _SEED, "data.seed", "training.output", _START)
_SEED_WORD = re.compile(r"[-_. ]?seed[-_=]?\d+$")


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run's folder: its newest complete checkpoint's step and settings."""

    label: str
    folder: Path
    checkpoint: Path
    step: int
    config: RunConfig

    @property
    def bench(self) -> Path | None:
        """A benchmark of its model that lies in its folder."""
        places = (self.folder / BENCH, self.folder / "bench" / BENCH)
        return next((path for path in places if path.is_file()), None)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in the seed alone, under one label."""

    label: str
    runs: tuple[ReportedRun, ...]


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """All that a report is about. `named` are the runs that were asked for by their folders."""

    groups: list[Group]
    sweeps: list[SweepResults]
    benches: dict[str, BenchReport]
    named: list[ReportedRun]

    @property
    def runs(self) -> list[ReportedRun]:
        """Every run."""
        return [run for group in self.groups for run in group.runs]


def find_subjects(words: Sequence[str]) -> Subjects:
    """What `[LABEL=]PATH` words name: runs' and sweeps' folders, and results of `bench`.

    Raises UserError for a path that is neither, two runs of one label, and for nothing at all.
    """
    runs: list[ReportedRun] = []
    sweeps: list[SweepResults] = []
    benches: dict[str, BenchReport] = {}
    named = []
    for word in words:
        label, _, text = word.rpartition("=")
        path = Path(text)
        bench = path if path.name == BENCH else path / BENCH
        if (path / RESULTS).is_file():
            sweep = read_results(path)
            sweeps.append(sweep)
            runs += _points(sweep, path)
        elif (path / CHECKPOINTS).is_dir():
            runs.append(_run(label, path))
            named.append(runs[-1])
        elif bench.is_file():
            benches[label or str(bench.parent)] = read_bench(bench)
        else:
            raise UserError(
                f"{text}: there is no such run; give a run's folder (training.output), a sweep's, "
                f"or a {BENCH}"
            )
    labels = [run.label for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two runs are called {label!r}: name them, LABEL=PATH")
    for run in runs:
        if run.bench is not None:
            benches[run.label] = read_bench(run.bench)
    return Subjects(groups=list(_groups(runs)), sweeps=sweeps, benches=benches, named=named)


def _run(label: str, folder: Path) -> ReportedRun:
    checkpoint = find_resumable(folder, quick=True)
    if checkpoint is None:
        raise UserError(f"{folder} holds no checkpoint yet: train it first, or leave it out")
    config = read_config(checkpoint)
    return ReportedRun(
        label=label or config.name,
        folder=folder,
        checkpoint=checkpoint,
        step=read_info(checkpoint).step,
        config=config,
    )


def _points(sweep: SweepResults, folder: Path) -> Iterator[ReportedRun]:
    for point in sweep.points:
        if point.status == FINISHED:
            yield _run(f"{sweep.name}-{point.name}", folder / point.folder)


def _groups(runs: Sequence[ReportedRun]) -> Iterator[Group]:
    """Runs of equal settings but for the seed; two of the same seed are not a group.

    A label leaves the seed out where it stands for one group all the same.
    """
    found: dict[tuple[Any, ...], list[ReportedRun]] = {}
    for run in runs:
        flat = to_flat(run.config)
        rest = [v for k, v in flat.items() if k not in _OWN and not k.startswith("tracking.")]
        # Each seed's later stage starts from its own earlier one.
        start = flat[_START] and _SEED_WORD.sub("", flat[_START])
        key: tuple[Any, ...] = (run.step, start, *rest)
        seeds = [other.config.training.seed for other in found.get(key, [])]
        if flat[_SEED] in seeds:
            key = (*key, run.folder)
        found.setdefault(key, []).append(run)
    labels = [members[0].label for members in found.values()]
    short = [_SEED_WORD.sub("", label) or label for label in labels]
    for members, label, name in zip(found.values(), labels, short, strict=True):
        alone = len(members) == 1 and short.count(name) > 1
        yield Group(label=label if alone else name, runs=tuple(members))
