"""Jobs, a few at a time; one that fails stops no other; Ctrl-C ends all in good order."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ttt_megatron.errors import UserError
from ttt_megatron.parallel.launcher import available_cpus
from ttt_megatron.sweeps.job import Job, death_in_words
from ttt_megatron.sweeps.progress import SweepProgress

_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a point is not finished: its exit status in words, and its log's last lines."""

    reason: str
    last_lines: list[str]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of jobs: the failures by point, and the signal that ended them all, if any."""

    failures: dict[str, Failure]
    stop_signal: int | None


def run_jobs(jobs: Sequence[Job], at_once: int, progress: SweepProgress) -> Ended:
    """Runs jobs, `at_once` at a time, in their order. In the main thread alone.

    SIGINT and SIGTERM ask those that run to stop after their step; a second one kills them.

    Raises UserError if there are fewer GPUs than so many runs at once take.
    """
    places = environments(jobs, at_once)
    waiting, running = list(jobs), dict[int, Job]()
    failures: dict[str, Failure] = {}
    with _signals() as received:
        told = 0
        try:
            while waiting or running:
                for place in range(at_once):
                    if place not in running and waiting and not received:
                        running[place] = waiting.pop(0)
                        running[place].start(places[place])
                        progress.started(running[place].point)
                for place, job in list(running.items()):
                    status = job.poll()
                    if status is not None:
                        del running[place]
                        _ended(job, status, bool(received), failures, progress)
                if len(received) > told:
                    told, waiting = len(received), []
                    for job in running.values():
                        job.stop() if told == 1 else job.kill()
                progress.moved()
                time.sleep(_POLL_SECONDS)
        finally:
            for job in running.values():
                job.kill()
    return Ended(failures=failures, stop_signal=received[0] if received else None)


def _ended(
    job: Job, status: int, stopping: bool, failures: dict[str, Failure], progress: SweepProgress
) -> None:
    if status == 0 or stopping:
        progress.ended(job.point, "done" if status == 0 else "stopped")
        return
    words = death_in_words(status)
    failures[job.point.name] = Failure(reason=words, last_lines=job.last_lines())
    progress.ended(job.point, f"FAILED, {words}: {job.log}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the SIGINTs and SIGTERMs that came, in their order."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def environments(jobs: Sequence[Job], at_once: int) -> list[dict[str, str]]:
    """Variables for each of the runs at once: its share of the CPUs, and GPUs of its own."""
    processes = max((job.point.config.parallel.world_size for job in jobs), default=1)
    shared: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, available_cpus() // (at_once * processes)))
    devices = _devices() if any(j.point.config.training.device != "cpu" for j in jobs) else []
    if at_once == 1 or not devices:
        return [shared] * at_once
    return [{**shared, **own} for own in share_devices(devices, at_once, processes)]


def share_devices(devices: Sequence[str], at_once: int, processes: int) -> list[dict[str, str]]:
    """CUDA_VISIBLE_DEVICES for each of the runs at once; UserError if there are too few."""
    if len(devices) < at_once * processes:
        raise UserError(
            f"--jobs {at_once}: runs of {processes} processes need {at_once * processes} GPUs, and "
            f"there are {len(devices)}; run fewer at once"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + processes])}
        for first in range(0, at_once * processes, processes)
    ]


def _devices() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
