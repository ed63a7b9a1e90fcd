"""What goes on beside the outer loop, one concern a file."""

from pathlib import Path

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.callbacks.dashboard import Dashboard
from ttt_megatron.training.callbacks.drift import DriftAlarm
from ttt_megatron.training.callbacks.evaluation import ValidationLoss
from ttt_megatron.training.callbacks.events import EventLog
from ttt_megatron.training.callbacks.metrics_log import MetricsLog
from ttt_megatron.training.callbacks.plots import LossPlot
from ttt_megatron.training.callbacks.progress import ProgressBar
from ttt_megatron.training.callbacks.signals import StopOnSignal
from ttt_megatron.training.callbacks.slow_ranks import SlowRanks
from ttt_megatron.training.callbacks.tracking import MlflowTracking
from ttt_megatron.training.callbacks.watchdog import Watchdog


def build_callbacks(config: RunConfig, groups: Groups) -> list[Callback]:
    """The callbacks of this rank.

    The evaluation stands behind those that record steps, so that a step's figures come before its
    validation loss, and before the plot and the tracking, which take its results along at the end.
    """
    callbacks: list[Callback] = [StopOnSignal()]
    output, faults = Path(config.training.output), config.faults
    if faults.hang_minutes:
        callbacks.append(Watchdog(output, faults.hang_minutes * 60))
    callbacks.append(SlowRanks(config.training.log_interval, faults.slow_rank_ratio))
    if groups.is_main:
        if faults.drift_alarm is not None:
            callbacks.append(DriftAlarm(faults.drift_alarm))
        callbacks += [
            EventLog(output),
            MetricsLog(output),
            ProgressBar(config.training.log_interval, bar=config.tracking.progress),
        ]
    callbacks.append(ValidationLoss(config))
    if groups.is_main:
        callbacks.append(LossPlot(output))
        if config.tracking.mlflow:
            callbacks += [Dashboard(config), MlflowTracking(config)]
    return callbacks
