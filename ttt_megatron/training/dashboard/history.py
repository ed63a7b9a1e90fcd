"""A run's course, read from its folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.report import PositionReport, read_report
from ttt_megatron.planning.hardware import NAMED
from ttt_megatron.planning.units import compute_precision
from ttt_megatron.tracking.journal import EVENT, JOURNAL_FILE, TAGS, Record, read_records
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, list_checkpoints, read_config
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics
from ttt_megatron.training.preflight import find_resumable

_EVALUATION = Path("evaluation") / "by_position.json"


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """What a run's folder tells. `rows` as in the metrics log, by step; `restarts` and `saves` are
    steps; `peak_flops` all GPUs' together, None on a CPU or a GPU that is not known."""

    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    restarts: tuple[int, ...]
    saves: tuple[int, ...]
    tags: Mapping[str, str]
    peak_flops: float | None
    evaluation: PositionReport | None

    @property
    def step(self) -> int:
        """The last one done."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return float(sum(row.get("seconds") or 0.0 for row in self.rows))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure, where it has one."""
        pairs = [
            (int(row["step"]), float(row[name]))
            for row in self.rows
            if isinstance(row.get(name), int | float) and math.isfinite(row[name])
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_history(folder: Path, config: RunConfig | None = None) -> RunHistory:
    """Reads a run's folder; without `config`, its newest checkpoint tells it.

    Raises UserError if there is no checkpoint, or no step in the metrics log.
    """
    rows = read_metrics(folder / METRICS_FILE)
    if not rows:
        raise UserError(f"{folder} has no {METRICS_FILE} with a step: give a run's folder")
    if config is None:
        checkpoint = find_resumable(folder, quick=True)
        if checkpoint is None:
            raise UserError(f"{folder} holds no checkpoint that tells the run's settings")
        config = read_config(checkpoint)
    records, _ = read_records(folder / JOURNAL_FILE, 0)
    tags: dict[str, str] = {}
    for record in records:
        if record["kind"] == TAGS:
            tags |= record["values"]
    return RunHistory(
        folder=folder,
        config=config,
        rows=rows,
        restarts=_steps(records, ("resumed",)),
        saves=_steps(records, ("saved",)) or _saved(folder),
        tags=tags,
        peak_flops=_peak_flops(config, tags.get("gpu", "")),
        evaluation=_evaluation(folder / _EVALUATION),
    )


def _steps(records: list[Record], events: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(
        sorted({r["step"] for r in records if r["kind"] == EVENT and r["event"] in events})
    )


def _saved(folder: Path) -> tuple[int, ...]:
    """Steps of the checkpoints that are still there."""
    return tuple(int(p.name.rpartition("-")[2]) for p in list_checkpoints(folder / CHECKPOINTS))


def _peak_flops(config: RunConfig, gpu: str) -> float | None:
    name = gpu.lower()
    known = [hw for key, hw in NAMED.items() if key != "cpu" and key.partition("-")[0] in name]
    if not known:
        return None
    peak = known[0].flops(compute_precision(config)) * config.parallel.world_size
    return peak or None


def _evaluation(path: Path) -> PositionReport | None:
    try:
        return read_report(path) if path.is_file() else None
    except UserError:
        return None
