"""A discrete-event simulator: tasks on workers, each started when what it waits for is there.

A worker runs one task at a time, to its end. Of the tasks that are ready it takes the one of
lowest priority number. Tasks with a place in the worker's line start in that order alone; the
others fill its gaps.
"""

import heapq
from dataclasses import dataclass, field


@dataclass
class Task:
    """What one worker does in one go.

    `after` are (task, seconds): the task's end plus a transfer's time; `together` are tasks that
    must have started. `opens` takes one of the worker's places for live activations, `closes`
    gives it back at the end. `owes` leaves work for later, which `pays` does.
    """

    worker: int
    phase: str
    micro_batch: int
    shard: int
    seconds: float
    priority: tuple[int, ...] = ()
    in_line: bool = False
    after: list[tuple[int, float]] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    opens: bool = False
    closes: bool = False
    owes: bool = False
    pays: bool = False
    start: float = -1.0
    end: float = -1.0


@dataclass(frozen=True)
class Timeline:
    """A finished simulation, with the most live activations and the most debts of each worker."""

    tasks: list[Task]
    workers: int
    seconds: float
    peak_live: list[int]
    peak_debts: list[int]

    @property
    def work(self) -> float:
        """Seconds of work of all workers together."""
        return sum(task.seconds for task in self.tasks)

    @property
    def bubble(self) -> float:
        """Share of the workers' time that is spent waiting."""
        return max(0.0, 1 - self.work / (self.workers * self.seconds)) if self.seconds else 0.0


class DeadlockError(RuntimeError):
    """Tasks are left and none can start."""


class Simulation:
    """Tasks, added one by one; those of a worker's line in the order they are added.

    A worker with no free place opens nothing; one with `debts` debts pays before anything else.
    """

    def __init__(self, workers: int, places: int | None = None, debts: int | None = None) -> None:
        self.tasks: list[Task] = []
        self._workers = workers
        self._limits = places, debts

    def add(self, task: Task) -> int:
        """Adds a task; returns its number. Tasks it waits for may be added later."""
        self.tasks.append(task)
        return len(self.tasks) - 1

    def run(self) -> Timeline:
        """Runs all tasks; raises DeadlockError if some can never start."""
        return _Run(self.tasks, self._workers, *self._limits).run()


class _Run:
    def __init__(
        self, tasks: list[Task], workers: int, places: int | None, debts: int | None
    ) -> None:
        self.tasks, self.workers, self.places, self.debts = tasks, workers, places, debts
        self.waits = [len(t.after) + len(t.together) for t in tasks]
        self.on_end: list[list[tuple[int, float]]] = [[] for _ in tasks]
        self.on_start: list[list[int]] = [[] for _ in tasks]
        self.lines: list[list[int]] = [[] for _ in range(workers)]
        # Ready or not, the next one last.
        self.opening: list[list[int]] = [[] for _ in range(workers)]
        for number, task in enumerate(tasks):
            for other, delay in task.after:
                self.on_end[other].append((number, delay))
            for other in task.together:
                self.on_start[other].append(number)
            if task.in_line:
                self.lines[task.worker].append(number)
            elif task.opens:
                self.opening[task.worker].append(number)
        for opening in self.opening:
            opening.sort(key=lambda number: tasks[number].priority, reverse=True)
        self.head = [0] * workers
        self.ready: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(workers)]
        self.paying: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(workers)]
        self.busy = [False] * workers
        self.live = [0] * workers
        self.peak = [0] * workers
        self.owed = [0] * workers
        self.peak_owed = [0] * workers
        # (time, kind, task): kind 0 frees a worker, kind 1 is the arrival of something awaited.
        self.events: list[tuple[float, int, int]] = []
        self.now = 0.0

    def run(self) -> Timeline:
        left = len(self.tasks)
        touched = set(range(self.workers))
        for number, waits in enumerate(self.waits):
            if not waits:
                self._is_ready(number)
        while True:
            while touched:
                self._start_next(touched.pop(), touched)
            if not self.events:
                break
            self.now = self.events[0][0]
            while self.events and self.events[0][0] <= self.now + 1e-15:
                _, kind, number = heapq.heappop(self.events)
                if kind == 0:
                    left -= 1
                    self._ended(number, touched)
                else:
                    self._less_to_wait(number, touched)
        if left:
            raise DeadlockError(f"{left} of {len(self.tasks)} tasks cannot start")
        return Timeline(self.tasks, self.workers, self.now, self.peak, self.peak_owed)

    def _is_ready(self, number: int) -> None:
        task = self.tasks[number]
        if not (task.in_line or task.opens):
            heap = self.paying if task.pays else self.ready
            heapq.heappush(heap[task.worker], (task.priority, number))

    def _less_to_wait(self, number: int, touched: set[int]) -> None:
        self.waits[number] -= 1
        if not self.waits[number]:
            self._is_ready(number)
            touched.add(self.tasks[number].worker)

    def _ended(self, number: int, touched: set[int]) -> None:
        task = self.tasks[number]
        self.busy[task.worker] = False
        self.live[task.worker] -= task.closes
        self.owed[task.worker] -= task.pays
        touched.add(task.worker)
        for other, delay in self.on_end[number]:
            if delay:
                heapq.heappush(self.events, (self.now + delay, 1, other))
            else:
                self._less_to_wait(other, touched)

    def _choose(self, worker: int) -> int | None:
        line, head = self.lines[worker], self.head[worker]
        if head < len(line) and not self.waits[line[head]]:
            self.head[worker] += 1
            return line[head]
        ready, paying = self.ready[worker], self.paying[worker]
        if self.debts is not None and paying and self.owed[worker] >= self.debts:
            return heapq.heappop(paying)[1]
        heap = min((heap for heap in (ready, paying) if heap), default=None)
        opener = self._opener(worker)
        if opener is not None:
            number = self.opening[worker][opener]
            if heap is None or self.tasks[number].priority < heap[0][0]:
                return self.opening[worker].pop(opener)
        return None if heap is None else heapq.heappop(heap)[1]

    def _opener(self, worker: int) -> int | None:
        """Where in `opening` the first task stands that can start and leaves the earlier ones,
        which cannot yet, a place each: else later work could block them for ever.
        """
        opening = self.opening[worker]
        free = len(opening) if self.places is None else self.places - self.live[worker]
        for index in range(len(opening) - 1, max(-1, len(opening) - 1 - free), -1):
            if not self.waits[opening[index]]:
                return index
        return None

    def _start_next(self, worker: int, touched: set[int]) -> None:
        if self.busy[worker]:
            return
        number = self._choose(worker)
        if number is None:
            return
        task = self.tasks[number]
        task.start, task.end = self.now, self.now + task.seconds
        self.busy[worker] = True
        self.live[worker] += task.opens
        self.peak[worker] = max(self.peak[worker], self.live[worker])
        self.owed[worker] += task.owes
        self.peak_owed[worker] = max(self.peak_owed[worker], self.owed[worker])
        heapq.heappush(self.events, (task.end, 0, number))
        for other in self.on_start[number]:
            self._less_to_wait(other, touched)
