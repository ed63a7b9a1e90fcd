"""Runs groups one after the other: memory, failures, the time that is left, and what was found."""

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch

from ttt_megatron.bench.case import Case, Group, Missing
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.clock import Clock, Timed, clock_for, free_memory
from ttt_megatron.bench.memory import available_bytes, peak_bytes
from ttt_megatron.bench.results import MEASURED, Result

_FEWEST_ROUNDS = 3
# Seconds a group takes besides its runs, and seconds of guesses that are believed as they stand.
_OVERHEAD, _TRUST = 3.0, 15.0
_TOO_LATE = "the time budget is used up"


class Runner:
    """Measures groups on a device.

    budget: seconds for everything; groups and cases that begin after it are skipped, and rounds
    that would are left out down to three.
    """

    def __init__(
        self,
        device: torch.device,
        ceilings: Ceilings,
        *,
        budget: float | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self.device, self.ceilings, self.log = device, ceilings, log
        self._start = time.monotonic()
        self._budget = budget
        self._clocks: dict[bool, Clock] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return float("inf") if self._budget is None else self._budget - self.elapsed

    def run(self, groups: Sequence[Group], done: Callable[[list[Result]], None]) -> None:
        """Measures all; `done` gets each group's results as they come."""
        expected = [_OVERHEAD + group.seconds * (group.rounds + 3) for group in groups]
        begin, spent = self.elapsed, 0.0
        for number, group in enumerate(groups):
            rest = sum(expected[number:])
            # Guesses are corrected by how long earlier ones took; by little while these are few.
            slower = (self.elapsed - begin + _TRUST) / (spent + _TRUST)
            place = f"[{number + 1}/{len(groups)}] {group.section}"
            words = ", ".join(filter(None, (group.operation, group.shape, group.precision)))
            self.log(f"{place}: {words} ({self.elapsed:.0f} s, about {slower * rest:.0f} s left)")
            results = self.measure(group)
            for result in results:
                if result.status != MEASURED:
                    self.log(f"    {result.name}, {result.way}: {result.status}: {result.reason}")
            done(results)
            spent += expected[number]

    def measure(self, group: Group) -> list[Result]:
        """A result for every case of the group, whatever becomes of it."""
        if self.left <= 0:
            return [_whole(group, "skipped", _TOO_LATE)]
        there = available_bytes(self.device)
        if group.memory_bytes > there:
            reason = f"needs {_gib(group.memory_bytes)}, {_gib(there)} are free (estimated)"
            return [_whole(group, "out of memory", reason)]
        try:
            results = self._measure(group)
        except torch.OutOfMemoryError as error:
            results = [_whole(group, "out of memory", _first_line(error))]
        except Exception as error:
            # What cannot even be built is told of, and the rest goes on.
            reason = f"{type(error).__name__}: {_first_line(error)}"
            results = [_whole(group, "failed", reason)]
        free_memory(self.device)
        return results

    def _measure(self, group: Group) -> list[Result]:
        clock = self._clock(group.cold_cache)
        results: list[Result] = []
        timed: list[tuple[Timed, Result]] = []
        for case in group.build():
            result = _result(group, case)
            results.append(result)
            if isinstance(case, Case) and self.left <= 0:
                result.status, result.reason = "skipped", _TOO_LATE
            elif isinstance(case, Case):
                ready = self._ready(clock, case, result)
                if ready is not None:
                    timed.append((ready, result))
        self._take_rounds(clock, group, timed)
        for one, result in timed:
            self._fill(result, one)
        _relate(group, results)
        return results

    def _clock(self, cold_cache: bool) -> Clock:
        if cold_cache not in self._clocks:
            self._clocks[cold_cache] = clock_for(self.device, cold_cache)
        return self._clocks[cold_cache]

    def _ready(self, clock: Clock, case: Case, result: Result) -> Timed | None:
        """Warm, its memory measured; None if it cannot run, which the result then says."""
        try:
            result.peak_bytes = _peak(case, self.device) + case.own_bytes
            return clock.ready(case)
        except torch.OutOfMemoryError as error:
            result.status, result.reason = "out of memory", _first_line(error)
        except Exception as error:
            # A baseline that refuses is told of; anything else is, too, and the run goes on.
            result.status = "not possible" if case.is_baseline else "failed"
            result.reason = f"{type(error).__name__}: {_first_line(error)}"
        result.peak_bytes = None
        free_memory(self.device)
        return None

    def _take_rounds(
        self, clock: Clock, group: Group, timed: Iterable[tuple[Timed, Result]]
    ) -> None:
        ready = [one for one, _ in timed]
        for number in range(group.rounds):
            if self.left <= 0 and number >= _FEWEST_ROUNDS:
                break
            for one in ready:
                clock.sample(one)
            if not group.cold_cache or self._budget is not None:
                for one in ready:
                    clock.finish(one)
        for one in ready:
            clock.finish(one)

    def _fill(self, result: Result, timed: Timed) -> None:
        case = timed.case
        result.status, result.clock = MEASURED, timed.clock
        result.seconds = [s / case.count for s in timed.seconds]
        result.wall_seconds = [s / case.count for s in timed.wall_seconds]
        middle = median(result.seconds)
        if case.work is not None:
            result.flops, result.bytes = float(case.work.flops), float(case.work.bytes)
            result.floor = self.ceilings.floor(case.work, result.precision)
        if case.model_flops is not None:
            result.model_flops = case.model_flops
            result.mfu = case.model_flops / middle / self.ceilings.peak_rate(result.precision)


def _result(group: Group, case: Case | Missing) -> Result:
    result = _whole(group, "", "")
    result.name, result.way, result.settings = case.name, case.way, case.settings
    result.extra = dict(case.extra)
    if isinstance(case, Missing):
        result.status, result.reason = case.status, case.reason
    else:
        result.tokens = case.tokens
    return result


def _whole(group: Group, status: str, reason: str) -> Result:
    """A result that stands for all of the group."""
    return Result(
        section=group.section,
        operation=group.operation,
        shape=group.shape,
        precision=group.precision,
        name="all",
        way="",
        status=status,
        reason=reason,
    )


def _peak(case: Case, device: torch.device) -> int:
    """What a run allocates at most, its state not counted."""
    state = case.prepare()
    return peak_bytes(lambda: case.run(state), device)


def _relate(group: Group, results: list[Result]) -> None:
    """Ratios to the reference."""
    medians = {(one.name, one.way): one.median for one in results if one.median}
    for one in results:
        wanted = (group.reference_name or one.name, group.reference_way)
        base = medians.get(wanted)
        if one.median and base:
            one.ratio = one.median / base


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
