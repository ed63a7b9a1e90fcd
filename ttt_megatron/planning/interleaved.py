"""Interleaved pipelines: every stage holds several parts of the model, taken in turn."""

from ttt_megatron.planning.schedules import PhaseSeconds
from ttt_megatron.planning.simulator import Simulation, Task, Timeline


def simulate_interleaved(
    parts: list[PhaseSeconds], stages: int, micro_batches: int, boundary: float = 0.0
) -> Timeline:
    """A step under megatron-core's interleaved 1F1B order.

    `parts` are in the model's order: part i lies on stage i mod `stages`; the last holds the
    suffix. The number of micro-batches must be a multiple of the number of stages.
    """
    turns, remainder = divmod(len(parts), stages)
    if remainder or micro_batches % stages:
        raise ValueError("parts and micro-batches must be multiples of the number of stages")
    simulation = Simulation(stages)
    forward: dict[tuple[int, int], int] = {}
    backward: dict[tuple[int, int], int] = {}
    seconds = [part.joined() for part in parts]

    def run_forward(stage: int, step: int) -> None:
        part, m = _position(step, stage, stages, turns)
        length = seconds[part].forward
        task = Task(stage, "prefix_forward", m, part, length, in_line=True, opens=True)
        if seconds[part].suffix_forward:
            task.phase = "suffix_forward"
        forward[part, m] = simulation.add(task)

    def run_backward(stage: int, step: int) -> None:
        turned, m = _position(step, 0, stages, turns)
        part = (turns - 1 - turned // stages) * stages + stage
        length = seconds[part].total - seconds[part].forward
        task = Task(stage, "prefix_backward", m, part, length, in_line=True, closes=True)
        if seconds[part].suffix_backward:
            task.phase = "suffix_backward"
        backward[part, m] = simulation.add(task)

    total = micro_batches * turns
    for stage in range(stages):
        warm = min(total, 2 * (stages - stage - 1) + (turns - 1) * stages)
        if micro_batches == stages:
            warm = total
        for step in range(warm):
            run_forward(stage, step)
        for step in range(total - warm):
            run_forward(stage, warm + step)
            run_backward(stage, step)
        for step in range(total - warm, total):
            run_backward(stage, step)
    _connect(simulation, forward, backward, len(parts), boundary)
    return simulation.run()


def _position(step: int, stage: int, stages: int, turns: int) -> tuple[int, int]:
    """(part, micro-batch) of a stage's step: groups of `stages` micro-batches, part after part."""
    group, within = divmod(step, stages * turns)
    turn, m = divmod(within, stages)
    return turn * stages + stage, group * stages + m


def _connect(
    simulation: Simulation,
    forward: dict[tuple[int, int], int],
    backward: dict[tuple[int, int], int],
    parts: int,
    boundary: float,
) -> None:
    for (part, m), number in forward.items():
        if part:
            simulation.tasks[number].after.append((forward[part - 1, m], boundary))
    for (part, m), number in backward.items():
        before = (forward[part, m], 0.0) if part == parts - 1 else (backward[part + 1, m], boundary)
        simulation.tasks[number].after.append(before)
