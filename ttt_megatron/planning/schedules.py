"""The schedules of a step as tasks: context-parallel ranks and pipeline stages.

A worker is one rank of one pipeline stage. Every sequence (micro-batch) is cut into shards. The
suffix goes from shard to shard: forwards with the fast weights, backwards with their cotangent.
The prefix of a shard runs beside that of its left neighbour, whose keys and values it reads.
"""

from dataclasses import dataclass
from typing import Literal

from ttt_megatron.planning.simulator import Simulation, Task, Timeline

Schedule = Literal["gpipe", "1f1b", "zigzag"]

# The priority schedule: what other ranks wait for comes first.
PRIORITY = {
    "suffix_backward": 0,
    "suffix_forward": 1,
    "recompute": 2,
    "prefix_forward": 3,
    "prefix_backward": 4,
    "suffix_weights": 5,
    "prefix_weights": 5,
}


@dataclass(frozen=True, kw_only=True)
class PhaseSeconds:
    """Seconds of one micro-batch's whole sequence in every phase, on the ranks of one stage.

    `recompute` is the part of the suffix's backward pass that can run before the cotangent comes,
    the `weights` phases the parts nothing waits for.
    """

    prefix_forward: float = 0.0
    prefix_backward: float = 0.0
    prefix_weights: float = 0.0
    suffix_forward: float = 0.0
    recompute: float = 0.0
    suffix_backward: float = 0.0
    suffix_weights: float = 0.0

    @property
    def total(self) -> float:
        """All phases."""
        return sum(vars(self).values())

    @property
    def forward(self) -> float:
        """Both forward phases."""
        return self.prefix_forward + self.suffix_forward

    def joined(self) -> "PhaseSeconds":
        """The same with backward passes in one piece."""
        return PhaseSeconds(
            prefix_forward=self.prefix_forward,
            prefix_backward=self.prefix_backward + self.prefix_weights,
            suffix_forward=self.suffix_forward,
            suffix_backward=self.recompute + self.suffix_backward + self.suffix_weights,
        )


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Seconds from one worker to the next: fast weights and KV, their cotangents, hidden states."""

    relay_forward: float = 0.0
    relay_backward: float = 0.0
    boundary: float = 0.0


def simulate(
    schedule: Schedule,
    stages: list[PhaseSeconds],
    context: int,
    micro_batches: int,
    transfers: Transfers | None = None,
    places: int | None = None,
    halo: bool = True,
    debts: int | None = None,
) -> Timeline:
    """Runs a step of `micro_batches` sequences.

    `stages` are the pipeline's parts in order. `places` limits the shards a worker may have live;
    None allows two whole sequences. Without `halo` a shard's prefix does not wait for its
    neighbour's to start: perfect overlap. Zigzag shards take one stage; `debts` limits the
    shards whose slow weights' gradients a worker may put off, those of prefix and suffix counted
    apart where both have such a phase.
    """
    transfers = transfers or Transfers()
    if schedule == "zigzag":
        if len(stages) != 1:
            raise ValueError("zigzag shards take one pipeline stage")
        return _zigzag(stages[0], context, micro_batches, transfers, places, halo, debts)
    return _in_order(schedule, stages, context, micro_batches, transfers, places, halo)


class _Builder:
    """Adds tasks and finds them again by (phase, stage, micro-batch, shard)."""

    def __init__(
        self, workers: int, places: int | None, halo: bool, debts: int | None = None
    ) -> None:
        self.halo = halo
        self.simulation = Simulation(workers, places, debts)
        self.known: dict[tuple[str, int, int, int], int] = {}
        self.wanted: list[tuple[int, tuple[str, int, int, int], float | None]] = []

    def add(self, task: Task, stage: int = 0) -> int:
        number = self.simulation.add(task)
        self.known[task.phase, stage, task.micro_batch, task.shard] = number
        return number

    def wait(
        self, number: int, phase: str, stage: int, micro_batch: int, shard: int, delay: float = 0.0
    ) -> None:
        """The task waits for the end of another, which may be added later or not at all."""
        self.wanted.append((number, (phase, stage, micro_batch, shard), delay))

    def beside(self, number: int, phase: str, stage: int, micro_batch: int, shard: int) -> None:
        """The task, which reads a neighbour's halo, starts no earlier than the neighbour's."""
        if self.halo:
            self.wanted.append((number, (phase, stage, micro_batch, shard), None))

    def run(self) -> Timeline:
        for number, key, delay in self.wanted:
            other = self.known.get(key)
            if other is None:
                continue
            if delay is None:
                self.simulation.tasks[number].together.append(other)
            else:
                self.simulation.tasks[number].after.append((other, delay))
        return self.simulation.run()


def _zigzag(
    seconds: PhaseSeconds,
    context: int,
    micro_batches: int,
    transfers: Transfers,
    places: int | None,
    halo: bool,
    debts: int | None,
) -> Timeline:
    """Rank r holds shards r and 2R−1−r of every sequence; all tasks by priority."""
    shards = 2 * context
    builder = _Builder(context, 2 * shards if places is None else places, halo, debts)
    part = {phase: value / shards for phase, value in vars(seconds).items()}
    for m in range(micro_batches):
        for s in range(shards):
            _zigzag_shard(builder, transfers, context, part, m, s)
    return builder.run()


def _zigzag_shard(
    builder: _Builder,
    transfers: Transfers,
    context: int,
    seconds: dict[str, float],
    m: int,
    s: int,
) -> None:
    """Adds a shard's tasks: `seconds` are those of its phases."""

    def task(phase: str) -> Task:
        rank = min(s, 2 * context - 1 - s)
        new = Task(rank, phase, m, s, seconds[phase], (PRIORITY[phase], m, s))
        builder.add(new)
        return new

    def after(phase: str, shard: int = s, delay: float = 0.0) -> None:
        """The newest task waits for this one."""
        builder.wait(len(builder.simulation.tasks) - 1, phase, 0, m, shard, delay)

    def beside(phase: str, shard: int) -> None:
        builder.beside(len(builder.simulation.tasks) - 1, phase, 0, m, shard)

    # Shards R−1 and R lie on the same rank: nothing is sent between them.
    task("prefix_forward").opens = True
    beside("prefix_forward", s - 1)
    task("suffix_forward")
    after("prefix_forward")
    after("suffix_forward", s - 1, 0.0 if s == context else transfers.relay_forward)
    task("recompute")
    after("suffix_forward")
    task("suffix_backward").owes = True
    after("recompute")
    after("suffix_backward", s + 1, 0.0 if s == context - 1 else transfers.relay_backward)
    task("suffix_weights").pays = True
    after("suffix_backward")
    prefix_owes = seconds["prefix_weights"] > 0
    task("prefix_backward").owes = prefix_owes
    after("suffix_backward")
    beside("prefix_backward", s + 1)
    new = task("prefix_weights")
    new.closes, new.pays = True, prefix_owes
    after("prefix_backward")
    after("suffix_weights")


def _in_order(
    schedule: Schedule,
    stages: list[PhaseSeconds],
    context: int,
    micro_batches: int,
    transfers: Transfers,
    places: int | None,
    halo: bool,
) -> Timeline:
    """Contiguous shards, one a rank; forwards and backwards in GPipe's or 1F1B's order.

    In 1F1B order on one stage, prefix forwards of later micro-batches fill a rank's waits.
    """
    last = len(stages) - 1
    fills = schedule == "1f1b" and last == 0
    if fills and places is None:
        places = 2 * context
    builder = _Builder(len(stages) * context, places if fills else None, halo)
    for stage, whole in enumerate(stages):
        seconds = whole.joined()
        for rank in range(context):
            ahead = micro_batches
            if schedule == "1f1b":
                ahead = min(last - stage + context - rank, places or micro_batches, micro_batches)
            worker = _Worker(builder, transfers, stage, last, rank, context, fills, seconds)
            for m in range(ahead):
                worker.forward(m)
            for m in range(micro_batches):
                worker.backward(m)
                if m + ahead < micro_batches:
                    worker.forward(m + ahead)
    return builder.run()


@dataclass
class _Worker:
    """Adds the tasks of one rank of one stage, in its order."""

    builder: _Builder
    transfers: Transfers
    stage: int
    last: int
    rank: int
    context: int
    fills: bool
    seconds: PhaseSeconds

    def _task(self, phase: str, m: int, opens: bool = False, closes: bool = False) -> int:
        worker = self.stage * self.context + self.rank
        in_line = not (self.fills and phase == "prefix_forward")
        length = getattr(self.seconds, phase) / self.context
        task = Task(worker, phase, m, self.rank, length, (m,), in_line)
        task.opens, task.closes = opens, closes
        return self.builder.add(task, self.stage)

    def forward(self, m: int) -> None:
        """A micro-batch's forward pass."""
        builder, stage, rank = self.builder, self.stage, self.rank
        number = self._task("prefix_forward", m, opens=True)
        builder.beside(number, "prefix_forward", stage, m, rank - 1)
        builder.wait(number, "prefix_forward", stage - 1, m, rank, self.transfers.boundary)
        if stage == self.last:
            number = self._task("suffix_forward", m)
            builder.wait(number, "prefix_forward", stage, m, rank)
            hop = self.transfers.relay_forward
            builder.wait(number, "suffix_forward", stage, m, rank - 1, hop)

    def backward(self, m: int) -> None:
        """A micro-batch's backward pass."""
        builder, stage, rank = self.builder, self.stage, self.rank
        if stage == self.last:
            number = self._task("suffix_backward", m)
            builder.wait(number, "suffix_forward", stage, m, rank)
            hop = self.transfers.relay_backward
            builder.wait(number, "suffix_backward", stage, m, rank + 1, hop)
        number = self._task("prefix_backward", m, closes=True)
        builder.beside(number, "prefix_backward", stage, m, rank + 1)
        builder.wait(number, "prefix_backward", stage + 1, m, rank, self.transfers.boundary)
