"""The share of time that ranks wait in real training steps, beside the simulated one.

    python tools/measure_bubble.py
    python tools/measure_bubble.py --layout context=2,context_order=zigzag --micro-batches 1 2 4
    python tools/measure_bubble.py --layout pipeline=2 --steps 8 data.sequence_length=4096

Processes train a small model with tracing on. From the trace of every step come the share of time
that ranks wait and the seconds of each pass, waits taken out; with these seconds the simulator runs
the order of passes that training takes: once with every pass as long as its kind takes on average,
once with each as long as it took. What is left then is no matter of the schedule. Shown are medians
over the steps after the first, differences in absolute shares.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

from plot_trace import read_traces
from small_training import small_data, small_run

from ttt_megatron.config import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.launcher import available_cpus, launch
from ttt_megatron.planning.schedules import PhaseSeconds, simulate
from ttt_megatron.planning.simulator import Simulation, Task, Timeline

LAYOUTS = ("context=2", "context=2,context_order=zigzag", "pipeline=2")
PASSES = {
    "prefix forward": "prefix_forward",
    "suffix forward": "suffix_forward",
    "suffix backward": "suffix_backward",
    "prefix backward": "prefix_backward",
    "suffix weights": "suffix_weights",
    # Of a zigzag part or a pipeline stage.
    "apart backward": "prefix_backward",
}
Span = tuple[str, float, float]
Pass = tuple[str, int, int]
"""Phase, micro-batch, shard."""


def _train(config: RunConfig) -> None:
    """One rank of a traced run, with spans for backward passes that end in no suffix."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from ttt_megatron.parallel.context_tasks import PartPasses
    from ttt_megatron.tracing import span
    from ttt_megatron.training.run import run_training
    from ttt_megatron.training.trainer import Trainer

    prefix_backward, backward_step = PartPasses.prefix_backward, schedules.backward_step

    def of_part(passes: Any, micro_batch: int, part: int) -> None:
        with span("apart backward"):
            prefix_backward(passes, micro_batch, part)

    def of_stage(*args: Any) -> Any:
        if parallel_state.is_pipeline_last_stage():
            return backward_step(*args)
        with span("apart backward"):
            return backward_step(*args)

    with (
        patch.object(PartPasses, "prefix_backward", of_part),
        patch.object(schedules, "backward_step", of_stage),
        patch.object(Trainer, "save", lambda trainer: None),
    ):
        run_training(config, fresh=True)


def steps_of(spans: dict[int, list[Span]]) -> Iterator[dict[int, list[Span]]]:
    """The passes and waits of each step, which an update ends."""
    ends = {
        rank: [start for name, start, _ in rows if name == "optimizer"]
        for rank, rows in spans.items()
    }
    for step in range(min(map(len, ends.values()))):
        yield {
            rank: [
                row
                for row in rows
                if (ends[rank][step - 1] if step else 0.0) <= row[1] < ends[rank][step]
                and row[0] != "optimizer"
            ]
            for rank, rows in spans.items()
        }


def passes_of(rows: Sequence[Span]) -> list[tuple[str, float]]:
    """A rank's passes in order: phase, and milliseconds without the waits inside."""
    waits = [(start, length) for name, start, length in rows if name.startswith("wait")]
    # Where a prefix's backward pass is one apart, the span in the suffix's is empty.
    apart = any(name == "apart backward" for name, _, _ in rows)
    found = []
    for name, start, length in rows:
        if name in PASSES and not (apart and name == "prefix backward"):
            inside = [took for begin, took in waits if start <= begin < start + length]
            found.append((PASSES[name], length - sum(inside)))
    return found


def replay(
    timeline: Timeline, orders: list[list[Pass]], seconds: dict[tuple[int, Pass], float]
) -> Timeline:
    """The same tasks in each worker's given order, with lengths by worker and pass."""
    place = {(w, one): index for w, order in enumerate(orders) for index, one in enumerate(order)}

    def key(task: Task) -> tuple[int, Pass]:
        return task.worker, (task.phase, task.micro_batch, task.shard)

    numbers = range(len(timeline.tasks))
    # What the order does not name takes no time and comes when it can.
    order = sorted(numbers, key=lambda number: place.get(key(timeline.tasks[number]), -1))
    new = {number: index for index, number in enumerate(order)}
    simulation = Simulation(timeline.workers)
    for task in (timeline.tasks[number] for number in order):
        simulation.add(
            replace(
                task,
                seconds=seconds.get(key(task), 0.0),
                in_line=key(task) in place,
                opens=False,
                after=[(new[other], delay) for other, delay in task.after],
                together=[new[other] for other in task.together],
            )
        )
    return simulation.run()


def library_order(config: RunConfig, micro_batches: int) -> tuple[Timeline, list[list[Pass]]]:
    """The tasks of a step, and the order in which each worker takes its own in training."""
    from ttt_megatron.parallel.context_schedule import one_forward_one_backward
    from ttt_megatron.parallel.context_tasks import DEBTS, SHARES, zigzag_order

    ranks, stages = config.parallel.context, config.parallel.pipeline
    if config.parallel.context_order == "zigzag":
        timeline = simulate("zigzag", [SHARES], ranks, micro_batches, debts=DEBTS)
        every = [zigzag_order(micro_batches, ranks, rank) for rank in range(ranks)]
        return timeline, [[(p.kind, p.micro_batch, p.part) for p in own] for own in every]
    before = PhaseSeconds(prefix_forward=0.1, prefix_backward=0.2)
    parts = [*[before] * (stages - 1), SHARES.joined()]
    orders = []
    for stage in range(stages):
        for rank in range(ranks):
            own: list[Pass] = []
            suffix = stage == stages - 1

            def forward(m: int, own: list = own, rank: int = rank, suffix: bool = suffix) -> None:
                own.extend([("prefix_forward", m, rank), ("suffix_forward", m, rank)][: 1 + suffix])

            def backward(
                m: int, _: None, own: list = own, rank: int = rank, suffix: bool = suffix
            ) -> None:
                passes = [("suffix_backward", m, rank), ("prefix_backward", m, rank)]
                own.extend(passes[not suffix :])

            ahead = ranks - 1 - rank + stages - 1 - stage
            one_forward_one_backward(micro_batches, ahead, forward, backward)
            orders.append(own)
    return simulate("1f1b", parts, ranks, micro_batches), orders


def measure(config: RunConfig) -> list[tuple[float, float, float]]:
    """Waiting shares of every step but the first, of all ranks: measured, simulated with passes of
    average length, simulated with each pass's own.
    """
    launch(_train, (config,), config.parallel.world_size)
    training, parallel = config.training, config.parallel
    number = training.global_batch_size // (training.micro_batch_size * parallel.data)
    found = []
    for step in list(steps_of(read_traces(Path(training.output) / "trace")))[1:]:
        every = [row for rows in step.values() for row in rows if row[0] in PASSES]
        length = max(s + d for _, s, d in every) - min(s for _, s, _ in every)
        timeline, orders = library_order(config, number)
        own: dict[tuple[int, Pass], float] = {}
        for rank, rows in step.items():
            taken = passes_of(rows)
            if [phase for phase, _ in taken] != [phase for phase, _, _ in orders[rank]]:
                raise UserError(f"rank {rank} took other passes than expected: {taken}")
            own |= {(rank, p): took for p, (_, took) in zip(orders[rank], taken, strict=True)}
        waited = 1 - sum(own.values()) / (len(step) * length)
        simulated = [replay(timeline, orders, s).bubble for s in (_averaged(own, config), own)]
        found.append((waited, simulated[0], simulated[1]))
    return found


def _averaged(
    seconds: dict[tuple[int, Pass], float], config: RunConfig
) -> dict[tuple[int, Pass], float]:
    """Every pass as long as those of its phase on its stage."""

    def kind(rank: int, one: Pass) -> tuple[int, str]:
        return rank // config.parallel.context, one[0]

    alike: dict[tuple[int, str], list[float]] = defaultdict(list)
    for (rank, one), took in seconds.items():
        alike[kind(rank, one)].append(took)
    return {(rank, one): mean(alike[kind(rank, one)]) for rank, one in seconds}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layout",
        action="append",
        metavar="KEY=N,...",
        help=f"keys of the recipe's parallel section; can be repeated (default: {LAYOUTS})",
    )
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5, help="steps to measure (default: 5)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    arguments = parser.parse_args()
    print(f"{available_cpus()} CPUs, load {os.getloadavg()[0]:.1f} before")
    print(
        f"{'layout':32s} {'M':>3s} measured  average passes (difference)  own passes (difference)"
    )
    try:
        with small_data() as folder:
            for layout in arguments.layout or LAYOUTS:
                for number in arguments.micro_batches:
                    settings = [f"parallel.{item}" for item in layout.split(",")]
                    settings += [f"training.global_batch_size={number}", "training.trace=true"]
                    settings += [f"training.steps={arguments.steps + 1}", *arguments.overrides]
                    rows = measure(small_run(folder, settings))
                    waited, alike, own = (median(column) for column in zip(*rows, strict=True))
                    print(
                        f"{layout:32s} {number:3d} {waited:8.3f} {alike:15.3f} "
                        f"({waited - alike:+.3f}) {own:11.3f} ({waited - own:+.3f})",
                        flush=True,
                    )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        print(f"load {os.getloadavg()[0]:.1f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
