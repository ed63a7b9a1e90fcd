"""Which processes hold up the others."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

# So often in a row must a rank be slow to be named: once is an accident.
_TIMES = 3
_PROBE_SIZES = {"cpu": 256, "cuda": 4096}
_PROBE_ROUNDS = 4
# Beneath this the clock and the scheduler are what is measured.
_LEAST_SECONDS = 5e-3
_WORK = {
    "passes": "its passes before the gradients are reduced",
    "data": "waiting for data",
    "probe": "a fixed piece of arithmetic",
}


@dataclass(frozen=True, kw_only=True)
class Times:
    """One rank's seconds: a step's passes and waits for data, means since the last look, and the
    same product of matrices on every rank."""

    host: str
    passes: float
    data: float
    probe: float


class SlowRanks(Callback):
    """Compares the ranks' times every `interval` steps and names those that stay slow.

    All ranks wait for the slowest, so that whole steps take all of them equally long. What is
    compared is the time from a step's begin to the reduction of its gradients (the ranks of one
    replica share it), the wait for data, and a fixed piece of arithmetic, which tells the ranks of
    a replica apart. A rank is named when it has taken `ratio` times the median three looks in a
    row, and again when it has recovered in between.
    """

    def __init__(self, interval: int, ratio: float) -> None:
        self._interval = interval
        self._ratio = ratio
        self._records: list[StepRecord] = []
        self._slow: dict[tuple[int, str], int] = {}

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Collective, every `interval` steps."""
        groups = trainer.parts.groups
        if groups.world_size == 1:
            return
        self._records.append(record)
        if record.step % self._interval:
            return
        own = Times(
            host=socket.gethostname(),
            passes=statistics.fmean(r.passes_seconds for r in self._records),
            data=statistics.fmean(r.data_seconds for r in self._records),
            probe=_probe(groups.device),
        )
        self._records = []
        times: list[Times] = groups.gather_objects(own)
        if groups.is_main:
            for line in self.look(times):
                trainer.tell("slow", line)

    def look(self, times: Sequence[Times]) -> list[str]:
        """A sentence for each rank, in the order of ranks, that has now been slow often enough."""
        told = []
        for rank, own in enumerate(times):
            for name, what in _WORK.items():
                seconds, median = getattr(own, name), _median(times, name)
                count = self._slow.get((rank, name), 0)
                slow = seconds > self._ratio * max(median, _LEAST_SECONDS)
                self._slow[rank, name] = count + 1 if slow else 0
                if slow and count + 1 == _TIMES:
                    told.append(
                        f"rank {rank} on {own.host} takes {1e3 * seconds:.0f} ms for {what}, the "
                        f"median rank {1e3 * median:.0f} ms: look at that machine's clocks, "
                        f"temperature, disks and other work"
                    )
        return told


def _median(times: Sequence[Times], name: str) -> float:
    return statistics.median_low([getattr(one, name) for one in times])


def _probe(device: torch.device) -> float:
    """Seconds of a few products of matrices, after one that warms up."""
    size = _PROBE_SIZES[device.type]
    matrix = torch.ones(size, size, device=device)
    start = 0.0
    for turn in range(_PROBE_ROUNDS + 1):
        if turn == 1:
            _wait(device)
            start = time.perf_counter()
        matrix = (matrix @ matrix).clamp_(-1, 1)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
