"""What a run does about what goes wrong in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ttt_megatron.config.setting import setting

SpikeAction = Literal["ignore", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What is noticed of numbers, ranks and disks that fail, and what follows."""

    max_skipped: int = setting(
        10,
        "Steps in a row that may be skipped, as their loss or gradient was not finite or the loss "
        "a spike, before the run ends.",
    )
    spikes: SpikeAction = setting(
        "ignore",
        "At a loss far above those before it. skip: make no update of that step; rewind: go back "
        "to the newest checkpoint and on with the data after the spike.",
    )
    spike_sigma: float = setting(
        6.0, "Standard deviations above the mean of the steps before that make a loss a spike."
    )
    spike_window: int = setting(128, "Steps before that a loss is compared with.")
    max_rewinds: int = setting(3, "Rewinds in all before the run ends at the next spike.")
    drift_alarm: float | None = setting(
        3.0,
        "Warn when the fast weights end a sequence farther than this from where they began it, in "
        "units of their own norm; null never does.",
    )
    save_attempts: int = setting(
        3,
        "Checkpoints in a row that may fail to be written before the run ends; the one after the "
        "last step may not.",
    )
    hang_minutes: float = setting(
        20.0,
        "Longest time without a step, an evaluation or a checkpoint, after which every process "
        "writes down where it stands and the run ends; 0 waits for ever.",
    )
    slow_rank_ratio: float = setting(
        1.5, "A process that takes this many times the median's time for its work is named."
    )


def fault_problems(faults: FaultsConfig) -> Iterator[str]:
    """What no such section can have, a sentence each."""
    for name in ("max_skipped", "spike_sigma", "spike_window", "save_attempts", "slow_rank_ratio"):
        if getattr(faults, name) <= 0:
            yield f"faults.{name} = {getattr(faults, name)} must be greater than 0"
    if faults.drift_alarm is not None and faults.drift_alarm <= 0:
        yield (
            f"faults.drift_alarm = {faults.drift_alarm} must be greater than 0; null turns it off"
        )
    for name in ("hang_minutes", "max_rewinds"):
        if getattr(faults, name) < 0:
            yield f"faults.{name} = {getattr(faults, name)} must not be negative"
    if faults.spike_window == 1:
        yield (
            f"faults.spike_window = {faults.spike_window} must be at least 2: one step has no "
            f"standard deviation"
        )
    if 0 < faults.slow_rank_ratio <= 1:
        yield (
            f"faults.slow_rank_ratio = {faults.slow_rank_ratio} must be greater than 1: half of "
            f"the processes take longer than the median"
        )
