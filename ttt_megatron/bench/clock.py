"""Timing: one thread's seconds on a CPU; CUDA events, around replayed graphs where possible.

Before every run on a GPU something larger than its cache is written, so that a case finds its
inputs in memory, as it does within a step.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ttt_megatron.bench.case import Case

# A run on a CPU is repeated within one sample until the sample takes about this long.
_SHORTEST_SAMPLE = 2e-3
_MOST_A_SAMPLE = 50
_GRAPH_WARMUPS = 3


@dataclass(kw_only=True)
class Timed:
    """A case that is ready to be timed, and its samples so far, in seconds."""

    case: Case
    clock: str
    repeats: int = 1
    replay: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    events: list[tuple[Any, Any]] = field(default_factory=list)


class CpuClock:
    """Seconds of this process, which runs on one thread, and seconds on the wall."""

    def ready(self, case: Case) -> Timed:
        """Warms a case up and finds how often it fits into a sample."""
        case.run(case.prepare())
        state = case.prepare()
        start = time.process_time()
        case.run(state)
        seconds = max(time.process_time() - start, 1e-9)
        repeats = min(_MOST_A_SAMPLE, max(1, round(_SHORTEST_SAMPLE / seconds)))
        return Timed(case=case, clock="seconds of one thread", repeats=repeats)

    def sample(self, timed: Timed) -> None:
        """Takes one more sample."""
        case = timed.case
        states = [case.prepare() for _ in range(timed.repeats)]
        wall, cpu = time.perf_counter(), time.process_time()
        for state in states:
            case.run(state)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        timed.seconds.append(cpu / timed.repeats)
        timed.wall_seconds.append(wall / timed.repeats)

    def finish(self, timed: Timed) -> None:
        """Nothing is outstanding."""


class CudaClock:
    """CUDA events on the current stream of `device`."""

    def __init__(self, device: torch.device, cold_cache: bool = True) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size if cold_cache else 0
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device=device)

    def ready(self, case: Case) -> Timed:
        """Warms a case up; captures it in a graph where it may be replayed."""
        for _ in range(2):
            case.run(case.prepare())
        torch.cuda.synchronize(self.device)
        if not case.replayable:
            return Timed(case=case, clock="CUDA events")
        try:
            return Timed(case=case, clock="CUDA graph", replay=self._capture(case))
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            why = str(error).strip().splitlines()[0]
            return Timed(case=case, clock=f"CUDA events (no graph: {why})")

    def _capture(self, case: Case) -> Callable[[], Any]:
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            # The backward pass runs on the stream of the forward pass: both on the captured one.
            state = case.prepare()
            for _ in range(_GRAPH_WARMUPS):
                case.run(state)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=stream):
            kept = case.run(state)

        def replay() -> Any:
            graph.replay()
            return state, kept

        return replay

    def sample(self, timed: Timed) -> None:
        """Queues one more run between two events."""
        case = timed.case
        state = None if timed.replay else case.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush.numel():
            self._flush.zero_()
        start.record()
        if timed.replay:
            timed.replay()
        else:
            case.run(state)
        end.record()
        timed.events.append((start, end))

    def finish(self, timed: Timed) -> None:
        """Waits, and reads all events."""
        torch.cuda.synchronize(self.device)
        timed.seconds += [start.elapsed_time(end) / 1e3 for start, end in timed.events]
        timed.events.clear()


Clock = CpuClock | CudaClock


def clock_for(device: torch.device, cold_cache: bool = True) -> Clock:
    """The device's clock."""
    return CudaClock(device, cold_cache) if device.type == "cuda" else CpuClock()


def free_memory(device: torch.device) -> None:
    """Gives back to a GPU what nobody holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
