"""What each run is and took: parameters, tokens, FLOPs, time, last losses."""

from pathlib import Path

from ttt_megatron.baselines.counts import count_with_mixers
from ttt_megatron.evaluation.formatting import mean_cell
from ttt_megatron.evaluation.statistics import Mean
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.planning.mixers import knows_mixers
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.reporting.runs import Group, ReportedRun
from ttt_megatron.reporting.section import Section
from ttt_megatron.sweeps.results import seed_mean
from ttt_megatron.training.flops import model_flops_per_token
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics

_TEXT = (
    "Model FLOPs are those of a plain step of the same architecture; those executed, inner steps "
    "and what is computed again included, are as `ttt-megatron plan` counts them. Wall time is "
    "that of the steps. "
    "A run that starts from another's weights counts its own steps alone. Of several seeds, time "
    "is one run's on average, and losses have ± standard error over seeds."
)
_LOSSES = {"loss": "training loss, last tenth", "validation_loss": "validation loss"}


def facts_section(groups: list[Group]) -> Section:
    """A row for every group of seeds."""
    header = ["run", "seeds", "starts from", "parameters", "of which fast", "steps", "tokens"]
    header += ["model FLOPs", "FLOPs executed", "wall time", *_LOSSES.values()]
    rows = [_row(group) for group in groups]
    return Section(title="Runs", text=_TEXT, grids=[Grid(title="", header=header, rows=rows)])


def _row(group: Group) -> list[str]:
    run = group.runs[0]
    config, counts = run.config, count_with_mixers(run.config.model)
    tokens = run.step * config.training.global_batch_size * config.data.sequence_length
    model_flops = tokens * model_flops_per_token(config.model, config.data.sequence_length)
    seeds = ", ".join(str(each.config.training.seed) for each in group.runs)
    logs = [read_metrics(each.folder / METRICS_FILE) for each in group.runs]
    seconds = [sum(row.get("seconds") or 0.0 for row in rows) for rows in logs]
    return [
        group.label,
        seeds,
        "" if config.training.init_from is None else Path(config.training.init_from).name,
        f"{counts.total:,}",
        f"{counts.prime:,}",
        f"{run.step:,}",
        f"{tokens:,}",
        f"{model_flops:.3g}",
        _all_flops(run),
        _duration(sum(seconds) / len(seconds)),
        *(_loss([_last(rows, name) for rows in logs]) for name in _LOSSES),
    ]


def _all_flops(run: ReportedRun) -> str:
    """Those that a run's steps take in all; "-" for mixers that plans do not count."""
    if not knows_mixers(run.config.model):
        return "-"
    sequences = run.step * run.config.training.global_batch_size
    return f"{sequences * step_work(run.config, tile=1).total.flops:.3g}"


def _last(rows: list[dict[str, float]], name: str) -> float | None:
    """The last value; of training's losses, which scatter, the mean of the last tenth."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return None
    last = values[-max(1, len(values) // 10) :] if name == "loss" else values[-1:]
    return sum(last) / len(last)


def _loss(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    mean = seed_mean(known)
    return mean_cell(Mean(mean.mean, mean.standard_error, mean.seeds, 0))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
