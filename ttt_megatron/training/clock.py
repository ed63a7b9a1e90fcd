"""How long a rank's own work takes, before it waits for others."""

import time
from collections.abc import Callable
from typing import Any

import torch


class PassesClock:
    """Seconds from a step's begin to the reduction of its gradients, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._stop = self._now()

    def start(self) -> None:
        """The passes begin."""
        self._start = self._stop = self._now()

    def stop(self) -> None:
        """The passes are over, or queued."""
        self._stop = self._now()

    def stopped_by(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which begins when the passes are over."""

        def stop_then_work(*args: Any, **kwargs: Any) -> Any:
            self.stop()
            return work(*args, **kwargs)

        return stop_then_work

    @property
    def seconds(self) -> float:
        """Of the last passes; waits for the device."""
        if self._cuda:
            self._stop.synchronize()
            milliseconds: float = self._start.elapsed_time(self._stop)
            return milliseconds / 1000
        return float(self._stop - self._start)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
