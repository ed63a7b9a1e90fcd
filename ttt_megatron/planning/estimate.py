"""What one layout costs: memory by kind, seconds a step, transfers, and every schedule's bubble."""

from dataclasses import dataclass, field, replace

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning import transfers as traffic
from ttt_megatron.planning.hardware import Hardware
from ttt_megatron.planning.interleaved import simulate_interleaved
from ttt_megatron.planning.layout import TURNS, Layout
from ttt_megatron.planning.memory import (
    StageMemory,
    stage_memory,
    stage_parameters,
    static_weights,
)
from ttt_megatron.planning.schedules import PhaseSeconds, Transfers, simulate
from ttt_megatron.planning.simulator import Timeline
from ttt_megatron.planning.stages import stage_blocks
from ttt_megatron.planning.static_work import WEIGHT_BYTES
from ttt_megatron.planning.step_work import StepWork, step_work
from ttt_megatron.planning.units import Work, compute_precision, in_float8

CHOSEN = ("in turn", "1f1b", "zigzag", "interleaved")
"""Schedules that training has; gpipe is shown for comparison."""
DEBTS = 1
"""Shards whose slow weights' gradients zigzag parts put off."""
ADAM_BYTES = 36
"""Bytes read and written a parameter: clip, both moments, the update."""


@dataclass(frozen=True, kw_only=True)
class ScheduleResult:
    """One schedule: its waiting share, its seconds, and the memory of its fullest process."""

    bubble: float
    seconds: float
    memory: dict[str, float]
    fits: bool

    @property
    def memory_bytes(self) -> float:
        """All kinds together."""
        return sum(self.memory.values())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout's costs. Bytes and FLOPs are a process's (the busiest one's), a step's."""

    layout: Layout
    schedule: str
    schedules: dict[str, ScheduleResult]
    prefix_blocks: list[int]
    flops: float
    step_flops: float
    transfers: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    @property
    def chosen(self) -> ScheduleResult:
        """The chosen schedule's result."""
        return self.schedules[self.schedule]

    @property
    def fits(self) -> bool:
        """Whether the chosen schedule fits into memory."""
        return self.chosen.fits

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, all processes together."""
        return self.tokens / self.step_seconds


class Estimator:
    """The costs of one layout of one run on given hardware."""

    def __init__(self, config: RunConfig, layout: Layout, hardware: Hardware) -> None:
        self.config = layout.applied(config)
        self.layout, self.hardware = layout, hardware
        self.links = traffic.links(layout, hardware)
        self.work = step_work(self.config)
        self.micro_batches = layout.micro_batches(config)
        self.turns = max(layout.virtual_pipeline, TURNS)
        self._cuts: dict[int, list[int]] = {}

    @property
    def _blocks(self) -> int:
        return self.work.prefix_blocks

    def _seconds(self, work: Work) -> float:
        """A sequence's work on the tensor-parallel group that holds all of its tokens."""
        gpu = self.hardware
        peak = gpu.flops(compute_precision(self.config))
        seconds = work.matmul / (peak * gpu.matmul_efficiency)
        if work.float8:
            seconds += work.float8 / (gpu.flops("fp8") * gpu.matmul_efficiency)
        seconds += work.attention / (peak * gpu.attention_efficiency)
        seconds += work.traffic / (gpu.memory_gbs * 1e9 * gpu.memory_efficiency)
        return seconds / self.layout.tensor

    def cut(self, parts: int | None = None) -> list[int]:
        """Prefix blocks of each stage, or of each of `parts` parts in turn, as a run cuts them."""
        stages = self.layout.pipeline
        number = parts or stages
        if number not in self._cuts:
            self._cuts[number] = stage_blocks(self.config, stages, number)
        return self._cuts[number]

    def stages(self, blocks: list[int], shards_a_rank: int = 1) -> list[PhaseSeconds]:
        """Seconds of a micro-batch's sequence in each part, tensor collectives and halo included.

        They are those of a rank times the context-parallel ranks, as the simulator wants them.
        """
        return [
            self._part(count, index == len(blocks) - 1, shards_a_rank)
            for index, count in enumerate(blocks)
        ]

    def _part(self, blocks: int, last: bool, shards_a_rank: int) -> PhaseSeconds:
        work, sequences = self.work, self.layout.micro_batch_size
        ranks = self.layout.context
        tensor = traffic.tensor_traffic(self.config, self.layout)
        entry = 1 if last else 0
        halo = traffic.halo_bytes(self.config, self.layout, shards_a_rank) / self.links.context
        reading = traffic.halo_layers(self.config, blocks, last)
        again = 2 if self.config.training.recompute_prefix else 1

        def seconds(of_block: Work, of_entry: Work) -> float:
            return self._seconds((of_block * blocks + of_entry * entry) * sequences)

        def reduced(load: tuple[float, int]) -> float:
            size, number = load
            return (size / self.links.tensor + number * traffic.LATENCY) if size else 0.0

        crossing = reduced(tensor.block) * blocks + reduced(tensor.entry) * entry
        beside = halo * reading
        suffix = {
            name: self._seconds(getattr(work, name) * sequences) + reduced(load) * ranks
            for name, load in (
                ("suffix_forward", tensor.suffix_forward),
                ("recompute", tensor.recompute),
                ("suffix_backward", tensor.suffix_backward),
                ("suffix_weights", (0.0, 0)),
            )
        }
        return PhaseSeconds(
            prefix_forward=seconds(work.block_forward, work.entry_forward)
            + (crossing + beside) * ranks,
            prefix_backward=seconds(work.block_backward, work.entry_backward)
            + (crossing * again + beside) * ranks,
            prefix_weights=seconds(work.block_weights, work.entry_weights),
            **(suffix if last else {}),
        )

    def memory(self, blocks: list[int], shards_a_rank: int = 1) -> list[StageMemory]:
        """Every stage's memory."""
        return [
            stage_memory(self.config, self.layout, stage, count, shards_a_rank)
            for stage, count in enumerate(blocks)
        ]

    def floor(self) -> tuple[float, float]:
        """(seconds, bytes): what no schedule can undercut."""
        blocks = self.cut()
        stages = self.stages(blocks)
        busiest = max(stage.total for stage in stages) / self.layout.context
        # One sequence goes through all of its shards, forwards and backwards, one at a time.
        chain = stages[-1].suffix_forward + stages[-1].suffix_backward
        held = enumerate(self.memory(blocks))
        least = max(sum(memory.at(self._in_order(stage, 0)).values()) for stage, memory in held)
        seconds = max(busiest * self.micro_batches, chain)
        return seconds + sum(self.outside(blocks).values()), least

    def outside(self, blocks: list[int]) -> dict[str, float]:
        """Seconds of a step outside the schedule: what of the reductions shows, the optimizer."""
        layout, last = self.layout, self.layout.pipeline - 1
        parameters = max(
            stage_parameters(self.config, layout, count, stage == 0, stage == last)
            for stage, count in enumerate(blocks)
        )
        master = 8 if self.config.training.precision == "fp64" else 4
        moved = traffic.reduction_bytes(layout, parameters * master) / self.links.data
        shown_reduce = shown_gather = moved
        if layout.overlap:
            # Hidden behind one micro-batch's prefix, whose gradients are the last to come.
            part = self.stages(blocks)[0]
            shown_reduce -= (part.prefix_backward + part.prefix_weights) / layout.context
            shown_gather -= part.prefix_forward / layout.context
        gpu = self.hardware
        reached = gpu.memory_gbs * 1e9 * gpu.memory_efficiency
        updated = parameters / (layout.data * layout.context) * ADAM_BYTES
        found = {
            "gradient reduction": max(0.0, shown_reduce),
            "parameter gathering": max(0.0, shown_gather),
            "optimizer": updated / reached,
        }
        if in_float8(self.config):
            rounded = max(
                static_weights(self.config, layout, count, stage == last)
                for stage, count in enumerate(blocks)
            )
            found["weights to float8"] = rounded * WEIGHT_BYTES / reached
        return found

    def hops(self) -> Transfers:
        """Seconds from worker to worker."""
        relay = traffic.relay_bytes(self.config, self.layout) / self.links.context
        boundary = traffic.boundary_bytes(self.config, self.layout) / self.links.pipeline
        return Transfers(relay_forward=relay, relay_backward=relay, boundary=boundary)

    def names(self) -> list[str]:
        """The schedules this layout can take."""
        layout = self.layout
        if layout.context == 1 and layout.pipeline == 1:
            return ["in turn"]
        names = ["gpipe", "1f1b"]
        if layout.pipeline == 1 and self._splits_twice():
            names.append("zigzag")
        turns = self.turns * layout.pipeline
        if layout.pipeline > 1 and layout.context == 1 and turns - 1 <= self._blocks:
            names += ["interleaved"] if self.micro_batches % layout.pipeline == 0 else []
        return names

    def _splits_twice(self) -> bool:
        chunks = self.config.data.sequence_length // self.config.inner.chunk_size
        return chunks % (2 * self.layout.context) == 0

    def timeline(self, schedule: str, micro_batches: int | None = None) -> Timeline:
        """A simulated step."""
        number = self.micro_batches if micro_batches is None else micro_batches
        if schedule == "interleaved":
            parts = self.stages(self.cut(self.turns * self.layout.pipeline))
            return simulate_interleaved(parts, self.layout.pipeline, number, self.hops().boundary)
        stages, debts = self.stages(self.cut()), None
        if schedule == "zigzag":
            stages, debts = [_passes(stage) for stage in self.stages(self.cut(), 2)], DEBTS
        return simulate(
            "1f1b" if schedule == "in turn" else schedule,  # type: ignore[arg-type]
            stages,
            self.layout.context,
            number,
            self.hops(),
            debts=debts,
        )

    def _in_order(self, stage: int, rank: int) -> int:
        """Micro-batches a process holds in 1F1B order: one, and one for everyone behind it."""
        behind = self.layout.context - 1 - rank + self.layout.pipeline - 1 - stage
        return min(behind + 1, self.micro_batches)

    def _live(self, schedule: str, timeline: Timeline) -> list[int]:
        """Shards every worker holds, at most."""
        ranks, stages = self.layout.context, self.layout.pipeline
        if schedule == "gpipe":
            return [self.micro_batches] * (stages * ranks)
        if schedule == "zigzag":
            return list(timeline.peak_live)
        if schedule == "interleaved":
            # Parts are shorter than stages; a stage's activations are those of all of its parts.
            return [-(-count // self.turns) for count in timeline.peak_live]
        return [self._in_order(stage, rank) for stage in range(stages) for rank in range(ranks)]

    def run(self, schedule: str) -> ScheduleResult:
        """Simulates a schedule and takes its fullest process's memory.

        Beyond some rounds of micro-batches every further one takes as long as the busiest
        worker's work on it, so that long steps are not simulated whole.
        """
        layout, ranks = self.layout, self.layout.context
        rounds = 4 * ranks * layout.pipeline
        number = min(self.micro_batches, rounds)
        shards = 2 if schedule == "zigzag" else 1
        blocks = self.cut()
        stages = self.stages(blocks, shards)
        timeline = self.timeline(schedule, number)
        busiest = max(stage.total for stage in stages) / ranks
        further = self.micro_batches - number
        seconds = timeline.seconds + further * busiest
        work = sum(stage.total for stage in stages) * self.micro_batches
        workers = layout.pipeline * ranks
        live = self._live(schedule, timeline)
        debts = timeline.peak_debts if schedule == "zigzag" else [0] * workers
        held = self.memory(blocks, shards)
        by_worker = [held[w // ranks].at(live[w], debts[w]) for w in range(workers)]
        memory = max(by_worker, key=lambda kinds: sum(kinds.values()))
        return ScheduleResult(
            bubble=max(0.0, round(1 - work / (workers * seconds), 12)),
            seconds=seconds,
            memory=memory,
            fits=sum(memory.values()) <= self.hardware.memory_bytes,
        )

    def estimate(self, *, quick: bool = False, schedule: str | None = None) -> Estimate:
        """All schedules, and the one given or the fastest that fits; `quick` simulates the likely
        one alone.
        """
        names = self.names()
        if quick:
            names = [next(name for name in ("zigzag", "1f1b", "in turn") if name in names)]
        results = {name: self.run(name) for name in names}
        known = [name for name in names if name in CHOSEN]
        fitting = [name for name in known if results[name].fits]
        if schedule is not None:
            best = schedule
        elif fitting:
            best = min(fitting, key=lambda name: results[name].seconds)
        else:
            best = min(known, key=lambda name: results[name].memory_bytes)
        blocks = self.cut()
        waiting = results[best].bubble * results[best].seconds
        work = results[best].seconds - waiting
        parts = {"work": work, "waiting": waiting} | self.outside(blocks)
        per_step = self.config.training.global_batch_size
        total = self.work.total.flops * per_step
        return Estimate(
            layout=self.layout.under(best),
            schedule=best,
            schedules=results,
            prefix_blocks=blocks,
            flops=self._busiest_flops(blocks),
            step_flops=total,
            transfers=self._sent(blocks, 2 if best == "zigzag" else 1),
            parts=parts,
            tokens=per_step * self.config.data.sequence_length,
        )

    def _busiest_flops(self, blocks: list[int]) -> float:
        work: StepWork = self.work
        block = (work.block_forward + work.block_backward + work.block_weights).flops
        end = work.total.flops - block * self._blocks
        last = len(blocks) - 1
        most = max(count * block + (end if i == last else 0.0) for i, count in enumerate(blocks))
        sequences = self.micro_batches * self.layout.micro_batch_size
        return most * sequences / (self.layout.tensor * self.layout.context)

    def _sent(self, blocks: list[int], shards_a_rank: int) -> dict[str, float]:
        """Bytes the last stage's processes send in a step."""
        config, layout, n = self.config, self.layout, self.micro_batches
        tensor = traffic.tensor_traffic(config, layout)
        again = 3 if config.training.recompute_prefix else 2
        sent = tensor.block[0] * blocks[-1] * again + tensor.entry[0] * 2
        sent += tensor.suffix_forward[0] + tensor.recompute[0] + tensor.suffix_backward[0]
        reading = traffic.halo_layers(config, blocks[-1], True)
        halo = traffic.halo_bytes(config, layout, shards_a_rank) * reading * 2
        relay = traffic.relay_bytes(config, layout) * 2 * shards_a_rank
        last = layout.pipeline - 1
        master = 8 if config.training.precision == "fp64" else 4
        held = stage_parameters(config, layout, blocks[-1], last == 0, True) * master
        return {
            "tensor reductions": sent * n,
            "context halo": halo * n,
            "fast-weight relay": relay * n,
            "pipeline boundary": traffic.boundary_bytes(config, layout) * n,
            "gradient reduction": traffic.reduction_bytes(layout, held),
            "parameter gathering": traffic.reduction_bytes(layout, held),
        }


def _passes(seconds: PhaseSeconds) -> PhaseSeconds:
    """The phases that are passes of their own with zigzag parts: the suffix's recomputation and
    the prefix's slow weights are parts of the backward passes.
    """
    return replace(
        seconds,
        prefix_backward=seconds.prefix_backward + seconds.prefix_weights,
        prefix_weights=0.0,
        suffix_backward=seconds.recompute + seconds.suffix_backward,
        recompute=0.0,
    )
